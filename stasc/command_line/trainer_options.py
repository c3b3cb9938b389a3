"""Options of Lightning's Trainer that have no place here, or no sense, found before anything starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from stasc.errors import UserError

_EPOCHS = "how long a run trains follows from algorithm.iterations and algorithm.epochs"
_WHOLE = (
    "every iteration learns all of D_n; for a small run lower algorithm.iterations or the questions' size"
)
_EVALUATION = "the models are evaluated as data.evaluation says"
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "max_time"), ((None,), _EPOCHS)),
    "max_steps": ((-1,), _EPOCHS),
    "limit_train_batches": ((None, 1.0), _WHOLE),
    "overfit_batches": ((0, 0.0), _WHOLE),
    "fast_dev_run": ((False, 0), _WHOLE),
    **dict.fromkeys(
        ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval"),
        ((None, 1.0), _EVALUATION),
    ),
    "check_val_every_n_epoch": ((1,), _EVALUATION),
    "num_sanity_val_steps": ((0,), _EVALUATION),
    "reload_dataloaders_every_n_epochs": ((1,), "every iteration has its own D_n"),
    "use_distributed_sampler": ((False,), "data.batches deals the steps out"),
    "enable_checkpointing": ((None, True), "a run that was killed goes on from its checkpoint"),
    "barebones": ((False,), "a run without curves and checkpoints could not go on"),
}
"""Options that are not for the user to set: the values that they may have, and why no others."""

_CALLBACKS = {
    "ModelCheckpoint": _FIXED["enable_checkpointing"][1],
    "OnExceptionCheckpoint": _FIXED["enable_checkpointing"][1],
    "Timer": _EPOCHS,
    "GradientAccumulationScheduler": "set trainer.accumulate_grad_batches",
    "BatchSizeFinder": "set data.batches",
    "LearningRateFinder": "set model.learning_rate",
    "StochasticWeightAveraging": "M_n has the weights that training ends with",
    "WeightAveraging": "M_n has the weights that training ends with",
    "EMAWeightAveraging": "M_n has the weights that training ends with",
}
"""Callbacks of Lightning's that are not for the user to name, and why."""

_LEAST = {"accumulate_grad_batches": 1, "num_nodes": 1, "log_every_n_steps": 0, "gradient_clip_val": 0}
"""The least values of options that are numbers; Lightning takes others without a word."""


def check_trainer_options(trainer: Mapping[str, Any]) -> None:
    """Find values that would cut a run short, learn nothing, or that this machine does not have.

    Args:
        trainer: The options as parsed, by their names.

    Raises:
        UserError: There is one.
    """
    for name, (allowed, reason) in _FIXED.items():
        value = trainer[name]
        if not any(
            value == one and type(value) is type(one) for one in allowed
        ):  # 1 is a batch, 1.0 all of them
            raise UserError(f"trainer.{name} is {value}, which is not for you to set: {reason}.")
    for name, least in _LEAST.items():
        value = trainer[name]
        if value is not None and not least <= value < math.inf:  # nan is refused, too
            raise UserError(f"trainer.{name} is {value}: it must be {least} or more.")
    if trainer["precision"] in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision is {trainer['precision']}, which rounds small updates away, so that "
            "hardly anything is learnt: use bf16-mixed or 32-true."
        )
    _check_name("accelerator", trainer, ["auto", "gpu", "cpu", "cuda", "mps"])
    _check_name("strategy", trainer, ["auto", "ddp", "fsdp"], StrategyRegistry.available_strategies())
    _check_name("profiler", trainer, ["simple", "advanced", "pytorch"])
    _check_callbacks(trainer["callbacks"])
    if trainer["precision"] in ("16-mixed", "16", 16) and not _on_cuda(trainer["accelerator"]):
        raise UserError(
            f"trainer.precision is {trainer['precision']}, which a CPU does not have: use bf16-mixed or "
            "32-true."
        )
    strategy = trainer["strategy"]
    if isinstance(strategy, Mapping) and strategy.get("init_args", {}).get("state_dict_type") == "sharded":
        raise UserError(
            "trainer.strategy.init_args.state_dict_type is sharded, and a run goes on from a checkpoint in "
            "one file: set it to full, or leave it out."
        )
    _check_devices(trainer["accelerator"], trainer["devices"])


def _check_name(
    option: str, trainer: Mapping[str, Any], names: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Raise UserError for a name that is none of ``names``, nor of ``others``, which are not told."""
    value = trainer[option]
    if isinstance(value, str) and value not in (*names, *others):
        advice = f"it must be one of {', '.join(names)}"
        if "." in value:  # Lightning takes a text as a name
            advice = f"give a class as --trainer.{option}.class_path, or a name: {', '.join(names)}"
        raise UserError(f"trainer.{option} is '{value}': {advice}.")


def _check_callbacks(option: Any) -> None:
    """Raise UserError for a callback of Lightning's that would do what the run does in another way."""
    for callback in option if isinstance(option, list) else [option]:
        class_path = callback.get("class_path", "") if hasattr(callback, "get") else ""
        package, _, name = class_path.rpartition(".")
        if package.startswith("lightning") and name in _CALLBACKS:
            raise UserError(f"trainer.callbacks has {name}, which has no place here: {_CALLBACKS[name]}.")


def _on_cuda(accelerator: Any) -> bool:
    return torch.cuda.device_count() > 0 and accelerator in ("auto", "gpu", "cuda")


def _check_devices(accelerator: Any, devices: Any) -> None:
    """Raise UserError if more devices are asked for than there are, or none."""
    cuda = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and cuda == 0:
        raise UserError(
            "trainer.accelerator asks for a GPU and this machine has none that torch can use: "
            "set --trainer.accelerator cpu, --trainer.devices and --trainer.strategy."
        )
    on_cuda = _on_cuda(accelerator)
    there = cuda if on_cuda else os.cpu_count() or 1
    if str(devices) == "0" or (accelerator == "cpu" and str(devices).startswith("-")):
        raise UserError(f"trainer.devices is {devices}: give the number of devices, 1 or more.")
    asked = int(devices) if str(devices).isdecimal() else 0
    if asked > there:
        raise UserError(
            f"trainer.devices is {asked} and this machine has {there} {'GPUs' if on_cuda else 'CPU cores'}: "
            "lower --trainer.devices."
        )
