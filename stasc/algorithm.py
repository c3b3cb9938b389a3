"""The choices of Algorithm 1 (section 2.2 of the paper): a variant's three letters, and the sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stasc.errors import UserError

Variant = Literal["EIE", "EIF", "ENE", "ENF", "FIE", "FIF", "FNE", "FNF"]


@dataclass(frozen=True)
class Algorithm:
    """A STaSC variant and its sizes.

    Args:
        variant: Three letters. Initialisation: initial answers from M_{n-1} (Evolving) or M_0 (Fixed).
            Filter: keep corrections that raise the reward (Improving), or also those that keep a right
            answer right (Non-decreasing). Fine-tuning: train M_{n-1} (Evolving) or M_0 (Fixed).
        iterations: N, improvement iterations.
        n_init: N_init, initial answers sampled for each question.
        n_corr: N_corr, corrections sampled for each initial answer.
        epochs: Passes over D_n in each fine-tuning.
        threshold: t, the reward from which on an answer is right.
    """

    variant: Variant = "EIE"
    iterations: int = 10
    n_init: int = 1
    n_corr: int = 1
    epochs: int = 1
    threshold: float = 1.0

    def __post_init__(self) -> None:
        for name in ("iterations", "n_init", "n_corr", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"algorithm.{name} is {getattr(self, name)}: it must be 1 or more.")

    @property
    def evolving_initialization(self) -> bool:
        """Whether the initial answers of iteration n come from M_{n-1} rather than M_0."""
        return self.variant[0] == "E"

    @property
    def improving_filter(self) -> bool:
        """Whether only corrections that raise the reward are kept."""
        return self.variant[1] == "I"

    @property
    def evolving_finetuning(self) -> bool:
        """Whether iteration n trains M_{n-1} rather than M_0."""
        return self.variant[2] == "E"

    def iteration(self, epochs_done: int) -> int:
        """The iteration n in 1..N that is under way after ``epochs_done`` training epochs."""
        return min(epochs_done // self.epochs + 1, self.iterations)
