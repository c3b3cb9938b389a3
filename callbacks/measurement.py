"""What ``python -m stasc check`` puts into the run of its rehearsal: few questions, and measurements."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from data import TrajectoryDataModule
from data.trajectories import Batches
from stasc.algorithm import Turn
from stasc.errors import UserError
from stasc.experiment import Experiment
from stasc.sampling import Request, Sampling
from stasc.training.batches import Batch
from stasc.training.module import CorrectionSFT
from stasc.training.prefix_tree import common_prefix
from stasc.trajectory import Answer, Example, Question, Trajectory, unanswered

START, RESUME = "start: model and engine", "start again, resume"
SAMPLE, SLEEP, PREPARE = "sample and score", "engine to sleep", "base model, optimiser"
TRAIN, TRAIN_LONGEST = "train on D_1", "train, longest examples"
WRITE, SWAP, AROUND = "M_n and checkpoint to disk", "new weights, probe", "prompts, files, batches"
BATCH = "draws alone and together"

ITERATION = (SLEEP, PREPARE, WRITE, SWAP)
"""Phases that take the same time in every iteration, whatever the number of questions."""

DRAWS = {"cuda": 256, "cpu": 32}
"""Initial answers that are asked for at a time, by the device: enough to keep it busy, or to be quick."""
STEPS = 3
"""Optimiser steps on the longest examples; from the second on there is the optimiser's state, too."""
ALONE = 8
"""Questions that are asked once together and once alone."""

Result = TypeVar("Result")


class Measurement(Callback):
    """Measures a start of a run that asks few of its questions.

    Iteration 1 is as it comes, unless its D_1 is empty. Where that is so, and in iteration 2, the longest
    examples that the questions can give are trained on instead of what was selected.

    Args:
        folder: Gets ``START-RANK.json``, which says at any time how far the process is.
        start: Number of the start, from 1.
    """

    def __init__(self, folder: str, start: int) -> None:
        self.folder = Path(folder)
        self.start = start

    def setup(self, trainer: Trainer, pl_module: CorrectionSFT, stage: str) -> None:
        """Keep few questions, and take the time of what the engine is asked; it has just been started."""
        data: TrajectoryDataModule = trainer.datamodule
        experiment = data.experiment
        if experiment.on_policy:
            raise UserError(
                f"check does not rehearse on-policy systems, and {experiment.algorithm.name} is one: start "
                "the run itself with a few updates in another run_dir; it tells the time of each phase."
            )
        path = self.folder / f"{self.start}-{trainer.global_rank}.json"
        self.phases = Phases(trainer.strategy.root_device, path, START if self.start == 1 else RESUME)
        count = math.ceil(DRAWS[self.phases.device.type] / experiment.algorithm.turns[0].samples)
        asked = {name: few(questions, count) for name, questions in experiment.questions.items()}
        self.phases.found |= {
            "device": _device_name(self.phases.device),
            "memory": _device_memory(self.phases.device),
            "processes": trainer.world_size,
            "context": experiment.context,
            "questions": {name: (len(asked[name]), len(all_)) for name, all_ in experiment.questions.items()},
            "longest": 0,
            "asks": [],
            "steps": [],
        }
        experiment.questions = asked
        experiment.rollout.ask = self._measured(experiment.rollout.ask)
        experiment.load = self._timed(experiment.load, SWAP)
        experiment.dataset = self._dataset(experiment.dataset, trainer)
        experiment.sampler.release = self._timed(experiment.sampler.release, SLEEP)

    def on_fit_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Wait for the engine."""
        experiment: Experiment = trainer.datamodule.experiment
        experiment.sampler.log_probabilities(experiment.probe_sequences())
        self.phases.switch(AROUND)

    def on_train_epoch_start(self, *_: Any) -> None:
        """M_{n-1} has been evaluated; next the iteration's base model and optimiser are put in place."""
        self.phases.switch(PREPARE)
        self._step_began: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: CorrectionSFT, batch: Batch | None, batch_idx: int
    ) -> None:
        """Note the size of the micro-batch."""
        if batch is None:  # D_n is empty
            return
        if self._step_began is None:
            self.phases.switch(TRAIN_LONGEST if self.phases.found["longest"] else TRAIN)
            self._step_began, self._largest = time.time(), 0
        self._largest = max(self._largest, batch.input_ids.numel())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CorrectionSFT, outputs: Any, batch: Batch | None, batch_idx: int
    ) -> None:
        """Note the time of an optimiser step, from the end of the one before."""
        if batch is None or not batch.ends_step:
            return
        if self.phases.device.type == "cuda":
            torch.cuda.synchronize(self.phases.device)
        now = time.time()
        step = {"seconds": now - self._step_began, "tokens": self._largest, "targets": batch.step_tokens}
        self.phases.found["steps"].append(step)
        self._step_began, self._largest = now, 0

    def on_train_epoch_end(self, *_: Any) -> None:
        """M_n and the checkpoint are written next."""
        self.phases.switch(WRITE)

    def on_train_end(self, *_: Any) -> None:
        """They are written."""
        self.phases.switch(AROUND)

    def on_fit_end(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """All is evaluated: see whether draws depend on the batch."""
        experiment: Experiment = trainer.datamodule.experiment
        if trainer.is_global_zero and (self.start == 2 or not experiment.algorithm.iterations):
            self.phases.switch(BATCH)
            self.phases.found["alone"] = drawn_otherwise_alone(experiment)
            self.phases.switch(AROUND)
        self.phases.end()

    def _timed(self, function: Callable[..., Result], phase: str) -> Callable[..., Result]:
        def timed(*args: Any, **kwargs: Any) -> Result:
            before = self.phases.switch(phase)
            result = function(*args, **kwargs)
            self.phases.switch(before)  # not after an error: then it is this phase that failed
            return result

        return timed

    def _dataset(
        self, select: Callable[[int], Sequence[Example]], trainer: Trainer
    ) -> Callable[[int], Sequence[Example]]:
        """``Experiment.dataset``, or the longest examples in its place."""

        @cache
        def dataset(n: int) -> Sequence[Example]:
            data: TrajectoryDataModule = trainer.datamodule
            found, examples = self.phases.found, select(n)
            found |= {"dataset": len(examples), "trajectories": len(data.experiment.trajectories(n))}
            found |= {"longest_possible": longest_example(data.experiment)[0], "longest": 0}
            if n == 2 or not examples:
                micro_batches = trainer.world_size * trainer.accumulate_grad_batches
                examples = longest_examples(data.experiment, data.batches, micro_batches)
                found["longest"] = sum(map(len, data.experiment.training_dialogue.example(examples[0])))
            found["learnt"] = len(examples) * data.experiment.algorithm.epochs
            return examples

        return dataset

    def _measured(self, ask: Callable[..., list[Trajectory]]) -> Callable[..., list[Trajectory]]:
        """``Rollout.ask`` with a note of its time and its tokens, those of all processes."""
        timed = self._timed(ask, SAMPLE)

        def measured(
            trajectories: Sequence[Trajectory],
            turn: Turn,
            sampling: Sampling,
            stage: str,
            *journal: Any,
            **options: Any,
        ) -> list[Trajectory]:
            began = time.time()
            answered = timed(trajectories, turn, sampling, stage, *journal, **options)
            before = set(map(id, trajectories))  # those that the turn does not ask come back as they are
            answers = [t.answers[-1] for t in answered if id(t) not in before]
            source = "train" if stage.startswith("iteration") else stage.split()[2].rstrip(",")
            self.phases.found["asks"].append(
                {
                    "source": source,
                    "seconds": time.time() - began,
                    "completions": len(answers),
                    "tokens": sum(len(answer.token_ids) for answer in answers),
                    "cut": sum(not answer.finished for answer in answers),
                }
            )
            return answered

        return measured


class Phases:
    """Seconds of each phase, and the most memory that was seen in it; at every moment there is one phase.

    Memory is that of the trainer, of the engine, of the device, and of the host, in bytes. On a CPU they are
    resident bytes of this process and of the processes of its engine. On a GPU the trainer has what PyTorch
    holds there, and the engine what else is in use, which CUDA itself and other programs are part of.

    Args:
        device: Where the trainer and its engine are.
        path: JSON file with all that was found, written again and again.
        phase: The first one.
    """

    def __init__(self, device: torch.device, path: Path, phase: str) -> None:
        self.device = device
        self.path = path
        if device.type == "cuda":
            torch.cuda.init()  # its statistics are asked for below
        self.found: dict[str, Any] = {"phase": phase, "seconds": defaultdict(float), "peaks": {}}
        self._since = time.time()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def switch(self, phase: str) -> str:
        """Begin a phase; gives the one before."""
        with self._lock:
            self._look()
            before, self.found["phase"] = self.found["phase"], phase
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self._write()
        return before

    def end(self) -> None:
        """Look no more."""
        self.switch("")
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            with self._lock:
                self._look()
                self._write()  # the process may be killed at any moment

    def _write(self) -> None:
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.found), encoding="utf-8")
        unfinished.replace(self.path)

    def _look(self) -> None:
        moment = time.time()
        self.found["seconds"][self.found["phase"]] += moment - self._since
        self._since = moment
        trainer, engine = _resident()
        now = {"trainer": trainer, "engine": engine, "device": trainer + engine, "host": trainer + engine}
        if self.device.type == "cuda":
            free, there = torch.cuda.mem_get_info(self.device)
            now["trainer"] = torch.cuda.max_memory_reserved(self.device)
            now["engine"] = there - free - torch.cuda.memory_reserved(self.device)
            now["device"] = there - free
        peaks = self.found["peaks"].setdefault(self.found["phase"], now)
        for name, value in now.items():
            peaks[name] = max(peaks[name], value)


def few(questions: Sequence[Question], count: int) -> list[Question]:
    """The longest of the questions and the first others, so many in all."""
    longest = max(questions, key=lambda question: len(question.text))
    return [longest, *(question for question in questions if question is not longest)][:count]


def longest_example(experiment: Experiment) -> tuple[int, int, str]:
    """The tokens that no training example exceeds, and the turn and the prompt that such a one is of.

    Answers in prompts may be three times as long as they were sampled: broken UTF-8 becomes replacement
    characters of three bytes.
    """
    turns, at_most, bounds = experiment.algorithm.turns, experiment.sampling.max_tokens, []
    for prompt in experiment.algorithm.learns:
        turn = next((i for i, turn in enumerate(turns, 1) if turn.prompt == prompt), len(turns))
        lengths, answers = experiment.training_dialogue.lengths(prompt, turn, experiment.questions["train"])
        bounds.append((max(lengths) + (3 * answers + 1) * at_most, turn, prompt))
    tokens, turn, prompt = max(bounds)
    return min(tokens, experiment.base.context), turn, prompt


def longest_examples(experiment: Experiment, batches: Batches, micro_batches: int) -> list[Example]:
    """A D_n that needs the most memory that any can: its examples are the longest, or fill the budget.

    Where as many of the longest examples as a micro-batch takes do not fit into the token budget, they are
    somewhat shorter, so that a whole number of them fills it.

    Args:
        experiment: With the questions that they are for.
        batches: How they will be cut.
        micro_batches: Into how many a step is divided at least, over all processes.
    """
    dialogue, turns, questions = (
        experiment.training_dialogue,
        experiment.algorithm.turns,
        experiment.questions,
    )
    longest, turn, prompt = longest_example(experiment)
    longest = min(longest, batches.token_budget)
    words = dialogue.tokenizer.encode(" so", add_special_tokens=False) or [dialogue.end_of_turn]
    target = (words * experiment.sampling.max_tokens)[: experiment.sampling.max_tokens - 1]
    last = Answer(turns[turn - 1].prompt, 0, "", tuple(target), True, 1.0)

    def repeating(number: int, times: int) -> Example:
        text = f"{number}{' so' * times}"
        answers = [Answer(turn.prompt, number, text, (), True, 0.0) for turn in turns[: turn - 1]]
        question = questions["train"][number % len(questions["train"])]
        return Trajectory(question, (*answers, last)).learn(turn, prompt)

    def example(number: int, length: int) -> Example:
        """An example that comes as near to a length as the answers in its prompt can bring it."""
        size = lambda times: sum(map(len, dialogue.example(repeating(number, times))))  # noqa: E731
        return repeating(number, max(0, bisect_right(range(length), length, key=size) - 1))

    shared = 0
    if batches.prefix_sharing:
        one, other = (dialogue.example(example(number, longest))[0] for number in (0, 1))
        shared = common_prefix(np.array(one), np.array(other))
    fill = math.ceil((batches.token_budget - shared) / (longest - shared))
    if fill < math.ceil(batches.size / micro_batches):
        longest = min(longest, shared + (batches.token_budget - shared) // fill)
    return [example(number, longest) for number in range(STEPS * batches.size)]


def drawn_otherwise_alone(experiment: Experiment) -> tuple[int, int]:
    """How many draws of a few questions differ where each is asked alone, and how many draws there are."""
    turn, sampler = experiment.algorithm.turns[0], experiment.sampler
    prompts = experiment.dialogue.ask(turn.prompt, unanswered(experiment.questions["train"][:ALONE]))
    requests = [Request(prompt, turn.samples, experiment.seed) for prompt in prompts]

    def draws(requests: Sequence[Request]) -> list[Any]:
        drawn = dict(sampler.sample(requests, experiment.sampling, experiment.dialogue.stop_ids))
        return [draw for i in range(len(requests)) for draw in drawn[i]]

    together = draws(requests)
    alone = [draw for request in requests for draw in draws([request])]
    return sum(a != b for a, b in zip(alone, together, strict=True)), len(together)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _device_memory(device: torch.device) -> int:
    """Bytes that the device has; of a CPU those that this process may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return host_memory()


def host_memory() -> int:
    """Bytes of RAM of this machine, or of the container."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            there = min(there, int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # there is no such limit
            continue
    return there


def _resident() -> tuple[int, int]:
    """Resident bytes of this process, and of its engine: of its children in sessions of their own."""
    page, me, mine = os.sysconf("SC_PAGE_SIZE"), os.getpid(), 0
    processes = list(_processes())
    sessions = {pid for pid, parent, session, _ in processes if parent == me and session == pid}
    mine = next(pages for pid, _, _, pages in processes if pid == me)
    return page * mine, page * sum(pages for _, _, session, pages in processes if session in sessions)


def _processes() -> Iterator[tuple[int, int, int, int]]:
    """All processes of the machine: its id, its parent's, its session's, and its resident pages."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        yield int(path.parent.name), int(fields[1]), int(fields[3]), int(fields[21])
