"""Sampling with Hugging Face ``generate`` in the training process: slower than vLLM, and always there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stasc.errors import UserError
from stasc.sampling.base import Draw, Request, Sampler, Sampling, check_requests, check_sequences
from stasc.sampling.folder import check_same_tensors, model_dtype, read_config, tensor_shapes


class TransformersSampler(Sampler):
    """Samples with ``generate`` on the training device.

    The weights are read when the first completion needs them. ``release`` drops them from a GPU; on CPU
    they stay.

    Args:
        batch_size: Completions that are made at the same time.
    """

    def __init__(self, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be 1 or more.")
        self.batch_size = batch_size
        self._network: PreTrainedModel | None = None

    def start(self, model: Path, *, device: torch.device, context: int, log: Path) -> None:
        """See ``Sampler``; ``log`` is not used."""
        self.close()
        self._model = model.resolve()
        self._tensors = tensor_shapes(self._model)
        self._vocabulary = read_config(self._model).get("vocab_size")
        self._dtype = getattr(torch, model_dtype(self._model))
        self._device, self._context = device, context

    def load(self, model: Path) -> None:
        """See ``Sampler``; refuses a folder whose tensors are not those of the one given to ``start``."""
        model = model.resolve()
        if model == self._model:
            return
        check_same_tensors(self._tensors, model)
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
        network = self._ready()
        found = []
        for sequence in sequences:  # one at a time, so nothing is padded
            ids = torch.tensor([list(sequence)], device=self._device)
            scores = network(ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
            found.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
        return found

    def release(self) -> None:
        """See ``Sampler``; on CPU the weights stay."""
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
        # The longest first: what does not fit the memory shows at once, and neighbours need little padding.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        rows = [(i, child) for i in order for child in range(1 if greedy else requests[i].n)]
        drawn: dict[int, list[Draw]] = {i: [] for i in order}
        for at in range(0, len(rows), self.batch_size):
            batch = rows[at : at + self.batch_size]
            prompts = [requests[i].prompt_ids for i, _ in batch]
            seeds = [requests[i].seed + child for i, child in batch]
            draws = self._generate(prompts, seeds, sampling, stop_ids)
            for (i, _), draw in zip(batch, draws, strict=True):
                drawn[i] += [draw] * (requests[i].n if greedy else 1)
                if len(drawn[i]) == requests[i].n:
                    yield i, drawn.pop(i)

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: list[int], sampling: Sampling, stop_ids: list[int]
    ) -> list[Draw]:
        places = {prompt: at for at, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        rows = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=self._device)
        width = max(map(len, places))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in places], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in places], device=self._device)
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(_SeededDraw(sampling, seeds, width, self._device))
        completed = self._ready().generate(
            ids[rows],
            attention_mask=mask[rows],
            past_key_values=self._read_prompts(ids, mask, rows),
            logits_processor=processors,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=stop_ids or None,
                pad_token_id=0,
            ),
        )
        return [_until_stop(row, stop_ids) for row in completed[:, width:].tolist()]

    def _read_prompts(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> DynamicCache:
        """What the model keeps of the prompts, each computed once, in the order of ``rows``.

        Without their last tokens: ``generate`` wants something to begin with.
        """
        network = self._ready()
        cache = DynamicCache(config=network.config)
        ids, mask = ids[:, :-1], mask[:, :-1]
        if ids.shape[1]:
            place = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            network(ids, attention_mask=mask, position_ids=place, past_key_values=cache, logits_to_keep=1)
            cache.batch_select_indices(rows)
        return cache

    def _ready(self) -> PreTrainedModel:
        if self._network is None:
            self._network = self._read()
        return self._network

    def _read(self) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):  # random initialisation comes before the weights
            network, report = AutoModelForCausalLM.from_pretrained(
                self._model, dtype=self._dtype, output_loading_info=True
            )
        if report["missing_keys"]:
            raise UserError(f"{self._model} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}.")
        network.generation_config = GenerationConfig()  # generate takes from it whatever it is not told
        return network.to(self._device).eval()


class _SeededDraw(LogitsProcessor):
    """Draws the next token of each row from the row's own seed; ``generate`` then takes the best score.

    One uniform number per token, looked up in the cumulative distribution.
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
        mass = scores.softmax(dim=-1, dtype=torch.double).cumsum(dim=-1)
        step = input_ids.shape[1] - self._prompt_width
        # A token without probability adds no mass, so ``right`` steps over it.
        chosen = torch.searchsorted(mass, self._uniform[:, step, None] * mass[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _until_stop(token_ids: list[int], stop_ids: list[int]) -> Draw:
    end = next((at for at, token in enumerate(token_ids) if token in stop_ids), None)
    return Draw(tuple(token_ids[:end]), end is not None)
