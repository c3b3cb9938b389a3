"""Sampling with Hugging Face ``generate`` in the training process: slower than vLLM, always available."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stasc.errors import UserError
from stasc.model_folder import ModelFolder
from stasc.run import NEVER, FirstUses
from stasc.sampling.base import Draw, Request, Sampler, Sampling, check_requests, check_sequences


class TransformersSampler(Sampler):
    """Samples with ``generate`` on the training device.

    The weights are loaded when they are first needed. ``release`` frees GPU memory; on CPU it keeps them.

    Args:
        batch_size: Number of completions generated at the same time.
    """

    first_uses: ClassVar[FirstUses] = {"batch_size": NEVER}

    def __init__(self, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be 1 or more.")
        self.batch_size = batch_size
        self._network: PreTrainedModel | None = None

    def start(self, model: Path, *, device: torch.device, context: int, log: Path) -> None:
        """See ``Sampler``; ``log`` is not used."""
        self.close()
        self._model = model.resolve()
        folder = ModelFolder(self._model)
        self._tensors = folder.tensor_shapes()
        self._vocabulary = folder.config.get("vocab_size")
        self._dtype = getattr(torch, folder.dtype)
        self._device, self._context = device, context

    def load(self, model: Path) -> None:
        """See ``Sampler``; refuses a folder whose tensors differ from those of the first folder."""
        model = model.resolve()
        if model == self._model:
            return
        ModelFolder(model).check_same_tensors(self._tensors)
        self._model = model
        self._network = None

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        """See ``Sampler``."""
        check_requests(requests, sampling, self._context, self._vocabulary)
        return self._sample(requests, sampling, list(stop_ids))

    @torch.inference_mode()
    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See ``Sampler``."""
        check_sequences(sequences, self._context, self._vocabulary)
        network = self._loaded_network()
        log_probabilities = []
        for sequence in sequences:  # one at a time, to avoid padding
            ids = torch.tensor([list(sequence)], device=self._device)
            scores = network(ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
            log_probabilities.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
        return log_probabilities

    def release(self) -> None:
        """See ``Sampler``; does nothing on CPU."""
        if self._device.type == "cuda":
            self._network = None
            torch.cuda.empty_cache()

    def close(self) -> None:
        """See ``Sampler``."""
        self._network = None

    def _sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: list[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        greedy = sampling.temperature == 0
        # Longest first: running out of memory shows at once, and similar lengths need little padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        rows = [(i, number) for i in order for number in range(1 if greedy else requests[i].n)]
        draws: dict[int, list[Draw]] = {i: [] for i in order}
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            prompts = [requests[i].prompt_ids for i, _ in batch]
            seeds = [requests[i].seed + number for i, number in batch]
            batch_draws = self._generate(prompts, seeds, sampling, stop_ids)
            for (i, _), draw in zip(batch, batch_draws, strict=True):
                draws[i] += [draw] * (requests[i].n if greedy else 1)
                if len(draws[i]) == requests[i].n:
                    yield i, draws.pop(i)

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: list[int], sampling: Sampling, stop_ids: list[int]
    ) -> list[Draw]:
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=self._device)
        width = max(map(len, row_of))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in row_of], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in row_of], device=self._device)
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(_SeededDraw(sampling, seeds, width, self._device))
        completed = self._loaded_network().generate(
            ids[rows],
            attention_mask=mask[rows],
            past_key_values=self._prefill(ids, mask, rows),
            logits_processor=processors,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=stop_ids or None,
                pad_token_id=0,
            ),
        )
        return [_until_stop(row, stop_ids) for row in completed[:, width:].tolist()]

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> DynamicCache:
        """The key-value cache of distinct prompts, repeated as in ``rows``.

        It leaves out the last token of each prompt: ``generate`` needs at least one token to process.
        """
        network = self._loaded_network()
        cache = DynamicCache(config=network.config)
        ids, mask = ids[:, :-1], mask[:, :-1]
        if ids.shape[1]:
            position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            network(
                ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                logits_to_keep=1,
            )
            cache.batch_select_indices(rows)
        return cache

    def _loaded_network(self) -> PreTrainedModel:
        if self._network is None:
            self._network = self._load_network()
        return self._network

    def _load_network(self) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):  # from_pretrained draws random weights first
            network, report = ModelFolder(self._model).model(self._dtype, output_loading_info=True)
        if report["missing_keys"]:
            raise UserError(f"{self._model} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}.")
        network.generation_config = GenerationConfig()  # generate would use its defaults
        return network.to(self._device).eval()


class _SeededDraw(LogitsProcessor):
    """Draws the next token of each row with that row's seed, by inverse transform sampling.

    It leaves the drawn token as the only one with a finite score, which greedy ``generate`` then picks.
    """

    def __init__(self, sampling: Sampling, seeds: list[int], prompt_width: int, device: torch.device) -> None:
        self._warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._prompt_width = prompt_width
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = [torch.rand(sampling.max_tokens, generator=g, dtype=torch.double) for g in generators]
        self._uniform = torch.stack(uniform).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        cumulative = scores.softmax(dim=-1, dtype=torch.double).cumsum(dim=-1)
        step = input_ids.shape[1] - self._prompt_width
        uniform = self._uniform[:, step, None] * cumulative[:, -1:]
        # ``right`` skips tokens with probability 0, whose cumulative value equals that of the token before.
        drawn = torch.searchsorted(cumulative, uniform, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def _until_stop(token_ids: list[int], stop_ids: list[int]) -> Draw:
    end = next((position for position, token in enumerate(token_ids) if token in stop_ids), None)
    return Draw(tuple(token_ids[:end]), end is not None)
