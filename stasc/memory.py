"""What training and the engine take of the device that they share, and what is left for the engine's cache.

On a GPU they take turns. While the model trains, the engine sleeps and holds no more than its CUDA context,
so activations and gradients compete with nothing and have no part in this. While the engine samples, training
holds what outlives a step: weights, both moments of Adam and, under DDP, the buckets of the gradients. When
the engine starts, these are not there yet: the model is loaded meanwhile, and Adam's moments come with the
first step. So they are not measured but follow from shapes, and only what the device has free before all that
is measured. A restart, which finds the moments in a checkpoint, computes the same.

On a CPU the engine cannot sleep: its memory and that of a training step are there at the same time.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from stasc.errors import UserError

GIB = 1 << 30

_WORKING = 4 * GIB
"""Estimate of what an engine takes on a GPU beside weights, cache and logits: its CUDA context, CUDA graphs,
activations of some thousand tokens, and what fragmentation and the trainer's libraries (as NCCL) take."""

_LOGIT = 20
"""Bytes of a logit: scores and probabilities in float32, and both sorted, with int64 indices, for top_p."""


def ran_out(error: BaseException) -> str | None:
    """One sentence for memory that was asked for and was not there; None for other errors."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in reason:
        return None
    return (
        f"memory ran out ({reason.rpartition('DefaultCPUAllocator: ')[2][:150]}): lower "
        "data.batches.token_budget if it was training, or sampler.kv_cache_gib, and run the same command "
        "again to go on; docs/training.md has what else helps."
    )


def training_bytes(frozen: int, trained: int, *, shards: int = 1, gradients: bool = False) -> int:
    """Bytes that training holds on a device between two optimiser steps: 4 a number, as all are float32.

    Args:
        frozen: Weights that do not train.
        trained: Weights that do.
        shards: Devices that share one copy of it all.
        gradients: Whether gradients stay too, as they do in DDP's buckets.
    """
    return 4 * (frozen + trained * (4 if gradients else 3)) // shards


def engine_share(device: torch.device, training: int, processes: int) -> int:
    """Bytes that one engine may take of the memory that is free now, before its trainer has loaded a model.

    Args:
        device: Where both are.
        training: What training will hold there while the engine has its memory.
        processes: Training processes of this machine, each with an engine, which share the memory of a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - training
    # Half of it stays for activations, for writing M_n, and for other programs.
    return (_free_on_machine() // processes - training) // 2


def cache_bytes(
    share: int,
    *,
    alone: int,
    weights: int,
    vocabulary: int,
    token: int,
    sequences: int,
    context: int,
    device: str,
) -> int:
    """Size of a key-value cache that fits, and is no larger than the engine can use.

    Args:
        share: Bytes that the engine may take in all.
        alone: What it could take if training held nothing there.
        weights: Bytes of its weights.
        vocabulary: Number of logits of a token.
        token: Bytes of a token in the cache.
        sequences: Completions that the engine runs at the same time.
        context: Tokens of the longest of them.
        device: Type of the device, ``cpu`` or ``cuda``.

    Raises:
        UserError: Not even one sequence fits.
    """
    working = sequences * vocabulary * _LOGIT + (_WORKING if device == "cuda" else 0)
    size = min(share - weights - working, sequences * context * token)
    if size < context * token:
        needed = weights + working + context * token
        advice = (
            "Divide the model among more GPUs (FSDPStrategy), train adapters (model.lora), or set "
            "sampler.kv_cache_gib yourself."
        )
        if needed > alone:
            advice = (
                "An engine holds the whole model on one device (there is no tensor parallelism here): take "
                "a smaller model, or devices with more memory."
            )
        raise UserError(
            f"the memory does not suffice: training leaves {max(share, 0) / GIB:.1f} GiB to the engine, "
            f"which needs {weights / GIB:.1f} for its weights, {working / GIB:.1f} to work in and "
            f"{context * token / GIB:.1f} for one sequence of {context} tokens. {advice}"
        )
    return size


def _free_on_machine() -> int:
    """Bytes of main memory that can be had, within the limit of the container if there is one."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, limit - int(used["anon"]))
