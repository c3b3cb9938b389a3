"""The interface of a sampling engine: sampling parameters, requests, draws, and the `Sampler` base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from stasc.errors import UserError
from stasc.run import FirstUses


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Engines use only these three values. They add no defaults (no top-k, no penalties) and ignore the model's
    ``generation_config.json``.

    Args:
        temperature: Softmax temperature, 0.01 to 2; 0 is greedy decoding.
        top_p: Probability mass of nucleus sampling, in (0, 1].
        max_tokens: Maximum number of new tokens per completion.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= 2:  # the range vLLM accepts
            raise UserError(f"temperature is {self.temperature}: it must be 0 (greedy), or 0.01 to 2.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must lie in (0, 1].")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}: it must be 1 or more.")


class Request(NamedTuple):
    """A request for ``n`` completions of one prompt.

    Completion ``i`` is drawn with the seed ``seed + i``. It depends on nothing else, so order, batching, the
    process and restarts do not change it. At temperature 0 the seed has no effect.
    """

    prompt_ids: Sequence[int]
    n: int
    seed: int


class Draw(NamedTuple):
    """One sampled completion: its token ids without the stop token, and whether a stop token ended it."""

    token_ids: tuple[int, ...]
    finished: bool


class Sampler(ABC):
    """A sampling engine: completes token ids with the weights of a model folder.

    Methods are called in this order: ``start``; then ``load``, ``wait``, ``sample``, ``log_probabilities``
    and ``release`` in any order; then ``close``. Each training process has one sampler on its own device.

    A subclass can be named in YAML by its class path; its ``__init__`` arguments are its ``init_args``. This
    one completes a prompt with the prompt's first tokens:

        class EchoSampler(Sampler):
            def start(self, model: Path, *, device: torch.device, context: int, log: Path) -> None:
                self._device = device

            def load(self, model: Path) -> None:
                pass  # no weights

            def sample(self, requests, sampling, stop_ids):
                for i, request in enumerate(requests):
                    token_ids = tuple(request.prompt_ids[: sampling.max_tokens])
                    yield i, [Draw(token_ids, finished=False)] * request.n

            def log_probabilities(self, sequences):
                return [[0.0] * (len(token_ids) - 1) for token_ids in sequences]

            def release(self) -> None:
                pass  # no memory to free

            def close(self) -> None:
                pass
    """

    first_uses: ClassVar[FirstUses] = {}
    """For each option of ``__init__``, the first files that depend on it; START for options not listed."""

    prefix_hits: float | None = None
    """Share of the prompt tokens that the prefix cache saved in the last ``sample``, over the requests
    finished so far. A prompt counts once, whatever its n. None before the first finished request, and for
    engines without a prefix cache."""

    memory: int | None = None
    """Bytes of the device's memory that the engine may take in all while it is awake; set before ``start``.
    None: whatever the device has free."""

    _device: torch.device | None = None
    _dtype: torch.dtype | str | None = None

    @property
    def identity(self) -> str:
        """What its draws follow from beside the weights, the sampling and the seed.

        Draws of samplers with equal identities may be exchanged. It is complete after ``start``. A subclass
        with an option that changes draws appends that option.
        """
        parts = [f"{type(self).__module__}.{type(self).__qualname__}"]
        if self._device is not None:
            parts.append(self._device.type)
        if self._dtype is not None:
            parts.append(str(self._dtype).removeprefix("torch."))
        return " ".join(parts)

    @abstractmethod
    def start(self, model: Path, *, device: torch.device, context: int, log: Path) -> None:
        """Start the engine with the weights in ``model``. It may return before the engine is ready.

        Args:
            model: Hugging Face model folder with config.json and safetensors weights.
            device: Device of this training process; the engine samples on the same one.
            context: Maximum number of tokens of a prompt and its completion together.
            log: Log file of the engine.
        """

    def wait(self) -> None:  # noqa: B027  (an engine that is ready after ``start`` has nothing to wait for)
        """Return when the engine is ready to sample."""

    @abstractmethod
    def load(self, model: Path) -> None:
        """Switch to the weights in the folder ``model`` without restarting the engine.

        The architecture must be the one of the folder given to ``start``. Loading the folder that is already
        loaded does nothing.
        """

    @abstractmethod
    def sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        """Yield ``(i, draws of requests[i])`` for each request as it finishes, in any order."""

    @abstractmethod
    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The natural log-probability of each token except the first, given the tokens before it.

        At temperature 1 and without nucleus sampling. Call it with a few sequences only: engines hold the
        scores of the whole vocabulary for every token of a sequence. Each sequence must be shorter than the
        context by at least one token.
        """

    @abstractmethod
    def release(self) -> None:
        """Free the accelerator's memory for training; the next call allocates it again."""

    @abstractmethod
    def close(self) -> None:
        """Stop the engine and end all of its processes."""


def check_requests(
    requests: Sequence[Request], sampling: Sampling, context: int, vocabulary: int | None
) -> None:
    """Refuse requests that would crash an engine, or give truncated or meaningless completions.

    Raises:
        ValueError: A prompt is empty, too long or has unknown ids, or n or seed is out of range.
    """
    for i, (prompt_ids, n, seed) in enumerate(requests):
        if not prompt_ids or n < 1 or seed < 0:
            raise ValueError(f"request {i} has {len(prompt_ids)} prompt tokens, n={n} and seed={seed}.")
        if len(prompt_ids) + sampling.max_tokens > context:
            raise ValueError(
                f"request {i} has {len(prompt_ids)} prompt tokens, which with max_tokens="
                f"{sampling.max_tokens} exceed the context of {context} tokens."
            )
        if min(prompt_ids) < 0 or (vocabulary is not None and max(prompt_ids) >= vocabulary):
            raise ValueError(f"request {i} has token ids outside the model's vocabulary of {vocabulary}.")


def check_sequences(sequences: Sequence[Sequence[int]], context: int, vocabulary: int | None) -> None:
    """Refuse sequences whose log-probabilities an engine cannot compute.

    Raises:
        ValueError: A sequence is empty, has unknown ids, or leaves no room for the token that engines add.
    """
    check_requests([Request(ids, 1, 0) for ids in sequences], Sampling(max_tokens=1), context, vocabulary)
