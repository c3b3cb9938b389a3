"""Where the time of whole iterations goes, and what the same work takes the way the paper's release does it.

    python benchmarks/iteration.py [--quick] [--append FILE]

First the public program runs on the demo task at ten times its size, with a callback and a sampler of
stopwatch.py that take times. Then release.py does the same work: a fresh engine for initial answers, one for
corrections, one for evaluation, and a training process, in every iteration. Both must end with the same
trajectories, byte for byte, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import ENVIRONMENT, ROOT, machine, publish, table
from stopwatch import AROUND, ENGINE, EXPORT, NOTING, RECORDS, SAMPLING, START, STEPS, STOP, SWAP

from data import demo
from stasc.run import Run

ITERATIONS = 2
END = "end of the program"
ONCE = (START, ENGINE, STOP, END)


def run(log: Path, *command: str) -> float:
    """Run Python to its end and give the seconds that took; leave if it fails."""
    started = time.time()
    with log.open("wb") as output:
        process = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return time.time() - started


def program(folder: Path, train: int) -> dict[str, Any]:
    """Run the program; gives seconds by what they were spent on, counts, and the total."""
    times = folder / "times.json"
    began = time.time()
    total = run(
        folder / "program.log",
        *("-m", "stasc", "fit", "--config", "configs/quickstart.yaml"),
        *("--run_dir", str(folder / "program"), "--algorithm.iterations", str(ITERATIONS)),
        *("--data.train.init_args.size", str(train)),
        *("--sampler", "stopwatch.TimedSampler"),
        *("--trainer.callbacks", "stopwatch.Stopwatch", "--trainer.callbacks.output", str(times)),
    )
    found = json.loads(times.read_text())
    seconds, moments = Counter(found["seconds"]), found["moments"]
    # Before the stopwatch was there, and after it wrote its times.
    seconds[END] = began + total - moments["end"]
    seconds[START] += total - sum(seconds.values())
    iterations = total - sum(seconds[name] for name in ONCE)
    evaluation_of_first = moments["training"] - moments["evaluation of M_0"]
    return {
        "counts": found["counts"],
        "seconds": seconds,
        "total": total,
        "iterations": iterations,
        "per_iteration": (iterations - evaluation_of_first) / ITERATIONS,
    }


def release(folder: Path) -> dict[str, Any]:
    """The same work in separate processes; seconds in all, in an iteration, and of those not at work."""
    config, log = folder / "program" / "config.yaml", folder / "release.log"

    def stage(name: str, n: int) -> tuple[float, float]:
        options = ("--config", str(config), "--run_dir", str(folder / "release"))
        took = run(log, "benchmarks/release.py", name, str(n), *options)
        return took, took - json.loads(log.read_text().splitlines()[-1])["working"]

    before, _ = stage("evaluate", 0)
    stages = [
        stage(name, n)
        for n in range(1, ITERATIONS + 1)
        for name in ("initial", "corrections", "train", "evaluate")
    ]
    took, starting = (sum(column) for column in zip(*stages, strict=True))
    return {
        "total": before + took,
        "per_iteration": took / ITERATIONS,
        "starting": starting / ITERATIONS,
    }


def check_same(folder: Path) -> None:
    """Both ways must have done the same work."""
    ours, theirs = Run(folder / "program"), Run(folder / "release")
    for n in range(ITERATIONS + 1):
        for path in sorted(ours.iteration(n).folder.glob("*.jsonl")):
            other = theirs.iteration(n).folder / path.name
            if path.read_bytes() != other.read_bytes():
                sys.exit(f"{path.name} of iteration {n} differs between the two ways.")


def shares(ours: dict[str, Any]) -> str:
    """The table of where the program's time goes."""
    seconds, whole = ours["seconds"], ours["iterations"]
    elsewhere = (RECORDS, AROUND, EXPORT, SWAP)

    def row(name: str, *parts: str) -> list[str]:
        value = sum(seconds[part] for part in parts)
        return [name, f"{value:.1f}", f"{value / whole:.1%}"]

    return table(
        ("the program", "seconds", "share"),
        [
            row("sampling", SAMPLING, NOTING),
            row(f"- {NOTING}", NOTING),
            row("optimiser steps", STEPS),
            row("**elsewhere**", *elsewhere),
            *(row(f"- {name}", name) for name in elsewhere),
            ["all iterations", f"{whole:.1f}", ""],
            *([f"once per run: {name}", f"{seconds[name]:.1f}", ""] for name in ONCE),
        ],
    )


def main() -> None:
    """Run both ways and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the demo's own size")
    parser.add_argument("--append", type=Path, help="write the tables to the end of this file too")
    options = parser.parse_args()
    train = 500 if options.quick else 5000
    heading = machine()
    demo.base_model()  # made once, outside of all times
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = program(folder, train)
        print(shares(ours), file=sys.stderr)
        theirs = release(folder)
        check_same(folder)
    counts = ours["counts"]
    comparison = table(
        ("the same work", "processes with an engine", "seconds", "seconds per iteration"),
        [
            ["the program", "1", f"{ours['total']:.1f}", f"{ours['per_iteration']:.1f}"],
            [
                "as the release does it",
                str(3 * ITERATIONS + 1),
                f"{theirs['total']:.1f}",
                f"{theirs['per_iteration']:.1f} ({theirs['starting']:.1f} to start and end processes)",
            ],
            [
                "ratio",
                "",
                f"{theirs['total'] / ours['total']:.2f}",
                f"{theirs['per_iteration'] / ours['per_iteration']:.2f}",
            ],
        ],
    )
    publish(
        f"### {ITERATIONS} iterations, {train} training and 500 test questions\n\n{heading}\n\n"
        f"{counts['completions']:,} completions and {counts['steps']} optimiser steps, and M_0 evaluated; "
        f"both ways ended with the same trajectories.\n\n{shares(ours)}\n\n{comparison}\n",
        options.append,
    )


if __name__ == "__main__":
    main()
