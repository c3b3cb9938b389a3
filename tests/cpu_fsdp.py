"""FSDPStrategy on CPU processes, which Lightning 2.6 reserves for GPUs: what the tests need of it.

Lightning checks for the exact class, so a subclass passes. It hands FSDP the device's index, which a CPU
does not have, and FSDP's way to gather a full state dict moves parameters to the CPU by swapping storages,
which crashes when they are there already (Lightning issues 21774, 21804, 21812, 21840). FSDP gathers both
moments of Adam in the same memory, and copies each to the CPU, which on a CPU is no copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, _optim_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle

_unflatten = _optim_utils._unflatten_orig_param_states


def _unflatten_copies(*arguments: Any) -> None:
    """With ``cpu_offload`` off, which comes last, it copies."""
    _unflatten(*arguments[:-1], False)


class CPUFSDPStrategy(FSDPStrategy):
    """FSDPStrategy with the device itself instead of its index."""

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        FlatParamHandle.to_cpu = lambda handle: nullcontext()
        _optim_utils._unflatten_orig_param_states = _unflatten_copies
        wrapped = FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        yield
