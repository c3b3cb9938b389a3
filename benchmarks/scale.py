"""Whether time per example and memory stay the same from 1,000 to 100,000 trajectories in D_n.

    python benchmarks/scale.py [--repeats 3] [--largest 100000] [--append FILE]

Trajectories of the paper's lengths go the way of an iteration, from trajectories.jsonl to the last batch of
an epoch, with the program's own parts; half of them end up in D_n. Each time that is a process of its own.
Memory is the peak of a stage above what was there before the first of them: the program and its tokenizer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import ENVIRONMENT, ROOT, machine, peak_memory, publish, spread, table
from sampling import CONTEXT, paper_prompts, random_model
from transformers.utils.logging import disable_progress_bar

from stasc.algorithm import STaSC
from stasc.metrics import dataset_sizes, reward_metrics
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue
from stasc.run import write_lines
from stasc.training.batches import CorrectionBatches
from stasc.trajectory import Answer, Question, Records, Trajectory, to_json

SIZES = (1_000, 10_000, 100_000)
BATCH, FIRST = 8, 200
FILTER, METRICS = "filter and write D_n", "metrics for the curves"
SHUFFLE, GROUPED = "open and shuffle D_n", "open and shuffle, corrections grouped"
BEGIN, EPOCH = f"the first {FIRST} batches", "all batches of an epoch"
STAGES = (FILTER, SHUFFLE, BEGIN, EPOCH, GROUPED, METRICS)

Found = dict[str, tuple[float, float]]
"""Of each stage the seconds for one example of D_n, and the MiB that it adds."""


def trajectories(size: int) -> Iterator[Trajectory]:
    """Every other one improves, ``size`` in all: 5 corrections of each of 5 initial answers of a question."""
    draw, rewards = random.Random(0), itertools.cycle([0.0, 1.0])
    words = ["the", "in", "answer", "question", "and", "therefore", "1987", "river", "of", "reasoning"]

    def answer(prompt: str, number: int, tokens: int, reward: float) -> Answer:
        text = " ".join(draw.choice(words) for _ in range(tokens // 2))
        ids = tuple(draw.randrange(500) for _ in range(tokens))
        return Answer(prompt, number, text, ids, finished=True, reward=reward)

    for number in range(2 * size // 25):
        question = Question(str(number), f"{answer('', 0, 20, 0.0).text}?", ("an answer",))
        for j in range(5):
            initial = answer("initial", j, 100, 0.0)
            for k in range(5):
                yield Trajectory(question, (initial, answer("correction", k, 80, next(rewards))))


def measure(folder: Path, size: int) -> Found:
    """Go the whole way once."""
    algorithm = STaSC("EIE")
    dialogue = Dialogue(ModelFolder(folder / "model").tokenizer(), paper_prompts())
    source, target = folder / f"{size}.jsonl", folder / "dataset.jsonl"
    found: Found = {}

    def batches(grouped: bool) -> CorrectionBatches:
        return CorrectionBatches(
            Records(target),
            dialogue.example,
            BATCH,
            seed=0,
            group_corrections=grouped,
            longest=CONTEXT,
        )

    dialogue.render("correction", [{"question": "x", "initial_answer": "y"}])
    start = peak_memory(reset=True)

    @contextmanager
    def stage(name: str) -> Iterator[list[int]]:
        examples = [size]
        peak_memory(reset=True)
        began = time.perf_counter()
        yield examples
        found[name] = (time.perf_counter() - began) / examples[0], (peak_memory() - start) / 2**20

    with stage(FILTER):
        write_lines(target, map(to_json, algorithm.select(1, Records(source))))
    with stage(SHUFFLE):
        epoch = batches(grouped=False)
    with stage(BEGIN) as examples:
        examples[0] = min(size, FIRST * BATCH)
        for step in range(min(FIRST, len(epoch))):
            epoch[step]
    with stage(EPOCH):
        for step in range(len(epoch)):
            epoch[step]
    with stage(GROUPED):
        batches(grouped=True)
    with stage(METRICS):
        reward_metrics(Records(source), algorithm.threshold)
        dataset_sizes(Records(target))
    return found


def main() -> None:
    """Measure all sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes for each size")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="leave out sizes above")
    parser.add_argument("--append", type=Path, help="write the table to the end of this file too")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, size = options.measure
        print(json.dumps(measure(Path(folder), int(size))))
        return
    heading = machine()
    disable_progress_bar()
    chosen = [size for size in SIZES if size <= options.largest]
    found: dict[int, list[Found]] = {size: [] for size in chosen}
    with tempfile.TemporaryDirectory() as name:
        random_model(Path(name) / "model", hidden=32, layers=1, heads=2)
        for size in chosen:
            write_lines(Path(name) / f"{size}.jsonl", map(to_json, trajectories(size)))
        for number in range(options.repeats):
            for size in chosen:
                process = subprocess.run(
                    [sys.executable, __file__, "--measure", name, str(size)],
                    env=os.environ | ENVIRONMENT,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    check=True,
                )
                found[size].append(json.loads(process.stdout))
                print(f"({size}, {number}: done)", file=sys.stderr, flush=True)
    rows = []
    for stage in STAGES:
        seconds = {size: [1e6 * of[stage][0] for of in found[size]] for size in chosen}
        memory = {size: [of[stage][1] for of in found[size]] for size in chosen}
        rows.append([stage, "µs per example", *(spread(seconds[size], 1) for size in chosen)])
        rows.append([stage, "MiB", *(spread(memory[size], 1) for size in chosen)])
    head = ("stage", "", *(f"{size:,} in D_n" for size in chosen))
    publish(
        f"### From trajectories to batches\n\n{heading} {options.repeats} processes for each |D_n|; "
        f"median (lowest..highest).\n\n{table(head, rows)}\n",
        options.append,
    )


if __name__ == "__main__":
    main()
