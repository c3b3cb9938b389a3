"""SCoRe (Kumar et al., 2024, arXiv 2409.12917): self-correction learnt by reinforcement, on-policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import ClassVar

from stasc.algorithm import Algorithm
from stasc.errors import UserError
from stasc.run import FirstUses
from stasc.trajectory import Example, Trajectory


class SCoRe(Algorithm):
    """Self-Correction via Reinforcement Learning (Kumar et al., 2024): REINFORCE on both turns.

    In stage I only corrections earn: r(y2). The first turn is held at M_0 by ``beta2``, so that corrections
    are learnt of the answers that M_0 gives, and the two turns do not fall together. In stage II both earn:
    r(y1), and r(y2) + alpha (r(y2) - r(y1)). In both stages ``beta1`` holds both turns near M_0.

    The advantage of an answer is what it earns less what the others earn on average: those to the same
    question, or where ``n_init`` or ``n_corr`` leave one alone, all of the update. So nothing is learnt where
    all earn the same. No length enters: the loss is the sum over the tokens of an answer, and the mean over
    answers. An update learns from ``questions`` questions, the optimiser and its schedule last a stage.

    Args:
        stage_one: Updates in stage I; 0 leaves it out.
        stage_two: Updates in stage II; 0 leaves it out.
        updates_per_iteration: After so many updates M_n is written and evaluated, and a start can go on.
        questions: Of an update.
        n_init: Initial answers to each of them.
        n_corr: Corrections of each.
        alpha: Factor of the bonus for corrections that improve, and of the malus for those that spoil.
        beta1: Factor of KL(model || M_0), both turns, both stages.
        beta2: Factor of KL(model || M_0) that is added in the first turn in stage I.
        discount: Share of what its corrections earn that an initial answer earns too. At 0 each turn earns
            for itself. At 1 the gradient is that of the paper's objectives, which in stage II rewards wrong
            first answers if alpha is above 1: they let corrections improve.
        threshold: t, the reward from which on an answer is right.
        rounds: Corrections one after another in evaluation.
    """

    first_uses: ClassVar[FirstUses] = {name: Algorithm.first_uses[name] for name in ("threshold", "rounds")}

    def __init__(
        self,
        stage_one: int = 1500,
        stage_two: int = 1500,
        updates_per_iteration: int = 100,
        questions: int = 128,
        n_init: int = 1,
        n_corr: int = 1,
        alpha: float = 10.0,
        beta1: float = 0.01,
        beta2: float = 0.1,
        discount: float = 0.0,
        threshold: float = 1.0,
        rounds: int = 1,
    ) -> None:
        least = {"stage_one": 0, "stage_two": 0, "updates_per_iteration": 1, "questions": 2, "n_corr": 1}
        sizes = (stage_one, stage_two, updates_per_iteration, questions, n_corr)
        for name, size in zip(least, sizes, strict=True):
            if size < least[name]:
                raise UserError(f"algorithm.{name} is {size}: it must be {least[name]} or more.")
        for name, factor in {"alpha": alpha, "beta1": beta1, "beta2": beta2}.items():
            if not 0 <= factor < float("inf"):
                raise UserError(f"algorithm.{name} is {factor}: it must be 0 or more, and finite.")
        if not 0 <= discount <= 1:
            raise UserError(f"algorithm.discount is {discount}: it must lie in [0, 1].")
        for name, size in {"stage_one": stage_one, "stage_two": stage_two}.items():
            if size % updates_per_iteration:
                raise UserError(
                    f"algorithm.{name} is {size}, which is no multiple of algorithm.updates_per_iteration "
                    f"({updates_per_iteration}): change one of them, as a stage ends with an iteration."
                )
        super().__init__(
            iterations=(stage_one + stage_two) // updates_per_iteration,
            n_init=n_init,
            n_corr=n_corr,
            epochs=updates_per_iteration,
            threshold=threshold,
            rounds=rounds,
        )
        self.questions_per_update = questions
        self.stays_near_m0 = beta1 > 0 or (beta2 > 0 and stage_one > 0)
        self.iterations_of_stage_one = stage_one // updates_per_iteration
        self.alpha = alpha
        self.beta1 = beta1
        self.beta2 = beta2
        self.discount = discount

    @property
    def learns(self) -> set[str]:
        """The prompts of both turns."""
        return {turn.prompt for turn in self.turns}

    def initial_model(self, n: int) -> int:
        """M_{n-1}, or what it has become by then: the weights that train."""
        return n - 1

    def base_model(self, n: int) -> int:
        """M_{n-1}."""
        return n - 1

    def new_optimizer(self, n: int) -> bool:
        """At the start of each stage."""
        return n in (1, self.iterations_of_stage_one + 1)

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        """Both turns of an update's trajectories, each answer with its advantage and its hold on M_0."""
        trajectories = list(trajectories)
        first_stage = n <= self.iterations_of_stage_one
        for turn, kl in ((1, self.beta1 + self.beta2 * first_stage), (2, self.beta1)):
            by_answer = groupby(trajectories, lambda t: (t.question.id, t.path[:turn]))  # noqa: B023
            answers = [list(of_one) for _, of_one in by_answer]
            earned = [fmean(self._earned(t, turn, first_stage) for t in of_one) for of_one in answers]
            advantages = _advantages([of_one[0].question.id for of_one in answers], earned)
            for of_one, advantage in zip(answers, advantages, strict=True):
                if advantage or kl:  # otherwise it has no effect
                    share = 1 / len(answers)
                    yield of_one[0].learn(turn, weight=advantage * share, kl=kl * share)

    def _earned(self, trajectory: Trajectory, turn: int, first_stage: bool) -> float:
        """What the answer of a turn earns, the first with the correction that it has in this trajectory."""
        r1, r2 = trajectory.reward(1), trajectory.reward(2)
        by_correction = r2 if first_stage else r2 + self.alpha * (r2 - r1)
        if turn == 2:
            return by_correction
        return (0.0 if first_stage else r1) + self.discount * by_correction


def _advantages(questions: Sequence[str], earned: Sequence[float]) -> list[float]:
    """What each answer has earned above the mean of the others to its question.

    Where there is one answer to each question, the others are those to all questions.
    """
    if len(set(questions)) == len(questions):
        return _above_others(earned)
    groups = groupby(zip(questions, earned, strict=True), itemgetter(0))
    return [value for _, group in groups for value in _above_others([e for _, e in group])]


def _above_others(earned: Sequence[float]) -> list[float]:
    """Each value less the mean of all others; exactly 0 where all are the same."""
    above = [value - earned[0] for value in earned]
    return [value - (sum(above) - value) / (len(above) - 1) for value in above]
