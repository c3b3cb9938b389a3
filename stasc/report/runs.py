"""Reading run folders: the metrics of every M_n and the rewards of every test question."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from stasc.errors import UserError
from stasc.run import Run, SystemRecord, flatten
from stasc.texts import printable
from stasc.trajectory import TRANSITIONS, Question, Trajectory, from_json

_FURTHER = re.compile(r"greedy\.r[12]|samples\.(k|(pass|majority)_r[12])|rounds\.r\d+")


@dataclass(frozen=True)
class Point:
    """What is known of M_n; what is unknown, as where it was not tested, is None or empty.

    Attributes:
        r1: Mean reward of its initial answers to the test questions.
        r2: Mean reward of their corrections.
        size: |D_n|, in trajectories.
        transitions: Number of test trajectories by name of ``TRANSITIONS``.
        repeated: Share of the corrections with the same words as the answer that they correct.
        edited: Share of the words that the other corrections change.
        validation: Mean reward of its corrections to the validation questions.
        further: Other metrics by their names in ``metrics.json``, such as ``greedy.r2``.
        rewards: For each test question's id the means of r(y1) and r(y2) over its samples.
        work: What it took to make M_n of the model before: ``answers`` and ``tokens`` that were sampled, and
            optimiser ``steps``, where they were noted.
    """

    r1: float | None
    r2: float | None
    size: float | None = None
    transitions: dict[str, int] = field(default_factory=dict)
    repeated: float | None = None
    edited: float | None = None
    validation: float | None = None
    further: dict[str, float] = field(default_factory=dict)
    rewards: dict[str, tuple[float, float]] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """One run: what it says of its system, and a point for each of M_0, M_1, ... as far as it went.

    ``folder`` is None for a curve of the paper. ``hours`` are those of all its processes together, until the
    last iteration of each of its starts; None if no start says.
    """

    name: str
    record: SystemRecord
    points: tuple[Point, ...]
    folder: Path | None = None
    test_set: frozenset[Question] = frozenset()
    hours: float | None = None

    @property
    def last(self) -> int:
        """The last iteration that was evaluated."""
        return len(self.points) - 1

    @property
    def finished(self) -> bool:
        """Whether that is the last one that was asked for."""
        return self.last >= self.record.iterations

    @property
    def chosen(self) -> int | None:
        """The iteration whose corrections are best on the validation questions, the first of equals."""
        rewards = [point.validation for point in self.points]
        return None if None in rewards else rewards.index(max(rewards))

    @property
    def gains(self) -> list[tuple[float, float]]:
        """(|D_n|, r(Y2) of M_n less that of M_{n-1}) for each iteration n where all three are known."""
        return [
            (now.size, now.r2 - before.r2)
            for before, now in pairwise(self.points)
            if None not in (now.size, now.r2, before.r2)
        ]


def read_runs(places: Iterable[Path]) -> tuple[list[RunResult], list[str]]:
    """The runs in and under some folders, and the names of those that have not evaluated M_0 yet.

    Raises:
        UserError: There is none, or a file of one cannot be read.
    """
    places = list(places)
    found = sorted({folder.resolve() for place in places for folder in _folders(place)})
    evaluated = [folder for folder in found if Run(folder).iteration(0).metrics.is_file()]
    if not evaluated:
        raise UserError(
            f"no run to report in {', '.join(map(str, places))}: a run folder has a system.json and an "
            "iteration-00/metrics.json."
        )
    # The part of the path that all runs share says nothing about any of them.
    above = Path(os.path.commonpath(found)) if len(found) > 1 else found[0].parent
    names = {folder: printable(str(folder.relative_to(above))) for folder in found}
    just_begun = [names[folder] for folder in found if folder not in evaluated]
    return [_read(folder, names[folder]) for folder in evaluated], just_begun


def _folders(place: Path) -> Iterator[Path]:
    """Run folders in and under a folder."""
    if not place.is_dir():
        raise UserError(f"{place} is not a folder: name run folders, or a folder that they lie under.")
    for folder, below, files in os.walk(place):
        if "system.json" in files and any(re.fullmatch(r"draws|iteration-.*", name) for name in below):
            yield Path(folder)
            below.clear()


def _read(folder: Path, name: str) -> RunResult:
    run = Run(folder)
    names = (re.fullmatch(r"iteration-(\d\d+)", path.parent.name) for path in folder.glob("*/metrics.json"))
    evaluated = sorted(int(found[1]) for found in names if found)
    if missing := set(range(len(evaluated))) - set(evaluated):
        path = run.iteration(min(missing)).metrics
        raise UserError(f"{path} is missing, although later iterations have one.")
    points, test_sets = zip(*(_point(run, n) for n in evaluated), strict=True)
    for n, test_set in enumerate(test_sets):
        if test_set and test_set != test_sets[0]:
            later, first = (run.iteration(i).test_answers(2) for i in (n, 0))
            raise UserError(f"{later} has other questions than {first}.")
    record = run.read_system()
    record = replace(record, name=printable(record.name))
    return RunResult(name, record, points, folder, test_sets[0], _hours(run.starts))


def _hours(starts: Path) -> float | None:
    """Hours of all processes together, of the starts that have finished an iteration; None without any."""
    try:
        found = json.loads(starts.read_text(encoding="utf-8"))["starts"]
        seconds = [start["seconds"] * start["processes"] for start in found if "seconds" in start]
    except (OSError, ValueError, TypeError, KeyError):  # not kept
        return None
    return sum(seconds) / 3600 if seconds else None  # a run of an earlier version has not noted them


def _point(run: Run, n: int) -> tuple[Point, frozenset[Question]]:
    """What is known of M_n, and the test questions if it was tested."""
    iteration = run.iteration(n)
    path, test = iteration.metrics, iteration.test_answers(2)
    metrics = _metrics(path)
    size = _number(metrics, "dataset.size", path) if n else None
    validation = _number(metrics, "validation.r2", path) if "validation.r2" in metrics else None
    names = {"answers": "train.answers", "tokens": "train.tokens", "steps": "training.steps"}
    work = {name: _number(metrics, key, path) for name, key in names.items() if key in metrics}
    if n and not any(name.startswith("test.") for name in metrics):
        return Point(None, None, size, validation=validation, work=work), frozenset()
    samples: dict[Question, list[tuple[float, float]]] = defaultdict(list)
    repeats = []
    for trajectory in trajectories(test):
        samples[trajectory.question].append((trajectory.reward(1), trajectory.reward(2)))
        if trajectory.turn > 1:
            repeats.append(trajectory.repeats)
    point = Point(
        r1=_number(metrics, "test.r1", path),
        r2=_number(metrics, "test.r2", path),
        size=size,
        transitions={key: int(_number(metrics, f"test.{key}", path)) for key in TRANSITIONS},
        repeated=fmean(repeats) if repeats else None,
        edited=_number(metrics, "test.edited", path) if "test.edited" in metrics else None,
        validation=validation,
        further={key: _number(metrics, key, path) for key in metrics if _FURTHER.fullmatch(key)},
        rewards={
            question.id: (fmean(r1 for r1, _ in pairs), fmean(r2 for _, r2 in pairs))
            for question, pairs in samples.items()
        },
        work=work,
    )
    # Metrics are computed from the answers, so another mean shows that one of the files was changed.
    pairs = [pair for found in samples.values() for pair in found]
    for turn, mean in enumerate((point.r1, point.r2)):
        if not pairs or not math.isclose(fmean(pair[turn] for pair in pairs), mean, abs_tol=1e-6):
            raise UserError(
                f"{test} does not have the rewards whose mean is in {path.name}: "
                "one of the two was changed or cut."
            )
    return point, frozenset(samples)


def trajectories(path: Path) -> Iterator[Trajectory]:
    """The trajectories of a file, one at a time; each has at least one answer.

    Raises:
        UserError: The file is missing, or a line of it is no trajectory.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    trajectory = from_json(line)
                    whole = isinstance(trajectory, Trajectory) and trajectory.turn > 0
                    whole = whole and all(math.isfinite(answer.reward) for answer in trajectory.answers)
                except (ValueError, KeyError, TypeError, AttributeError):
                    whole = False
                if not whole:
                    raise UserError(
                        f"{path}, line {number}, is not a trajectory: the file was changed or cut."
                    )
                yield trajectory
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _metrics(path: Path) -> dict[str, Any]:
    """The metrics of an iteration by dotted name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a mapping: the file was changed or cut.")
    return flatten(content)


def _number(metrics: dict[str, Any], name: str, path: Path) -> float:
    value = metrics.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path} has no number {name}: the file was changed or cut.")
    return value
