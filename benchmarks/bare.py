"""vLLM as its users call it: ``vllm.LLM.generate`` in this very process, nothing around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import DEVICE

from stasc.model_folder import ModelFolder
from stasc.sampling import Draw, Request, Sampling


class Bare:
    """One ``vllm.LLM`` with the settings that our own worker gives its engine.

    It has what a ``Rollout`` needs of a ``Sampler``.

    Args:
        model: Folder.
        context: Tokens of a prompt and its completion.
        kv_cache_gib: Size of the key-value cache.
        prefix_caching: Ours has it always on.
    """

    prefix_hits = None
    identity = "bare"

    def __init__(self, model: Path, context: int, kv_cache_gib: float, prefix_caching: bool = True) -> None:
        from vllm import LLM

        special = {"gpu_memory_utilization": 0.01}
        if DEVICE.type == "cpu":
            special = {
                "enforce_eager": True,
                "block_size": 32,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(context, 4096),
            }
        self._llm = LLM(
            model=str(model),
            dtype=ModelFolder(model).dtype,
            max_model_len=context,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            enable_prefix_caching=prefix_caching,
            skip_tokenizer_init=True,
            seed=0,
            **special,
        )
        self.seconds = 0.0
        """Time inside the last ``LLM.generate``."""

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        """See ``Sampler.sample``."""
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        parameters = [
            SamplingParams(
                n=request.n,
                seed=None if greedy else request.seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(stop_ids),
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        self.seconds = time.perf_counter() - started
        for i, output in enumerate(outputs):
            yield i, [_draw(list(c.token_ids), c.finish_reason == "stop") for c in output.outputs]


def _draw(token_ids: list[int], finished: bool) -> Draw:
    return Draw(tuple(token_ids[:-1] if finished else token_ids), finished)
