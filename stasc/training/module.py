"""Step 4 of Algorithm 1 as a LightningModule: fine-tuning on the tokens of corrections."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import ShardingStrategy
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from stasc.errors import UserError
from stasc.memory import training_bytes
from stasc.model_folder import ModelFolder
from stasc.run import NEVER, START, TRAINING, FirstUses
from stasc.training.batches import Batch
from stasc.training.lora import LoRA
from stasc.training.loss import NegativeLogLikelihood, Reference
from stasc.training.weights import empty_model, load_model

ACCUMULATE_ON = 2**30
"""``accumulate_grad_batches`` with which Lightning takes no optimiser step after a batch.

A power of two, so that multiplying and dividing by it is exact.
"""


class CosineWithWarmup:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 0.

    The factor of the first step is above 0, so that a D_n of a single batch is learnt too. A class and not a
    closure, because LambdaLR saves only the state of objects in a checkpoint.

    Args:
        steps: Optimiser steps in all.
        warmup_ratio: Share of the steps that warm up; their number is rounded up.
    """

    def __init__(self, steps: int, warmup_ratio: float) -> None:
        self.steps = steps
        self.warmup = math.ceil(steps * warmup_ratio)

    def __call__(self, step: int) -> float:
        """The factor in optimiser step ``step``, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class CorrectionSFT(LightningModule):
    """Fine-tunes M_0 or M_{n-1} on D_n, with the same result on one device, under DDP and under FSDP.

    The loss of an optimiser step is the sum over its target tokens of weight times negative log-likelihood,
    divided by the number of target tokens; with all weights 1 that is the mean. On-policy it is that sum, and
    what holds the model near M_0. It does not depend on the number of processes or micro-batches. The
    optimiser is AdamW, the schedule a cosine with warm-up over one iteration (section 3 and appendix A of the
    paper) or, on-policy, over all iterations that the optimiser lasts.

    Args:
        base: M_0, a model folder or hub id; or a model that is made on first use: ``demo``, the small one of
            the built-in demo task, or ``smollm2-135m``, SmolLM2-135M-Instruct from a Python package.
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW.
        warmup_ratio: Share of an iteration's steps that warm up.
        lora: Train these adapters instead of all weights.
        gradient_checkpointing: Keep only the activations between layers, and compute those inside a layer
            again in the backward pass: less memory, more time. For FSDPStrategy set its
            ``activation_checkpointing_policy`` instead.
        attention: ``auto`` is what transformers chooses for the model: sdpa, where the model has it. ``flex``
            is FlexAttention, which skips blocks that no token attends to: for CUDA and long batches.
        template: Options of M_0's chat template, such as ``enable_thinking: false`` for Qwen3.

    Raises:
        UserError: A value is out of its range.
    """

    first_uses: ClassVar[FirstUses] = {
        "base": START,
        "learning_rate": TRAINING,
        "weight_decay": TRAINING,
        "warmup_ratio": TRAINING,
        "lora": TRAINING,
        "gradient_checkpointing": NEVER,  # this one and the next change only how results are rounded
        "attention": NEVER,
    }
    """For each option of ``__init__`` from where on it has a part in the results; START if it is not here."""

    def __init__(
        self,
        base: str,
        learning_rate: float = 7e-6,
        weight_decay: float = 0.1,
        warmup_ratio: float = 0.03,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        attention: Literal["auto", "flex"] = "auto",
        template: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < learning_rate < math.inf:
            raise UserError(f"model.learning_rate is {learning_rate}: it must be above 0, and finite.")
        if not 0 <= weight_decay < math.inf:
            raise UserError(f"model.weight_decay is {weight_decay}: it must be 0 or more, and finite.")
        if not 0 <= warmup_ratio <= 1:
            raise UserError(f"model.warmup_ratio is {warmup_ratio}: it must lie in [0, 1].")
        self.base = base
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.attention = attention
        self.template = template
        # What the system asks of training; whoever puts the parts of the program together sets it.
        self.on_policy = False
        self.stays_near_m0 = False
        self.temperature = 1.0
        """That at which the answers were drawn, if it is on-policy."""
        self.iteration_steps = 1
        """Optimiser steps of the schedule; set by the outer loop when it begins one."""
        self.epoch_loss = MeanMetric()
        self.step_loss = 0.0
        """This process' part of the current optimiser step's loss, over its micro-batches so far."""
        self.step_penalty = 0.0
        """The divergences from M_0 in it."""
        self.reference: Reference | None = None
        """M_0, if the system stays near it."""

    def check(self, strategy: Strategy) -> None:
        """Find options that do not go with M_0 or the strategy, before an engine starts or a file is written.

        Raises:
            UserError: M_0 lacks a layer that ``lora`` names, or an option does not go with the strategy.
        """
        if isinstance(strategy, FSDPStrategy) and self.gradient_checkpointing:
            raise UserError(
                "model.gradient_checkpointing is not for FSDPStrategy, which has a way of its own: "
                "set trainer.strategy.init_args.activation_checkpointing_policy instead."
            )
        if isinstance(strategy, FSDPStrategy) and self.lora and not strategy.kwargs["use_orig_params"]:
            raise UserError(
                "model.lora trains part of the weights, for which FSDPStrategy needs use_orig_params: "
                "remove it from trainer.strategy.dict_kwargs, or set it to true."
            )
        if self.attention == "flex" and strategy.root_device.type == "cpu":
            raise UserError("model.attention is flex, which cannot train on a CPU: set it to auto.")
        if self.lora:
            self.lora.add_to(empty_model(ModelFolder.locate(self.base).path))

    def training_bytes(self) -> int:
        """Bytes that training holds on this process' device while the engine has its memory there.

        Only the two strategies that the configs have are known; for another one set the engine's cache.
        """
        strategy, trainer = self.trainer.strategy, self.trainer
        shards = 1
        if isinstance(strategy, FSDPStrategy):
            a_copy_in = {
                ShardingStrategy.NO_SHARD: 1,
                ShardingStrategy.HYBRID_SHARD: trainer.num_devices,
                ShardingStrategy._HYBRID_SHARD_ZERO2: trainer.num_devices,
            }
            shards = a_copy_in.get(strategy.sharding_strategy, trainer.world_size)
        model = empty_model(ModelFolder.locate(self.base).path)
        if self.lora:
            self.lora.add_to(model)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        copy_of_m0 = sum(size for size, _ in sizes) if self.stays_near_m0 and not self.lora else 0
        return training_bytes(
            frozen=sum(size for size, trains in sizes if not trains) + copy_of_m0 * shards,
            trained=sum(size for size, trains in sizes if trains),
            shards=shards,
            gradients=isinstance(strategy, DDPStrategy) or strategy.root_device.type == "cpu",
        )

    def configure_model(self) -> None:
        """Load M_0 if this is training; all else samples with an engine and needs no model here."""
        if self.trainer.training and not hasattr(self, "model"):
            self.model = load_model(ModelFolder.locate(self.base).path, self.lora)
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.loss = NegativeLogLikelihood(self.model, self.attention, self.temperature)
            if self.stays_near_m0:
                self.reference = self._reference()
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy) and strategy.mixed_precision is None:
            # Lightning has FSDP round buffers like parameters. In bf16 the rotary frequencies, which are
            # buffers, would be off by up to 0.2 %, and far tokens at other positions than in sampling.
            strategy.mixed_precision = dataclasses.replace(
                strategy.mixed_precision_config, buffer_dtype=torch.float32
            )

    def _reference(self) -> Reference:
        if self.lora:
            return Reference(self.loss, self.lora)
        # A NegativeLogLikelihood is no module, so no strategy shards its model, saves it, or trains it.
        m0 = load_model(ModelFolder.locate(self.base).path).eval().requires_grad_(False).to(self.device)
        return Reference(NegativeLogLikelihood(m0, self.attention, self.temperature))

    def configure_optimizers(self) -> dict[str, Any]:
        """A new optimiser and schedule; the outer loop asks for them at the start of every iteration."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # On a CPU PyTorch's default (None) copies each weight several times, and fused does not. But under
        # MixedPrecision Lightning cannot clip the gradients of a fused optimiser.
        strategy = self.trainer.strategy
        mixed = isinstance(strategy.precision_plugin, MixedPrecision)
        fused = True if strategy.root_device.type == "cpu" and not mixed else None
        optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused
        )
        schedule = CosineWithWarmup(self.iteration_steps, self.warmup_ratio)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Find out before any sampling that M_0 does not support the batches; remember the accumulation.

        Raises:
            UserError: The batches share prefixes, and M_0 does not support that.
        """
        if self.trainer.datamodule:
            self.loss.check(prefix_sharing=self.trainer.datamodule.batches.prefix_sharing)
        self.accumulate = self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Batch | None, batch_idx: int) -> int | None:
        """Have Lightning take an optimiser step after the last micro-batch of a step, and only then.

        Steps may have different numbers of micro-batches, for which Lightning has no option. An empty D_n
        comes as the single batch None, at which the epoch is skipped.
        """
        if batch is None:
            return -1
        self.trainer.accumulate_grad_batches = 1 if batch.ends_step else ACCUMULATE_ON
        return None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's part of the step's loss.

        It is scaled up so that Lightning's average over processes and micro-batches gives the step's loss.
        """
        summed = self.loss(batch, self.reference)
        divisor = 1 if self.on_policy else batch.step_tokens
        scale = self.trainer.world_size / divisor
        share = summed * scale
        self.step_loss += share.detach()
        self.step_penalty += self.loss.penalty * scale
        if batch.ends_step:
            self.epoch_loss.update(self.step_loss, weight=divisor)
            self.log("step/loss", self.step_loss, prog_bar=True, sync_dist=True)
            if batch.kls is not None:
                self.log("step/kl_penalty", self.step_penalty, sync_dist=True)
            self.log("step/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
            self.step_loss = self.step_penalty = 0.0
        return share * self.trainer.accumulate_grad_batches

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing, as ``optimizer_step`` clears the gradients.

        Lightning calls this where it thinks that a step begins, which is wrong when steps differ in length.
        """

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: LightningOptimizer, optimizer_closure: Callable[[], Any]
    ) -> None:
        """Take the step, and free the gradients right after it."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        """Restore the user's accumulation, which the data module reads to make the next epoch's batches."""
        self.trainer.accumulate_grad_batches = self.accumulate

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients; under FSDP with its own method, which takes the norm over all shards.

        Lightning does not call that method.
        """
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val:
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def test_step(self, batch: Mapping[str, float], batch_idx: int) -> None:
        """Log metrics that the data module has computed over all processes."""
        self.log_dict(dict(batch), batch_size=1)  # not synchronised: all processes have the same values

    def validation_step(self, batch: Mapping[str, float], batch_idx: int) -> None:
        """As ``test_step``."""
        self.test_step(batch, batch_idx)

    def predict_step(self, batch: Sequence[str], batch_idx: int) -> Sequence[str]:
        """The corrections, which the data module has sampled and written to a file."""
        return batch
