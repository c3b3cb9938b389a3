"""The worker process of ``VLLMSampler``: ``python -P -m stasc.sampling.vllm_worker PIPE PARENT OPTIONS``.

``VLLMSampler`` starts and kills it, and sends it messages ``(name of an Engine method, *arguments)``. The
worker answers with each value that the method yields, and then None. After an error it sends the error
message, a string, and ends.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Never

import torch.distributed as dist

from stasc.ending import end_with
from stasc.sampling.base import Draw, Request

if TYPE_CHECKING:
    from vllm import RequestOutput


class WeightSwap:
    """Adds `swap_weights` to vLLM's worker class (``worker_extension_cls``)."""

    def swap_weights(self, folder: str) -> None:
        """Replace the weights in place with those of the folder."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights(weights_path=folder)
        if self.device.type == "cpu":
            # A tied lm_head is not in the file, so vLLM would keep its packed copy of the old weights.
            for module in self.model_runner.get_model().modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)


class Engine:
    """A vLLM engine whose weights can be replaced.

    Args:
        model: Model folder to load first.
        dtype: Of weights and activations, also for folders that are loaded later.
        context: Maximum number of tokens of a prompt and its completion together.
        sequences: Maximum number of completions at the same time.
        kv_cache_bytes: Size of the key-value cache. By default vLLM takes almost all free memory.
        device: Type of the device, "cpu" or "cuda"; the installed vLLM must be built for it.
    """

    def __init__(
        self, model: str, dtype: str, context: int, sequences: int, kv_cache_bytes: int, device: str
    ) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        if current_platform.device_type != device:
            raise RuntimeError(
                f"the installed vLLM does not run on {device}; install the right build with ./setup.sh"
            )
        if device == "cpu":
            # Chunked prefill of a seeded request kills the CPU engine, so every prompt must fit in one batch.
            device_options = {
                "enforce_eager": True,
                "block_size": 32,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(context, 4096),
            }
        else:
            # vLLM refuses to start unless this share of the GPU is free, but does not allocate it.
            device_options = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.01}
        arguments = EngineArgs(
            model=model,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=sequences,
            kv_cache_memory_bytes=kv_cache_bytes,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            seed=0,
            disable_log_stats=True,
            worker_extension_cls="stasc.sampling.vllm_worker.WeightSwap",
            **device_options,
        )
        # vLLM would create its process group through a temporary file, which a killed worker leaves behind.
        dist.init_process_group(current_platform.dist_backend, store=dist.HashStore(), rank=0, world_size=1)
        # With LLM_CLASS vLLM chooses its defaults for batches rather than for serving.
        self._engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        self._model = model
        self._asleep = False

    def load(self, model: str) -> Iterator[Never]:
        """Load the weights of another folder."""
        if model != self._model or self._asleep:
            if self._asleep:
                self._engine.wake_up(["weights"])
            self._engine.collective_rpc("swap_weights", args=(model,))
            if self._asleep:
                self._engine.wake_up(["kv_cache"])
            if not self._engine.reset_prefix_cache():
                raise RuntimeError("the prefix cache of the old weights could not be cleared")
            self._model = model
            self._asleep = False
        yield from ()

    def release(self) -> Iterator[Never]:
        """Free the memory of the weights and the cache until the next call of another method."""
        if not self._asleep:
            self._engine.sleep(level=2)
            self._asleep = True
        yield from ()

    def sample(
        self, requests: Sequence[tuple[int, Request]], sampling: dict[str, float], stop_ids: list[int]
    ) -> Iterator[tuple[int, list[Draw], int]]:
        """Yield ``(i, draws, prompt tokens read from the prefix cache)`` as request ``i`` finishes."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        yield from self.load(self._model)
        greedy = sampling["temperature"] == 0
        copies, first_states = {}, {}
        for i, (prompt_ids, n, seed) in requests:
            copies[str(i)] = n if greedy else 1  # vLLM refuses n > 1 for greedy requests
            parameters = SamplingParams(
                n=1 if greedy else n,
                seed=None if greedy else seed,  # vLLM draws completion j with seed + j
                **sampling,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                stop_token_ids=stop_ids,
                ignore_eos=True,  # only stop_ids end a completion, not the model's default eos token
                min_tokens=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            name = self._engine.add_request(str(i), tokens_input(list(prompt_ids)), parameters)
            # Only the first of n draws can miss the cache: the others find its prompt there. The request's
            # output has the count of the draw that finished last, so read the state of the first draw.
            first = name if parameters.n == 1 else f"0_{name}"
            first_states[str(i)] = self._engine.output_processor.request_states[first]
        for output in self._finished():
            name = output.request_id
            completions = sorted(output.outputs, key=lambda completion: completion.index)
            draws = [_draw(c.token_ids, c.finish_reason == "stop") for c in completions]
            yield int(name), draws * copies.pop(name), first_states.pop(name).num_cached_tokens

    def log_probabilities(self, sequences: Sequence[list[int]]) -> Iterator[tuple[int, list[float]]]:
        """Yield ``(i, log-probabilities of sequences[i])`` as each sequence finishes."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        yield from self.load(self._model)
        parameters = SamplingParams(
            temperature=0.0,  # applies only to the one sampled token, the minimum; not to the prompt's tokens
            max_tokens=1,
            prompt_logprobs=0,  # the given token only, no top tokens; such requests skip the prefix cache
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for i, sequence in enumerate(sequences):
            self._engine.add_request(str(i), tokens_input(sequence), parameters)
        for output in self._finished():
            tokens = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            yield int(output.request_id), [logprobs[token].logprob for logprobs, token in tokens]

    def _finished(self) -> Iterator[RequestOutput]:
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    yield output


def _draw(token_ids: Sequence[int], finished: bool) -> Draw:
    return Draw(tuple(token_ids[:-1] if finished else token_ids), finished)


def main() -> None:
    """Answer messages until the parent closes the pipe."""
    pipe, parent, options = Connection(int(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3])
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = Engine(**options)
        while True:
            method, *arguments = pipe.recv()
            for answer in getattr(engine, method)(*arguments):
                pipe.send(answer)
            pipe.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())}"[:600])
        sys.exit(1)


if __name__ == "__main__":
    main()
