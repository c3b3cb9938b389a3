"""Sampling with vLLM.

vLLM runs in a worker process (``vllm_worker.py``) and is never imported into the training process.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from stasc import processes
from stasc.errors import UserError
from stasc.memory import GIB, cache_bytes, engine_share
from stasc.model_folder import ModelFolder
from stasc.run import NEVER, FirstUses
from stasc.sampling.base import Draw, Request, Sampler, Sampling, check_requests, check_sequences

_logger = logging.getLogger(__name__)

# Variables that a launcher sets for the training process, and that vLLM would apply to itself.
_REMOVED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_", "ROLE_")
_REMOVED_VARIABLES += ("MASTER_", "TORCHELASTIC_", "LD_PRELOAD", "VLLM_CPU_KVCACHE_SPACE")
_REMOVED_VARIABLES += ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # it works offline


class EngineDied(RuntimeError):
    """The worker process ended without reporting an error."""


class EngineFailed(RuntimeError):
    """The worker process ended with an exception; this is its message."""


class VLLMSampler(Sampler):
    """Samples with vLLM, in one worker process for each training process.

    A worker that dies (killed, out of memory) is replaced, and only the unfinished requests are sampled
    again. The worker also ends when the thread that called ``start`` ends, so call it from the main thread.
    ``release`` frees GPU memory; on CPU the engine keeps its weights and key-value cache.

    Args:
        kv_cache_gib: Size of the key-value cache in GiB, in addition to the weights. A larger cache lets more
            completions run at the same time. ``auto`` is what fits beside training, up to what the engine can
            use (``stasc/memory.py``).
        log_level: Level of vLLM's log file.
        batch_invariant: Make draws independent of the batch in every precision, at some cost in speed; needs
            a CUDA device of compute capability 8.0 or more. Without it some draws depend on the batch.
    """

    first_uses: ClassVar[FirstUses] = {
        "kv_cache_gib": NEVER,
        "log_level": NEVER,
        "batch_invariant": NEVER,
    }

    def __init__(
        self,
        kv_cache_gib: float | Literal["auto"] = "auto",
        log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO",
        batch_invariant: bool = False,
    ) -> None:
        if kv_cache_gib != "auto" and kv_cache_gib <= 0:
            raise UserError(f"kv_cache_gib is {kv_cache_gib}: it must be more than 0, or auto.")
        self.kv_cache_gib = kv_cache_gib
        self.log_level = log_level
        self.batch_invariant = batch_invariant
        self._engine: _Engine | None = None

    @property
    def identity(self) -> str:
        """See ``Sampler``; contains ``batch_invariant`` if that is set."""
        return f"{super().identity} batch_invariant" if self.batch_invariant else super().identity

    def start(self, model: Path, *, device: torch.device, context: int, log: Path) -> None:
        """See ``Sampler``; the engine starts in the background, and the first call that needs it waits."""
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed: install it with ./setup.sh, or use "
                "--sampler TransformersSampler instead."
            )
        if self.batch_invariant:
            _check_batch_invariance(device)
        self.close()
        self._model = model.resolve()
        folder = ModelFolder(self._model)
        self._tensors = folder.tensor_shapes()
        self._vocabulary = folder.config.get("vocab_size")
        self._device, self._context, self._log = device, context, log.resolve()
        self._options = {
            "dtype": folder.dtype,
            "context": context,
            "sequences": _sequences(device),
            "kv_cache_bytes": self._cache_bytes(folder, device, context),
            "device": device.type,
        }
        self._dtype = self._options["dtype"]
        self._engine = self._launch()

    def wait(self) -> None:
        """See ``Sampler``."""
        self._command("load", str(self._model))

    def load(self, model: Path) -> None:
        """See ``Sampler``; refuses a folder whose tensors differ from those of the first folder.

        An engine that is restarted, or used again after ``release``, reads the folder again.
        """
        model = model.resolve()
        if model == self._model:
            return
        ModelFolder(model).check_same_tensors(self._tensors)
        self._model = model
        self._command("load", str(model))

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        """See ``Sampler``. Closing the iterator early stops the engine; the next call starts a new one."""
        check_requests(requests, sampling, self._context, self._vocabulary)
        self.prefix_hits = None
        return self._sample(dict(enumerate(requests)), sampling, list(stop_ids))

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See ``Sampler``; these requests do not read the prefix cache."""
        check_sequences(sequences, self._context, self._vocabulary)
        results = dict(self._call(lambda: ("log_probabilities", [list(ids) for ids in sequences])))
        return [results[i] for i in range(len(sequences))]

    def release(self) -> None:
        """See ``Sampler``; does nothing on CPU."""
        if self._engine is not None and self._device.type != "cpu":
            self._command("release")

    def close(self) -> None:
        """See ``Sampler``."""
        if self._engine is not None:
            self._engine.kill()
            self._engine = None

    def _sample(
        self, unfinished: dict[int, Request], sampling: Sampling, stop_ids: list[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        cached_tokens = prompt_tokens = 0
        answers = self._call(lambda: ("sample", list(unfinished.items()), asdict(sampling), stop_ids))
        for i, draws, num_cached_tokens in answers:
            cached_tokens += num_cached_tokens
            prompt_tokens += len(unfinished.pop(i).prompt_ids)
            self.prefix_hits = cached_tokens / prompt_tokens
            yield i, draws

    def _command(self, *message: object) -> None:
        deque(self._call(lambda: message), maxlen=0)

    def _call(self, message: Callable[[], tuple[object, ...]]) -> Iterator[tuple[Any, ...]]:
        """Send a message to the worker and yield its answers.

        If the worker dies, a new one gets the message, which is built again: of a ``sample`` call it then
        holds only the unfinished requests.
        """
        torch.cuda.empty_cache()  # what training and its checkpoints have left, the engine may need
        replaced = False
        while True:
            try:
                if self._engine is None:
                    self._engine = self._launch()
                for answer in self._engine.call(*message()):
                    replaced = False
                    yield answer
                return
            except EngineDied as death:
                self.close()
                if replaced:
                    raise UserError(
                        f"The sampling engine died twice in a row ({death}; see {self._log}): if memory ran "
                        f"out, lower kv_cache_gib (now {self._size}); run the same command again to resume."
                    ) from death
                replaced = True
                _logger.warning(
                    "The sampling engine died (%s; see %s): starting a new one.", death, self._log
                )
            except EngineFailed as failure:
                self.close()
                advice = self._advice(str(failure))
                raise UserError(
                    f"The sampling engine failed ({failure}; see {self._log}).{advice}"
                ) from failure
            except BaseException:  # GeneratorExit included: unread answers would be left in the pipe
                self.close()
                raise

    def _advice(self, failure: str) -> str:
        if "No space left" in failure:
            place = tempfile.gettempdir()
            return f" Make room in /dev/shm (of a container: --shm-size) or in {place} (TMPDIR)."
        if "memory" not in failure.lower():
            return ""
        too_small = "at least one request" in failure or "No available memory for the cache" in failure
        verb = "Raise" if too_small else "Lower"
        return f" {verb} kv_cache_gib (now {self._size})."

    @property
    def _size(self) -> str:
        """The size of the cache, as messages have it."""
        chosen = self._options["kv_cache_bytes"] / GIB
        return f"auto, {chosen:.2f}" if self.kv_cache_gib == "auto" else f"{self.kv_cache_gib:g}"

    def _cache_bytes(self, folder: ModelFolder, device: torch.device, context: int) -> int:
        if self.kv_cache_gib != "auto":
            return int(self.kv_cache_gib * GIB)
        token, sequences = folder.cache_bytes_per_token(), _sequences(device)
        alone = engine_share(device, 0, 1)
        size = cache_bytes(
            alone if self.memory is None else self.memory,
            alone=alone,
            weights=folder.weight_bytes(),
            vocabulary=self._vocabulary or 0,
            token=token,
            sequences=sequences,
            context=context,
            device=device.type,
        )
        if processes.rank() == 0:
            full = size // (context * token)
            print(
                f"key-value cache of {size / GIB:.1f} GiB: {full} of the {sequences} completions that the "
                f"engine runs at the same time have room at their full length of {context} tokens",
                flush=True,
            )
        return size

    def _launch(self) -> _Engine:
        environment = _environment(self._device) | {
            "VLLM_LOGGING_LEVEL": self.log_level,
            # Always set, so that the config overrides the user's environment.
            "VLLM_BATCH_INVARIANT": str(int(self.batch_invariant)),
        }
        return _Engine({"model": str(self._model), **self._options}, environment, self._log)


class _Engine:
    """One worker process and the pipe to it."""

    def __init__(self, options: dict[str, object], environment: dict[str, str], log: Path) -> None:
        self._pipe, worker_pipe = Pipe()
        worker = ("-P", "-m", "stasc.sampling.vllm_worker", str(worker_pipe.fileno()), str(os.getpid()))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *worker, json.dumps(options)],
                env=environment,
                pass_fds=[worker_pipe.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        worker_pipe.close()  # a copy of the worker's end would hide its death: recv() would never see EOF

    def call(self, *message: object) -> Iterator[tuple[Any, ...]]:
        """Send one message and yield the answers to it."""
        with suppress(OSError):  # a dead worker may have left its error message in the pipe
            self._pipe.send(message)
        while (answer := self._receive()) is not None:
            yield answer

    def _receive(self) -> tuple[Any, ...] | None:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.kill()
            status = self._process.returncode
            memory = ", as when Linux has no memory left" if status == -signal.SIGKILL else ""
            raise EngineDied(f"exit status {status}{memory}") from error
        if isinstance(answer, str):
            raise EngineFailed(answer)
        return answer

    def kill(self) -> None:
        """Kill the worker and all processes that it started.

        It has no state to save, and a regular shutdown takes seconds.
        """
        if self._process.returncode is None:  # not reaped yet, so its process id cannot have been reused
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._pipe.close()


def _sequences(device: torch.device) -> int:
    """Completions that run at the same time: as many as vLLM's own default for batches."""
    if device.type == "cpu":
        return 256
    found = torch.cuda.get_device_properties(device)
    large = found.total_memory >= (160 if "A100" in found.name else 70) * GIB
    return 1024 if large else 256


def _check_batch_invariance(device: torch.device) -> None:
    if device.type == "cpu":
        raise UserError(
            "batch_invariant works on CUDA devices only: leave it out. On CPU, float32 draws do not depend "
            "on the batch anyway, and for bfloat16 vLLM has no such mode."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise UserError(
            "batch_invariant needs a CUDA device of compute capability 8.0 or more, and this one has "
            f"{capability[0]}.{capability[1]}: leave it out."
        )


def _places() -> list[str]:
    """Where the worker looks for modules: as here, but not in the user's folder, which may shadow any."""
    ours = Path(__file__).parents[2]
    places = [Path(entry).absolute() for entry in sys.path]  # "" is the working folder
    return [str(place) for place in places if place != Path.cwd() or place == ours]


def _environment(device: torch.device) -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_REMOVED_VARIABLES)
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join(_places()),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's processes outlive ours, and hang when one dies
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if device.type == "cpu":
        # The engine can use all threads of training, which waits meanwhile; PASSIVE keeps them from spinning.
        return environment | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
            # The model runs eagerly anyway. Compilation would only cover a count for prompt_logprobs, and
            # would run a C++ compiler for half a minute in each engine.
            "TORCH_COMPILE_DISABLE": "1",
        }
    index = torch.cuda.current_device() if device.index is None else device.index
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return environment | {
        "CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index),
        # Triton's attention would round the factors of float32 models to TF32, and the probe fail.
        "TRITON_F32_DEFAULT": "ieee",
    }
