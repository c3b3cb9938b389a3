"""Steps 1 to 3 of Algorithm 1 on-policy, for each update anew, with the weights as they are by then."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from stasc import processes
from stasc.errors import UserError
from stasc.run import write_lines
from stasc.seeds import derived_seed
from stasc.trajectory import Example, Question, Trajectory, to_json, unanswered

if TYPE_CHECKING:
    from stasc.experiment import Experiment


class Updates:
    """The updates of an iteration: what each asks, and what is learnt of the answers.

    No file is written before the iteration ends: a start that finds an iteration unfinished begins it anew,
    and draws the same.

    Args:
        experiment: Of an on-policy algorithm.

    Raises:
        UserError: Its settings are none to learn on-policy with.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._done: list[tuple[list[Trajectory], list[Example]]] = []
        self._check()

    def sample(self, n: int, number: int) -> Sequence[Example]:
        """Answers of the weights that train to an update's questions, and what is learnt of them.

        Args:
            n: The iteration.
            number: Of the update, from 0, counted over the whole run, whose draws follow from it.
        """
        experiment = self.experiment
        if number % experiment.algorithm.epochs == 0:
            self._done = []
            experiment.load(n - 1)
        asked, turns = unanswered(self._questions(number)), experiment.algorithm.turns
        trajectories = experiment.take_turns(
            asked, turns, experiment.sampling, f"update {number + 1}", line=False
        )
        examples = list(experiment.select(n, trajectories))
        self._done.append((trajectories, examples))
        return examples

    def last_rewards(self) -> dict[str, float]:
        """Mean rewards of the answers and of the corrections in the last update."""
        trajectories, _ = self._done[-1]
        return {f"r{turn}": fmean(t.reward(turn) for t in trajectories) for turn in (1, 2)}

    def write(self, n: int) -> None:
        """Write what the updates of iteration n have sampled and learnt, as other iterations do before."""
        run = self.experiment.run
        files = run.iteration(n)
        if processes.rank() == 0:
            trajectories, examples = zip(*self._done, strict=True)
            answers = files.answers(len(self.experiment.algorithm.turns))
            for path, records in ((answers, trajectories), (files.dataset, examples)):
                run.note_lines(path, write_lines(path, map(to_json, chain(*records))))
        processes.wait_for(files.dataset)

    def _questions(self, number: int) -> list[Question]:
        """Another part of the training questions for each update; when all were asked, all anew."""
        experiment = self.experiment
        questions, size = experiment.questions["train"], experiment.algorithm.questions_per_update
        passes, part = divmod(number, len(questions) // size)
        generator = torch.Generator().manual_seed(derived_seed(experiment.seed, passes, "questions"))
        order = torch.randperm(len(questions), generator=generator).tolist()
        return [questions[i] for i in sorted(order[part * size : (part + 1) * size])]

    def _check(self) -> None:
        """Find out whether an update's answers come from the distribution that it changes."""
        experiment, name = self.experiment, type(self.experiment.algorithm).__name__
        if experiment.sampling.top_p < 1 or experiment.sampling.temperature == 0:
            raise UserError(
                f"{name} learns from the whole distribution that it samples from: set data.sampling.top_p to "
                "1, and data.sampling.temperature to 1 or at least above 0."
            )
        if experiment.training_dialogue.prompts != experiment.dialogue.prompts:
            raise UserError(
                f"{name} learns for the prompts that it samples with: leave data.training_prompts out."
            )
        size, count = experiment.algorithm.questions_per_update, len(experiment.questions["train"])
        if size > count:
            raise UserError(
                f"{name} asks {size} questions in an update, and data.train has {count}: lower "
                "algorithm.questions."
            )
