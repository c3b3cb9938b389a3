"""Run folders, read: the figures of every M_n and the rewards of every test question."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from stasc.errors import UserError
from stasc.run import Run
from stasc.trajectory import Question, Trajectory, from_json

TRANSITIONS = ("wrong_to_right", "right_to_wrong", "right_to_right", "wrong_to_wrong")

_FURTHER = re.compile(r"greedy\.r[12]|samples\.(k|(pass|majority)_r[12])|rounds\.r\d+")

# What two runs of one system may differ in: the seed, and where and how the run was carried out.
_NOT_THE_SYSTEM = (
    "seed_everything",
    "run_dir",
    "reuse",
    "ckpt_path",
    "weights_only",
    "data.output",
    "data.predict",
    "sampler.init_args",
    "trainer.accelerator",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_",
    "trainer.log",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)


@dataclass(frozen=True)
class Point:
    """What is known of M_n; what is not known is None or empty.

    ``further`` has the other figures of ``metrics.json``, such as ``greedy.r2``. ``rewards`` has, for each
    test question's id, the means of r(y1) and r(y2) over its samples.
    """

    r1: float | None
    r2: float | None
    size: float | None = None
    transitions: dict[str, int] = field(default_factory=dict)
    further: dict[str, float] = field(default_factory=dict)
    rewards: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """One run: its options, and a point for each of M_0, M_1, ... as far as it went.

    ``options`` are those of its config that make it a run of this system and no other, by dotted name.
    ``folder`` is None for a curve of the paper.
    """

    name: str
    seed: Any
    options: dict[str, Any]
    planned: int
    points: tuple[Point, ...]
    folder: Path | None = None
    test_set: frozenset[Question] = frozenset()

    @property
    def last(self) -> int:
        """The last iteration that was evaluated."""
        return len(self.points) - 1

    @property
    def finished(self) -> bool:
        """Whether that is the last one that was asked for."""
        return self.last >= self.planned

    @property
    def threshold(self) -> float:
        """The reward from which on an answer is right."""
        return self.options.get("algorithm.init_args.threshold", 1.0)


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
            f"no run to report in {', '.join(map(str, places))}: a run folder has a config.yaml and an "
            "iteration-00/metrics.json."
        )
    # Names need not say what all of them share.
    above = Path(os.path.commonpath(found)) if len(found) > 1 else found[0].parent
    names = {folder: printable(str(folder.relative_to(above))) for folder in found}
    just_begun = [names[folder] for folder in found if folder not in evaluated]
    return [_read(folder, names[folder]) for folder in evaluated], just_begun


def _folders(place: Path) -> Iterator[Path]:
    """Run folders in and under a folder."""
    if not place.is_dir():
        raise UserError(f"{place} is not a folder: name run folders, or a folder that they lie under.")
    for folder, below, files in os.walk(place):
        begun = any(name == "under-way" or name.startswith("iteration-") for name in below)
        if "config.yaml" in files and begun:
            yield Path(folder)
            below.clear()


def _read(folder: Path, name: str) -> RunResult:
    run = Run(folder)
    config = _flat(_mapping(run.config))
    planned = config.get("algorithm.init_args.iterations", 0)
    if not isinstance(config.get("algorithm.class_path"), str) or not isinstance(planned, int):
        raise UserError(
            f"{run.config} does not say which algorithm ran (algorithm.class_path and init_args)."
        )
    names = (re.fullmatch(r"iteration-(\d\d+)", path.parent.name) for path in folder.glob("*/metrics.json"))
    there = sorted(int(found[1]) for found in names if found)
    if missing := set(range(len(there))) - set(there):
        path = run.iteration(min(missing)).metrics
        raise UserError(f"{path} is missing, although later iterations have one.")
    points, test_sets = zip(*(_point(run, n) for n in there), strict=True)
    for n, test_set in enumerate(test_sets):
        if test_set != test_sets[0]:
            raise UserError(f"{run.iteration(n).test} has other questions than {run.iteration(0).test}.")
    return RunResult(
        name=name,
        seed=config.get("seed_everything"),
        options={key: value for key, value in config.items() if not key.startswith(_NOT_THE_SYSTEM)},
        planned=planned,
        points=points,
        folder=folder,
        test_set=test_sets[0],
    )


def _point(run: Run, n: int) -> tuple[Point, frozenset[Question]]:
    box = run.iteration(n)
    metrics = _mapping(box.metrics)
    rewards: dict[str, list[tuple[float, float]]] = defaultdict(list)
    questions = set()
    for trajectory in trajectories(box.test):
        questions.add(trajectory.question)
        rewards[trajectory.question.id].append((trajectory.r1, trajectory.r2))
    flat = _flat(metrics)
    point = Point(
        r1=_number(flat, "test.r1", box.metrics),
        r2=_number(flat, "test.r2", box.metrics),
        size=_number(flat, "dataset.size", box.metrics) if n else None,
        transitions={key: int(_number(flat, f"test.{key}", box.metrics)) for key in TRANSITIONS},
        further={key: _number(flat, key, box.metrics) for key in flat if _FURTHER.fullmatch(key)},
        rewards={
            key: (fmean(r1 for r1, _ in pairs), fmean(r2 for _, r2 in pairs))
            for key, pairs in rewards.items()
        },
    )
    pairs = [pair for own in rewards.values() for pair in own]
    for turn, told in enumerate((point.r1, point.r2)):
        if not pairs or not math.isclose(fmean(pair[turn] for pair in pairs), told, abs_tol=1e-6):
            raise UserError(
                f"{box.test} does not have the rewards whose mean is in {box.metrics.name}: "
                "one of the two was changed or cut."
            )
    return point, frozenset(questions)


def trajectories(path: Path) -> Iterator[Trajectory]:
    """The trajectories of a file, one at a time.

    Raises:
        UserError: The file is missing, or a line of it is no trajectory.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    trajectory = from_json(line)
                    whole = (
                        isinstance(trajectory, Trajectory)
                        and math.isfinite(trajectory.r1)
                        and math.isfinite(trajectory.r2)
                    )
                except (ValueError, KeyError, TypeError, AttributeError):
                    whole = False
                if not whole:
                    raise UserError(
                        f"{path}, line {number}, is not a trajectory: the file was changed or cut."
                    )
                yield trajectory
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a mapping: the file was changed or cut.")
    return content


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _number(flat: dict[str, Any], name: str, path: Path) -> float:
    value = flat.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path} has no number {name}: the file was changed or cut.")
    return value


def printable(text: str) -> str:
    """A text of one line that every file format can hold: control characters become a question mark."""
    return "".join(char if char.isprintable() else "?" for char in text)


def mean_curve(runs: Sequence[RunResult], name: str) -> list[tuple[int, list[float]]]:
    """For each iteration the values of ``r1``, ``r2`` or ``size`` of all runs that have one there."""
    curve = []
    for n in range(max(run.last for run in runs) + 1):
        values = [getattr(run.points[n], name) for run in runs if n <= run.last]
        if known := [value for value in values if value is not None]:
            curve.append((n, known))
    return curve
