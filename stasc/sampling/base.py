"""What the rest of the program may know about a sampling engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from stasc.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. These three values are all there is: an engine adds no default of its own
    (no top-k, no penalty), whatever the model's ``generation_config.json`` says.

    Args:
        temperature: Softmax temperature, 0.01 to 2; 0 is greedy.
        top_p: Nucleus mass, in (0, 1].
        max_tokens: New tokens per completion at most.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= 2:  # what vLLM takes
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy), or 0.01 to 2.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must lie in (0, 1].")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}: it must be 1 or more.")


class Request(NamedTuple):
    """``n`` completions of one prompt.

    Completion ``i`` of the request is drawn from the seed ``seed + i`` and nothing else, so it is the
    same in any order, batch, process or restart. With temperature 0 the seed has no effect.
    """

    prompt_ids: Sequence[int]
    n: int
    seed: int


class Draw(NamedTuple):
    """One sampled completion: its ids without the stop token, and whether a stop token ended it."""

    token_ids: tuple[int, ...]
    finished: bool


class Sampler(ABC):
    """A model that completes token ids.

    The order of calls is ``start``, then any number of ``load``, ``sample``, ``log_probabilities`` and
    ``release``, then ``close``. Each training process has its own sampler on its own device.
    """

    prefix_hits: float | None = None
    """Share of the prompt tokens of the last ``sample``, as far as it is answered, that were not computed
    because an earlier prompt began with them; a prompt counts once, whatever its n. None where the engine
    has no prefix cache, and before the first answer."""

    @abstractmethod
    def start(self, model: Path, *, device: torch.device, context: int, log: Path) -> None:
        """Make the engine ready to sample from the Hugging Face folder ``model``; may return before it is.

        Args:
            model: Folder with config.json and safetensors weights; the weights sampled from first.
            device: Where this training process trains, and where the engine shall sample.
            context: Tokens that the longest prompt and its completion can take together.
            log: File for what the engine itself has to say.
        """

    @abstractmethod
    def load(self, model: Path) -> None:
        """Sample from the weights in the folder ``model`` from now on, without a restart.

        The architecture is that of the folder given to ``start``. Loading the folder that is already
        loaded costs nothing.
        """

    @abstractmethod
    def sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        """Yield ``(i, the n draws of requests[i])`` as they are finished, in any order of ``i``."""

    @abstractmethod
    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The natural logarithm of the probability of each token but the first, given those before it.

        At temperature 1, with nothing else applied. It is for a few sequences at a time, each with room for
        one more token in the context: engines hold the whole vocabulary's scores for every token of one.
        """

    @abstractmethod
    def release(self) -> None:
        """Give the accelerator's memory back for training; whatever is called next takes it again."""

    @abstractmethod
    def close(self) -> None:
        """End the engine. Nothing of it stays behind."""


def check_requests(
    requests: Sequence[Request], sampling: Sampling, context: int, vocabulary: int | None
) -> None:
    """Find what an engine would answer with a crash, a shorter completion or nonsense.

    Raises:
        ValueError: A prompt is empty, too long or has unknown ids, or n or seed is impossible.
    """
    for i, (prompt_ids, n, seed) in enumerate(requests):
        if not prompt_ids or n < 1 or seed < 0:
            raise ValueError(f"request {i} has {len(prompt_ids)} prompt tokens, n={n} and seed={seed}.")
        if len(prompt_ids) + sampling.max_tokens > context:
            raise ValueError(
                f"request {i} has {len(prompt_ids)} prompt tokens, and with max_tokens={sampling.max_tokens} "
                f"does not fit a context of {context}."
            )
        if min(prompt_ids) < 0 or (vocabulary is not None and max(prompt_ids) >= vocabulary):
            raise ValueError(f"request {i} has token ids outside of the model's vocabulary of {vocabulary}.")


def check_sequences(sequences: Sequence[Sequence[int]], context: int, vocabulary: int | None) -> None:
    """Find the sequences whose log-probabilities an engine cannot tell.

    Raises:
        ValueError: A sequence is empty, has unknown ids, or leaves no room for the token that engines add.
    """
    check_requests([Request(ids, 1, 0) for ids in sequences], Sampling(max_tokens=1), context, vocabulary)
