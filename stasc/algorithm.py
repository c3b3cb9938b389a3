"""What a system does with its own answers: STaSC and its variants, and the systems that it builds on.

A system is a handful of choices around one loop (Algorithm 1, section 2.2 of the paper): which model writes
the initial answers, which turns follow, which trajectories are kept, what is learnt of them, and which
weights are fine-tuned. ``stasc/experiment.py`` is the loop that asks for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Literal

from stasc.errors import UserError
from stasc.filtering import improves, pair_all, stays_right
from stasc.run import EVALUATION, SECOND_TURN, SELECTION, TRAINING, FirstUses, more_iterations
from stasc.trajectory import Example, Trajectory

Variant = Literal["FIF", "FIE", "FNF", "FNE", "EIF", "EIE", "ENF", "ENE"]
VARIANTS: tuple[Variant, ...] = tuple("".join(letters) for letters in product("FE", "IN", "FE"))
"""In the order of the paper's Table 2."""


_MOST = 1_000_000
"""Of every size: far more than any run can do, and few enough to be refused before memory runs out."""


def _always(trajectory: Trajectory) -> bool:
    return True


@dataclass(frozen=True)
class Turn:
    """One more answer to every question.

    Args:
        prompt: Name of the prompt (in ``data.prompts``) that asks for it.
        samples: Answers drawn for each trajectory so far.
        asks: Whether a trajectory is asked for this answer; one that is not stays as it is.
    """

    prompt: str
    samples: int = 1
    asks: Callable[[Trajectory], bool] = _always


class Algorithm(ABC):
    """The choices that make a system; a system of your own is a subclass, named by its class path.

    This one keeps every correction that ends right, and learns it on top of M_{n-1}:

        class KeepsRightOnes(Algorithm):
            def initial_model(self, n: int) -> int:
                return n - 1

            def base_model(self, n: int) -> int:
                return n - 1

            def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
                return (t.learn() for t in trajectories if self.right(t.reward(2)))

    Args:
        iterations: N, improvement iterations; 0 evaluates M_0 alone.
        n_init: N_init, initial answers sampled for each question.
        n_corr: N_corr, corrections sampled for each initial answer.
        epochs: Passes over D_n in each fine-tuning.
        threshold: t, the reward from which on an answer is right.
        rounds: Corrections one after another in evaluation: y1 -> y2 -> ... -> y_{rounds+1}.
    """

    uses_references: ClassVar[bool] = False
    """Whether it sees the references at inference, so that its rewards are an upper bound."""

    questions_per_update: int | None = None
    """On-policy, each of the ``epochs`` of an iteration is one update: so many questions are answered by the
    weights as they are by then, and the optimiser takes one step on the sum of the losses of what ``select``
    gives. None: D_n is made once in an iteration, of all questions, by M_{n-1}."""

    stays_near_m0: bool = False
    """Whether ``select`` gives examples with ``kl``, for which training keeps M_0 in memory too."""

    first_uses: ClassVar[FirstUses] = {
        "iterations": more_iterations,
        "n_corr": SECOND_TURN,
        "threshold": SECOND_TURN,
        "rounds": EVALUATION,
        "epochs": TRAINING,
    }
    """For each option of ``__init__`` from where on it has a part in the results; START if it is not here."""

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
            if not least[name] <= size <= _MOST:
                limit = f"{least[name]} or more" if size < _MOST else f"{_MOST:,} or less"
                raise UserError(f"algorithm.{name} is {size}: it must be {limit}.")
        if not 0 < threshold <= 1:
            raise UserError(
                f"algorithm.threshold is {threshold}: it must be above 0 and, as rewards are, at most 1."
            )
        self.iterations = iterations
        self.n_init = n_init
        self.n_corr = n_corr
        self.epochs = epochs
        self.threshold = threshold
        self.rounds = rounds

    def check(self, samples: int) -> None:
        """Find out whether what a subclass gives can be carried out, with so many samples in evaluation.

        Raises:
            UserError: It asks nothing, or names models that there are not by then.
        """
        name = type(self).__name__
        for of, turns in {"turns": self.turns, "test_turns": self.test_turns(samples)}.items():
            if not (isinstance(turns, list | tuple) and turns and all(isinstance(t, Turn) for t in turns)):
                raise UserError(
                    f"{name}.{of} gave {turns!r}: it must give a tuple of stasc.algorithm.Turn, the first of "
                    "which asks for initial answers."
                )
        for n in range(self.iterations + 1):
            last = {"test_initial_model": n} | ({"initial_model": n - 1, "base_model": n - 1} if n else {})
            for of, most in last.items():
                m = getattr(self, of)(n)
                if type(m) is not int or not 0 <= m <= most:
                    raise UserError(
                        f"{name}.{of}({n}) gave {m!r}: it must give the number of a model that there is by "
                        f"then, from 0 to {most}."
                    )

    @property
    def name(self) -> str:
        """What the system is called in curves and tables."""
        return type(self).__name__

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What is asked in training: an initial answer, then any number of further answers by M_{n-1}."""
        return Turn("initial", self.n_init), Turn("correction", self.n_corr)

    def test_turns(self, samples: int) -> tuple[Turn, ...]:
        """What is asked in evaluation, with ``samples`` initial answers for each question."""
        return Turn("initial", samples), *[Turn("correction")] * self.rounds

    @property
    def learns(self) -> set[str]:
        """The prompts for which answers are learnt; by default those of all turns but the first."""
        return {turn.prompt for turn in self.turns[1:]}

    @abstractmethod
    def initial_model(self, n: int) -> int:
        """The number of the model that writes the initial answers of iteration ``n``: n - 1 or 0."""

    def test_initial_model(self, n: int) -> int:
        """The number of the model whose initial answers M_n corrects in evaluation: its own, n, or 0."""
        return n

    @abstractmethod
    def base_model(self, n: int) -> int:
        """The number of the model that is fine-tuned in iteration ``n``: n - 1 or 0."""

    def new_optimizer(self, n: int) -> bool:
        """Whether iteration ``n`` begins with a new optimiser and schedule, or goes on with those before."""
        return True

    @abstractmethod
    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        """D_n: what is learnt of the trajectories of iteration n, which come in the order of the questions.

        ``trajectory.learn()`` is the example that teaches its last answer for the prompt that asked for it;
        it takes another turn, another prompt, a weight or a hold on M_0, and a trajectory may give several
        examples.
        """

    def right(self, reward: float) -> bool:
        """Whether an answer with this reward is right."""
        return reward >= self.threshold

    def ends_wrong(self, trajectory: Trajectory) -> bool:
        """Whether the last answer of a trajectory is wrong."""
        return not self.right(trajectory.reward(trajectory.turn))


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

    first_uses: ClassVar[FirstUses] = {
        **Algorithm.first_uses,
        "variant": SELECTION,
        "pair_all": SELECTION,
        "only_equal": SELECTION,
        "fixed_in_test": TRAINING,
    }

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

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        """D+ under the Improving filter, D+ and D= under the Non-decreasing one; the order is kept."""
        pairs = pair_all(trajectories) if self.pair_all else trajectories
        return (pair.learn() for pair in pairs if self._keeps(pair))

    def _keeps(self, trajectory: Trajectory) -> bool:
        if self.variant[1] == "I":
            return improves(trajectory)
        equal = stays_right(trajectory, self.threshold)
        return equal if self.only_equal else equal or improves(trajectory)


class STaR(Algorithm):
    """Self-Taught Reasoner (Zelikman et al., 2022): M_0 is fine-tuned on right first answers of M_{n-1}.

    Where an answer is wrong, M_{n-1} is shown a reference as a hint (``data.prompts.rationalization``), and
    what it then answers is learnt as a first answer if it is right. ``n_corr`` is the number of these
    attempts; with 0 there are none.
    """

    @property
    def turns(self) -> tuple[Turn, ...]:
        """An initial answer, and rationalisations of a wrong one; a right one stands."""
        initial, hinted = Turn("initial", self.n_init), Turn("rationalization", self.n_corr, self.ends_wrong)
        return (initial, hinted) if self.n_corr else (initial,)

    @property
    def learns(self) -> set[str]:
        """The initial prompt: an answer that was sampled with a hint is learnt without it."""
        return {"initial"}

    def initial_model(self, n: int) -> int:
        """M_{n-1}."""
        return n - 1

    def base_model(self, n: int) -> int:
        """M_0."""
        return 0

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        """Those that end right, learnt as a first answer without any hint."""
        return (t.learn(prompt="initial") for t in trajectories if not self.ends_wrong(t))


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

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        """Nothing."""
        return iter(())


class Reflexion(SelfRefine):
    """Reflexion with an oracle (Shinn et al., 2023): only answers that the reward calls wrong are corrected.

    It uses the references at inference, which no other system does: read it as an upper bound.

    Args:
        rounds: Corrections one after another, until one is right.
        threshold: t, the reward from which on an answer is right.
    """

    uses_references: ClassVar[bool] = True

    def test_turns(self, samples: int) -> tuple[Turn, ...]:
        """Corrections of wrong answers alone."""
        return Turn("initial", samples), *[Turn("correction", asks=self.ends_wrong)] * self.rounds
