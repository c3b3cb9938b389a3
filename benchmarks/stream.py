"""What one stream of requests would save, in which no answer waits for answers that it does not follow from.

    python benchmarks/stream.py RUN [--step] [--append FILE]

Today an engine drains four times for each model: first answers and corrections of the training questions,
then those of the test questions. Three other ways: corrections at once, as soon as their own first answers
are there; two turns, each of which asks training and test questions together; and one stream, which is both.
All are simulated with lengths drawn from the answers in the run folder RUN, without the reading of prompts.
A step gives every running sequence a token, and what it takes grows with their number: "full / one" is how
much longer a step of a full engine lasts than one with a single sequence. That decides, so ``--step``
measures it, on this machine with the model of the run.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import DEVICE, machine, publish, table

from stasc.model_folder import ModelFolder
from stasc.run import Run, read_json
from stasc.sampling.vllm_worker import Engine
from stasc.trajectory import Records

SEED = 1
RATIOS = (1.0, 2.0, 4.0, 8.0)
SIZES = ((500, 1, 1), (500, 1, 5), (500, 5, 5), (50, 1, 1), (24, 1, 1))
"""Questions, N_init, N_corr; the last is an update of SCoRe as it is in a small run."""
ENGINES, SEQUENCES = 2, 256
TOKENS = 64
"""Of each sequence that a step is measured with."""

Chain = tuple[int, ...]
"""The length of a first answer and those of its corrections, in tokens."""


class Cost(NamedTuple):
    """Steps of an engine, and their time in units of a step with one sequence."""

    steps: int
    time: float


def lengths(run: Run, n: int) -> dict[str, list[list[Chain]]]:
    """By split, for each question the chains that it has."""
    found: dict[str, list[list[Chain]]] = {}
    for split, path in (("train", run.iteration(n).answers(2)), ("test", run.iteration(0).test_answers(2))):
        chains: dict[tuple[str, int], list[int]] = {}
        for trajectory in Records(path):
            first, second = (len(answer.token_ids) + answer.finished for answer in trajectory.answers)
            chains.setdefault((trajectory.question.id, trajectory.path[0]), [first]).append(second)
        questions = defaultdict(list)
        for (question, _), chain in chains.items():
            questions[question].append(tuple(chain))
        found[split] = list(questions.values())
    return found


def drawn(questions: Sequence[list[Chain]], n_init: int, n_corr: int, draw: random.Random) -> list[Chain]:
    """The chains of a random question."""
    chains = draw.choices(draw.choice(questions), k=n_init)
    return [(first, *draw.choices(seconds, k=n_corr)) for first, *seconds in chains]


def drain(waiting: Sequence[Chain], ratio: float) -> Cost:
    """One engine answers all that waits, and what comes after those answers as soon as they are there.

    Args:
        waiting: Chains; all answers of a chain but the first wait for the first.
        ratio: Of the time of a step with all sequences to that with one.
    """
    queue, running, steps, took = deque(waiting), [], 0, 0.0
    while queue or running:
        while queue and len(running) < SEQUENCES:
            first, *later = queue.popleft()
            running.append((steps + first, later))
        # Nothing comes or goes until the first of them ends.
        end = min(end for end, _ in running)
        took += (end - steps) * (1 + (ratio - 1) * (len(running) - 1) / (SEQUENCES - 1))
        steps = end
        queue.extendleft((length,) for at, later in running if at == end for length in later)
        running = [(at, later) for at, later in running if at > end]
    return Cost(steps, took)


def together(parts: Sequence[Sequence[Chain]], ratio: float) -> Cost:
    """Engines that work on a part each, and wait for each other at the end."""
    return max((drain(part, ratio) for part in parts), key=lambda cost: cost.time)


def compared(found: dict[str, list[list[Chain]]], size: tuple[int, int, int], ratio: float) -> list[Cost]:
    """What an iteration's sampling takes today, with corrections at once, in two turns, in one stream."""
    questions, n_init, n_corr = size
    draw, engines = random.Random(SEED), range(ENGINES)
    asked = {
        "train": [drawn(found["train"], n_init, n_corr, draw) for _ in range(questions)],
        "test": [drawn(found["test"], 1, 1, draw) for _ in range(questions)],
    }
    parts = {
        split: [[chain for question in of[i::ENGINES] for chain in question] for i in engines]
        for split, of in asked.items()
    }
    firsts = [[[chain[:1] for chain in part] for part in of] for of in parts.values()]
    seconds = [[[(n,) for chain in part for n in chain[1:]] for part in of] for of in parts.values()]
    today = [together(stage, ratio) for stage in (*firsts, *seconds)]
    at_once = [together(stage, ratio) for stage in parts.values()]
    turns = [together([[*train[i], *test[i]] for i in engines], ratio) for train, test in (firsts, seconds)]
    stream = [together([[*parts["train"][i], *parts["test"][i]] for i in engines], ratio)]
    return [Cost(*map(sum, zip(*costs, strict=True))) for costs in (today, at_once, turns, stream)]


def step_times(folder: ModelFolder) -> list[tuple[int, float]]:
    """Seconds of a step by the number of running sequences, from an engine in this process."""
    cache = SEQUENCES * 2 * TOKENS * folder.cache_bytes_per_token()
    engine = Engine(str(folder.path), folder.dtype, 512, SEQUENCES, cache, DEVICE.type)
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": TOKENS}
    found = []
    for sequences in (1, 1, 16, 64, 128, SEQUENCES):  # the first is to warm up
        requests = [(i, ([1, 2, 3 + i], 1, i)) for i in range(sequences)]
        began = time.perf_counter()
        for _ in engine.sample(requests, sampling, []):
            pass
        found.append((sequences, (time.perf_counter() - began) / TOKENS))
    return found[1:]


def main() -> None:
    """Simulate, and measure a step if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run whose corrections are on disk")
    parser.add_argument("--step", action="store_true", help="measure a step, too")
    parser.add_argument("--append", type=Path, help="write the tables to the end of this file too")
    options = parser.parse_args()
    run = Run(options.run)
    found = lengths(run, 1)
    rows = []
    for size in SIZES:
        for ratio in RATIOS:
            today, *others = compared(found, size, ratio)
            questions, n_init, n_corr = size
            gains = (f"{today.time / other.time:.2f}" for other in others)
            rows.append([f"{questions}, {n_init} x {n_corr}", f"{ratio:g}", f"{today.steps:,}", *gains])
    head = ("questions, N_init x N_corr", "full / one", "steps today", "at once", "two turns", "one stream")
    publish(
        f"### One stream of requests, simulated\n\n{machine()} Lengths of {options.run.name}; {ENGINES} "
        f"engines of {SEQUENCES} sequences, as many test questions as training questions. How many times "
        "less time than today:\n\n"
        f"{table(head, rows)}\n",
        options.append,
    )
    if options.step:
        model = read_json(run.starts)["starts"][-1]["model"]
        folder = ModelFolder(Path(model["folder"]))
        rows = [[str(n), f"{1000 * seconds:.1f}"] for n, seconds in step_times(folder)]
        publish(f"A step of {model['base']}:\n\n{table(('sequences', 'ms'), rows)}\n", options.append)


if __name__ == "__main__":
    main()
