"""Run folders made by hand, reports of them, and what the reports say."""

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from stasc.ending import end_after_mistakes
from stasc.report.command import main
from stasc.run import Run, SystemRecord, write_json, write_lines
from stasc.trajectory import Answer, Question, Trajectory, to_json

Rewards = Sequence[tuple[str, str]]
"""r(y1) and r(y2) of M_0, M_1, ...: a digit for each test question."""

TEXTS = {"0": "It is Tim.", "1": "It is Ruth."}
THREE_ITERATIONS = [("000000", "000000"), ("100000", "110000"), ("000000", "110100")]


def questions(split: str, count: int) -> list[Question]:
    return [Question(f"{split}-{i}", f"Who is {split} {i}?", ("Ruth",)) for i in range(count)]


def trajectory(question: Question, rewards: str, number: int = 0) -> Trajectory:
    """A chain of answers with these rewards, a digit each."""
    answers = [
        Answer(
            "correction" if i else "initial", 0 if i else number, TEXTS[reward], (1, 2), True, float(reward)
        )
        for i, reward in enumerate(rewards)
    ]
    return Trajectory(question, tuple(answers))


def metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    words = {0.0: "wrong", 1.0: "right"}
    counts = Counter(f"{words[t.reward(1)]}_to_{words[t.reward(2)]}" for t in trajectories)
    return {
        "r1": fmean(t.reward(1) for t in trajectories),
        "r2": fmean(t.reward(2) for t in trajectories),
        **{f"{a}_to_{b}": counts[f"{a}_to_{b}"] for a, b in product(words.values(), repeat=2)},
        "count": len(trajectories),
    }


def make_run(
    folder: Path,
    tests: Rewards,
    name: str = "EIE",
    *,
    seed: int = 1,
    sizes: Sequence[int] = (),
    planned: int | None = None,
    split: str = "test",
    further: dict[str, Any] | None = None,
    uses_references: bool = False,
    **options: Any,
) -> Path:
    """A run folder.

    Args:
        folder: Where.
        tests: Rewards; more digits than one for each of the six questions are further samples.
        name: Of the system.
        seed: Of the run.
        sizes: |D_n| of iterations 1, 2, ...; 5 where it is left out.
        planned: Iterations that were asked for; as many as there are by default.
        split: What the test questions are called, so that another one makes another test set.
        further: More metrics of every iteration.
        uses_references: Of the system.
        **options: Other options of the system, with ``__`` for each dot.
    """
    asked = questions(split, min(len(tests[0][0]), 6))
    for n, (r1, r2) in enumerate(tests):
        pairs = enumerate(map("".join, zip(r1, r2, strict=True)))
        write_iteration(
            folder,
            n,
            [trajectory(asked[i % 6], rewards, number=i // 6) for i, rewards in pairs],
            [trajectory(question, "01", number=n) for question in questions("train", 12)],
            dict(enumerate(sizes, start=1)).get(n, 5),
            further or {},
        )
    system = SystemRecord(
        name=name,
        iterations=len(tests) - 1 if planned is None else planned,
        threshold=1.0,
        uses_references=uses_references,
        seed=seed,
        options={
            "model.base": "demo",
            "model.learning_rate": 1e-4,
            "data.reward.class_path": "stasc.reward.InAccuracy",
            "data.answer.class_path": "stasc.answers.WholeCompletion",
            "algorithm.init_args.n_init": 2,
            "algorithm.init_args.n_corr": 2,
        }
        | {option.replace("__", "."): value for option, value in options.items()},
    )
    write_json(Run(folder).system, vars(system))
    write_lines(Run(folder).config, [f"seed_everything: {seed}"])
    return folder


def write_iteration(
    folder: Path,
    n: int,
    test: Sequence[Trajectory],
    train: Sequence[Trajectory],
    size: int,
    further: dict[str, Any],
) -> None:
    iteration = Run(folder).iteration(n)
    content = {"iteration": n, "test": metrics(test)}
    write_lines(iteration.test_answers(2), map(to_json, test))
    if n:
        write_lines(iteration.answers(2), map(to_json, train))
        content |= {"train": metrics(train), "dataset": {"size": size}, "training": {"loss": None}}
    write_json(iteration.metrics, content | further)


def change_system(folder: Path, **fields: Any) -> None:
    """Change what a run says of its system."""
    write_json(Run(folder).system, vars(replace(Run(folder).read_system(), **fields)))


def report(*arguments: object) -> None:
    with end_after_mistakes():
        main([str(argument) for argument in arguments])


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence that the program ends with."""
    with pytest.raises(SystemExit) as end:
        report(*arguments)
    assert end.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("stasc: ")
    assert sentence.count("\n") == 1
    return sentence


def rows(out: Path, table: str) -> list[dict[str, str]]:
    """The rows of a CSV file of a report."""
    with (out / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(row: dict[str, str], *names: str) -> list[float]:
    return [float(row[name]) for name in names]


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Phi3-mini with (N_init, N_corr) = (1, 5): r(Y2) of M_0 to M_10, and what was kept of the draws of each. From
# the public notebook of the paper's repository (github.com/VityaVitalich/STASC, vis.ipynb); Table 2 and the
# correlation of section 4.2 follow from these.
PAPER = {
    "FIE": (
        (0.348, 0.352, 0.356, 0.366, 0.370, 0.374, 0.372, 0.360, 0.372, 0.362, 0.352),
        (152, 153, 181, 170, 183, 208, 202, 222, 213, 216, 211),
    ),
    "FNE": (
        (0.348, 0.346, 0.364, 0.336, 0.358, 0.358, 0.348, 0.348, 0.346, 0.374, 0.364),
        (742, 122, 153, 137, 158, 169, 171, 183, 194, 203, 191),
    ),
    "EIE": (
        (0.356, 0.364, 0.372, 0.394, 0.388, 0.386, 0.388, 0.368, 0.366, 0.362, 0.370),
        (161, 66, 47, 45, 68, 53, 46, 21, 43, 31, 17),
    ),
    "ENE": (
        (0.356, 0.300, 0.280, 0.282, 0.222, 0.206, 0.208, 0.162, 0.152, 0.108, 0.132),
        (711, 639, 596, 574, 503, 476, 455, 410, 367, 283, 397),
    ),
}


def write_paper(path: Path, unknown: Sequence[tuple[str, int]] = ()) -> Path:
    """A file of the paper's curves, with some values of r(Y2) left out."""
    lines = ["model,variant,N_init,N_corr,iteration,init_train,init_test,corr_test,n_filtered"]
    for variant, (rewards, kept) in PAPER.items():
        for n, (r2, size) in enumerate(zip(rewards, kept, strict=True)):
            r2 = "" if (variant, n) in unknown else r2
            lines.append(f"Phi3-mini,{variant},1,5,{n},0.3,,{r2},{size}.0")
    path.write_text("\n".join(lines) + "\n")
    return path
