"""Sampling with vLLM, which runs in a worker process of our own; vLLM is never imported here."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Literal

import torch

from stasc.errors import UserError
from stasc.sampling.base import Draw, Request, Sampler, Sampling, check_requests, check_sequences
from stasc.sampling.folder import check_same_tensors, model_dtype, read_config, tensor_shapes

_logger = logging.getLogger(__name__)

_GIB = 1 << 30

# What a launcher tells the training process; vLLM would take it for itself.
_SCRUBBED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_", "ROLE_")
_SCRUBBED += ("MASTER_", "TORCHELASTIC_", "LD_PRELOAD", "VLLM_CPU_KVCACHE_SPACE")


class EngineDied(RuntimeError):
    """The worker process ended without a word."""


class EngineFailed(RuntimeError):
    """The worker process ended with an exception, and this is what it said."""


class VLLMSampler(Sampler):
    """Samples with vLLM, in one worker process for each training process.

    A worker that dies (killed, out of memory) is replaced and only the missing requests are sampled again.
    It ends with the thread that called ``start``, which should be the main one. ``release`` empties a GPU;
    on CPU the engine stays, with memory for its weights and ``kv_cache_gib``.

    Args:
        kv_cache_gib: Memory of the key-value cache, beside that of the weights; more of it lets more
            completions run at the same time.
        log_level: Of what vLLM writes to its log file.
        batch_invariant: On CUDA devices of compute capability 8.0 or more, make draws independent of their
            batch in every precision, at some cost in speed. Without it some draws change with the batch.
    """

    def __init__(
        self,
        kv_cache_gib: float = 4.0,
        log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO",
        batch_invariant: bool = False,
    ) -> None:
        if kv_cache_gib <= 0:
            raise UserError(f"kv_cache_gib is {kv_cache_gib}: it must be more than 0.")
        self.kv_cache_gib = kv_cache_gib
        self.log_level = log_level
        self.batch_invariant = batch_invariant
        self._engine: _Engine | None = None

    def start(self, model: Path, *, device: torch.device, context: int, log: Path) -> None:
        """See ``Sampler``; the engine starts in the background, and whoever needs it first waits."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed: install it with ./setup.sh, or go without it by "
                "--sampler TransformersSampler."
            )
        if self.batch_invariant:
            _check_batch_invariance(device)
        self.close()
        self._model = model.resolve()
        self._tensors = tensor_shapes(self._model)
        self._vocabulary = read_config(self._model).get("vocab_size")
        self._device, self._context, self._log = device, context, log.resolve()
        self._options = {
            "dtype": model_dtype(self._model),
            "context": context,
            "kv_cache_bytes": int(self.kv_cache_gib * _GIB),
            "device": device.type,
        }
        self._engine = self._launch()

    def load(self, model: Path) -> None:
        """See ``Sampler``; refuses a folder whose tensors are not those of the one given to ``start``.

        An engine that is started again, or woken after ``release``, reads the folder again.
        """
        model = model.resolve()
        if model == self._model:
            return
        check_same_tensors(self._tensors, model)
        self._model = model
        self._tell("load", str(model))

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        """See ``Sampler``. Leaving the iterator early ends the engine; the next call starts another."""
        check_requests(requests, sampling, self._context, self._vocabulary)
        self.prefix_hits = None
        return self._sample(dict(enumerate(requests)), sampling, list(stop_ids))

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See ``Sampler``; the engine computes them afresh, whatever its prefix cache holds."""
        check_sequences(sequences, self._context, self._vocabulary)
        found = dict(self._ask(lambda: ("log_probabilities", [list(ids) for ids in sequences])))
        return [found[i] for i in range(len(sequences))]

    def release(self) -> None:
        """See ``Sampler``; on CPU there is nothing to give back."""
        if self._engine is not None and self._device.type != "cpu":
            self._tell("release")

    def close(self) -> None:
        """See ``Sampler``."""
        if self._engine is not None:
            self._engine.kill()
            self._engine = None

    def _sample(
        self, missing: dict[int, Request], sampling: Sampling, stop_ids: list[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        cached = prompts = 0
        answers = self._ask(lambda: ("sample", list(missing.items()), asdict(sampling), stop_ids))
        for i, draws, from_cache in answers:
            cached += from_cache
            prompts += len(missing.pop(i).prompt_ids)
            self.prefix_hits = cached / prompts
            yield i, draws

    def _tell(self, *message: object) -> None:
        deque(self._ask(lambda: message), maxlen=0)

    def _ask(self, message: Callable[[], tuple[object, ...]]) -> Iterator[tuple[Any, ...]]:
        """The worker's answers. If it dies on the way another gets the message, made anew, and goes on."""
        replaced = False
        while True:
            try:
                if self._engine is None:
                    self._engine = self._launch()
                for answer in self._engine.ask(*message()):
                    replaced = False
                    yield answer
                return
            except EngineDied as death:
                self.close()
                if replaced:
                    raise UserError(
                        f"The sampling engine died twice in a row ({death}; what it said is in {self._log}): "
                        f"if memory ran out, lower kv_cache_gib (now {self.kv_cache_gib:g}); "
                        "the same command goes on where it stopped."
                    ) from death
                replaced = True
                _logger.warning("The sampling engine died (%s; see %s): starting another.", death, self._log)
            except EngineFailed as failure:
                self.close()
                advice = self._advice(str(failure))
                raise UserError(
                    f"The sampling engine failed ({failure}; more in {self._log}).{advice}"
                ) from failure
            except BaseException:  # also a caller that went away: the answers left in the pipe are nobody's
                self.close()
                raise

    def _advice(self, failure: str) -> str:
        if "memory" not in failure.lower():
            return ""
        too_small = "at least one request" in failure or "No available memory for the cache" in failure
        verb = "Raise" if too_small else "Lower"
        return f" {verb} kv_cache_gib (now {self.kv_cache_gib:g})."

    def _launch(self) -> _Engine:
        environment = _environment(self._device) | {
            "VLLM_LOGGING_LEVEL": self.log_level,
            # Written down either way, so that the config decides and not the user's shell.
            "VLLM_BATCH_INVARIANT": str(int(self.batch_invariant)),
        }
        return _Engine({"model": str(self._model), **self._options}, environment, self._log)


class _Engine:
    """One life of the worker process."""

    def __init__(self, options: dict[str, object], environment: dict[str, str], log: Path) -> None:
        self._pipe, theirs = Pipe()
        worker = ("-P", "-m", "stasc.sampling.vllm_worker", str(theirs.fileno()), str(os.getpid()))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *worker, json.dumps(options)],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        theirs.close()  # or its death would not be the end of the pipe

    def ask(self, *message: object) -> Iterator[tuple[Any, ...]]:
        """Send one message and yield the answers until the worker is done with it."""
        with suppress(OSError):  # a dead worker may have left the reason in the pipe
            self._pipe.send(message)
        while (answer := self._receive()) is not None:
            yield answer

    def _receive(self) -> tuple[Any, ...] | None:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.kill()
            raise EngineDied(f"exit status {self._process.returncode}") from error
        if isinstance(answer, str):
            raise EngineFailed(answer)
        return answer

    def kill(self) -> None:
        """End the worker and whatever it started.

        It keeps nothing that would be lost, and to end by itself it takes seconds.
        """
        if self._process.returncode is None:  # not waited for, so the number is still its own
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._pipe.close()


def _check_batch_invariance(device: torch.device) -> None:
    if device.type == "cpu":
        raise UserError(
            "batch_invariant is for CUDA devices: leave it out. On the CPU draws in float32 do not depend on "
            "the batch anyway, and for bfloat16 vLLM has no such mode there."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise UserError(
            "batch_invariant needs a CUDA device of compute capability 8.0 or more, and this one's is "
            f"{capability[0]}.{capability[1]}: leave it out."
        )


def _environment(device: torch.device) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_SCRUBBED)}
    environment |= {
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's own processes outlive ours, and hang when one dies
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if device.type == "cpu":
        # Training waits while the engine samples, so it may have as many threads, if they do not spin.
        return environment | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            # All that would be compiled is a count beside prompt_logprobs, for which each engine would call
            # a C++ compiler for half a minute. The model runs eagerly either way.
            "TORCH_COMPILE_DISABLE": "1",
        }
    index = torch.cuda.current_device() if device.index is None else device.index
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return environment | {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
