"""What a system does with its own answers: STaSC and its variants, and the systems that it builds on.

A system is a handful of choices around one loop (Algorithm 1, section 2.2 of the paper): which model writes
the initial answers, which of them get a second turn and how, which trajectories are kept, what is trained on
them, and from which weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from stasc.errors import UserError
from stasc.filtering import improves, pair_all, stays_right
from stasc.prompting import Dialogue
from stasc.rollout import Rollout
from stasc.sampling import Sampling
from stasc.trajectory import InitialAnswer, Trajectory

Variant = Literal["EIE", "EIF", "ENE", "ENF", "FIE", "FIF", "FNE", "FNF"]


class Algorithm(ABC):
    """The choices that make a system; a system of your own is a subclass, named by its class path.

    Args:
        iterations: N, improvement iterations; 0 evaluates M_0 alone.
        n_init: N_init, initial answers sampled for each question.
        n_corr: N_corr, corrections sampled for each initial answer.
        epochs: Passes over D_n in each fine-tuning.
        threshold: t, the reward from which on an answer is right.
        rounds: Corrections one after another in evaluation: y1 -> y2 -> ... -> y_{rounds+1}.
    """

    def __init__(
        self,
        iterations: int = 10,
        n_init: int = 1,
        n_corr: int = 1,
        epochs: int = 1,
        threshold: float = 1.0,
        rounds: int = 1,
    ) -> None:
        least = {"iterations": 0, "n_init": 1, "n_corr": 0, "epochs": 1, "rounds": 1}
        for name, size in zip(least, (iterations, n_init, n_corr, epochs, rounds), strict=True):
            if size < least[name]:
                raise UserError(f"algorithm.{name} is {size}: it must be {least[name]} or more.")
        self.iterations = iterations
        self.n_init = n_init
        self.n_corr = n_corr
        self.epochs = epochs
        self.threshold = threshold
        self.rounds = rounds

    @property
    def name(self) -> str:
        """What the system is called in curves and tables."""
        return type(self).__name__

    @property
    def prompts(self) -> tuple[str, ...]:
        """Which of ``data.prompts`` are sent."""
        return ("initial", "correction")

    @abstractmethod
    def initial_model(self, n: int) -> int:
        """The number of the model that writes the initial answers of iteration ``n``: n - 1 or 0."""

    def test_initial_model(self, n: int) -> int:
        """The number of the model whose initial answers M_n corrects in evaluation: its own, n, or 0."""
        return n

    @abstractmethod
    def base_model(self, n: int) -> int:
        """The number of the model that is fine-tuned in iteration ``n``: n - 1 or 0."""

    @abstractmethod
    def select(self, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """D_n, from the trajectories of iteration n in the order of the questions."""

    def second_turns(
        self, rollout: Rollout, answers: Sequence[InitialAnswer], sampling: Sampling, stage: str
    ) -> list[Trajectory]:
        """What M_{n-1} makes of the initial answers: ``n_corr`` corrections of each."""
        return rollout.corrections(answers, self.n_corr, sampling, stage)

    def example(self, dialogue: Dialogue, trajectory: Trajectory) -> tuple[list[int], list[int]]:
        """The prompt's token ids, which carry no loss, and the target's, which do."""
        return dialogue.training_example(trajectory)

    def asks_again(self, answer: InitialAnswer) -> bool:
        """Whether an answer gets another turn in evaluation; else it stands as its own correction."""
        return True

    def iteration(self, epochs_done: int) -> int:
        """The iteration n in 1..N that is under way after ``epochs_done`` training epochs."""
        return min(epochs_done // self.epochs + 1, self.iterations)

    def right(self, reward: float) -> bool:
        """Whether an answer with this reward is right."""
        return reward >= self.threshold


class STaSC(Algorithm):
    """Self-Taught Self-Correction, in its eight variants (section 2.2). Variant FIE is Self-Correction (SC).

    Args:
        variant: Three letters. Initialisation: initial answers from M_{n-1} (Evolving) or M_0 (Fixed).
            Filter: keep corrections that raise the reward (Improving), or also those that keep a right
            answer right (Non-decreasing). Fine-tuning: train M_{n-1} (Evolving) or M_0 (Fixed).
        pair_all: Pair every initial answer of a question with every correction of that question, also those
            of its other initial answers, as the paper's release does.
        only_equal: Under the Non-decreasing filter, keep only what stays right and not what improves, as the
            paper's release does. The Improving filter is not touched.
        fixed_in_test: Under Fixed initialisation, have M_n correct the answers of M_0 in evaluation too, and
            not its own, as in the paper's figures.
        **common: Those of ``Algorithm``.
    """

    def __init__(
        self,
        variant: Variant = "EIE",
        pair_all: bool = False,
        only_equal: bool = False,
        fixed_in_test: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if self.iterations and not self.n_corr:
            raise UserError("algorithm.n_corr is 0: without corrections there is nothing to learn from.")
        self.variant = variant
        self.pair_all = pair_all
        self.only_equal = only_equal
        self.fixed_in_test = fixed_in_test

    @property
    def name(self) -> str:
        """The variant."""
        return self.variant

    def initial_model(self, n: int) -> int:
        """M_{n-1} under Evolving initialisation, else M_0."""
        return n - 1 if self.variant[0] == "E" else 0

    def test_initial_model(self, n: int) -> int:
        """M_n, or M_0 under Fixed initialisation if that is asked for."""
        return 0 if self.fixed_in_test and self.variant[0] == "F" else n

    def base_model(self, n: int) -> int:
        """M_{n-1} under Evolving fine-tuning, else M_0."""
        return n - 1 if self.variant[2] == "E" else 0

    def select(self, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """D+ under the Improving filter, D+ and D= under the Non-decreasing one; the order is kept."""
        return filter(self._keeps, pair_all(trajectories) if self.pair_all else trajectories)

    def _keeps(self, trajectory: Trajectory) -> bool:
        if self.variant[1] == "I":
            return improves(trajectory)
        equal = stays_right(trajectory, self.threshold)
        return equal if self.only_equal else equal or improves(trajectory)


class STaR(Algorithm):
    """Self-Taught Reasoner (Zelikman et al., 2022): M_0 is fine-tuned on right first answers of M_{n-1}.

    Where an answer is wrong, M_{n-1} is shown a reference as a hint (``data.prompts.rationalization``), and
    what it then says is learnt as a first answer if it is right. ``n_corr`` counts these attempts; 0 does
    without.
    """

    @property
    def prompts(self) -> tuple[str, ...]:
        """The hint too, if there is one."""
        return (*super().prompts, "rationalization") if self.n_corr else super().prompts

    def initial_model(self, n: int) -> int:
        """M_{n-1}."""
        return n - 1

    def base_model(self, n: int) -> int:
        """M_0."""
        return 0

    def second_turns(
        self, rollout: Rollout, answers: Sequence[InitialAnswer], sampling: Sampling, stage: str
    ) -> list[Trajectory]:
        """Rationalisations of wrong answers; a right one stands."""
        return rollout.corrections(
            answers,
            self.n_corr,
            sampling,
            stage,
            asks=lambda answer: self.n_corr > 0 and not self.right(answer.r1),
            prompts=rollout.dialogue.rationalization_prompts,
        )

    def select(self, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """Those that end right."""
        return (trajectory for trajectory in trajectories if self.right(trajectory.r2))

    def example(self, dialogue: Dialogue, trajectory: Trajectory) -> tuple[list[int], list[int]]:
        """The right answer as a first answer, without any hint."""
        return dialogue.initial_prompt(trajectory.question.text), dialogue.target(trajectory.correction)


class SelfRefine(Algorithm):
    """Self-Refine (Madaan et al., 2023): M_0 corrects its answers ``rounds`` times, and nothing is trained.

    Args:
        rounds: Corrections one after another.
        threshold: t, the reward from which on an answer is right.
    """

    def __init__(self, rounds: int = 3, threshold: float = 1.0) -> None:
        super().__init__(iterations=0, rounds=rounds, threshold=threshold)

    def initial_model(self, n: int) -> int:
        """M_0."""
        return 0

    def base_model(self, n: int) -> int:
        """M_0."""
        return 0

    def select(self, trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
        """Nothing."""
        return iter(())


class Reflexion(SelfRefine):
    """Reflexion with an oracle (Shinn et al., 2023): only answers that the reward calls wrong are corrected.

    It uses the references at inference, which no other system does: read it as an upper bound.

    Args:
        rounds: Corrections one after another, until one is right.
        threshold: t, the reward from which on an answer is right.
    """

    def asks_again(self, answer: InitialAnswer) -> bool:
        """Whether it is wrong."""
        return not self.right(answer.r1)
