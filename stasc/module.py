"""Step 4 of Algorithm 1: fine-tuning on correction tokens alone, as a LightningModule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from stasc.errors import UserError
from stasc.likelihood import NegativeLogLikelihood
from stasc.lora import LoRA
from stasc.packing import Batch
from stasc.pretrained import load_model, locate, shell
from stasc.reward import SelfCorrection

GO_ON = 2**30
"""Accumulation at which Lightning takes no step yet; a power of two, so that scaling by it is exact."""


class CosineWithWarmup:
    """Factor of the learning rate: linear warm-up, then half a cosine down to 0.

    The first step is already above 0, so that a D_n of a single batch teaches something. An object rather
    than a closure, because only an object's state goes into a checkpoint.

    Args:
        steps: Optimiser steps in all.
        warmup_ratio: Share of them that warm up, rounded up.
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
    """One optimiser step on corrections, the same on one device, under DDP and under FSDP.

    The loss is the mean negative log-likelihood over the correction tokens of the whole optimiser step,
    whatever the number of processes and the accumulation. The optimiser is AdamW, the schedule a cosine
    with warm-up over one iteration (section 3 and appendix A of the paper).

    Args:
        base: M_0, a Hugging Face folder or hub id; ``demo`` is the embedded task's own.
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW.
        warmup_ratio: Share of an iteration's steps that warm up.
        lora: Train these adapters instead of all weights.
        gradient_checkpointing: Keep the activations between layers only, and compute those within again for
            the gradient: less memory, more time. FSDPStrategy has ``activation_checkpointing_policy`` for it.
        attention: ``auto`` is what transformers takes for the model: sdpa, where the model has it. ``flex``
            is FlexAttention, which skips what no token attends to: for CUDA and long batches.
    """

    def __init__(
        self,
        base: str,
        learning_rate: float = 7e-6,
        weight_decay: float = 0.1,
        warmup_ratio: float = 0.03,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        attention: Literal["auto", "flex"] = "auto",
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise UserError(f"model.learning_rate is {learning_rate}: it must be above 0.")
        if not 0 <= warmup_ratio <= 1:
            raise UserError(f"model.warmup_ratio is {warmup_ratio}: it must lie in [0, 1].")
        self.base = base
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.attention = attention
        self.iteration_steps = 1
        """Optimiser steps of the iteration under way; the outer loop sets it once D_n is known."""
        self.epoch_loss = MeanMetric()
        self.step_loss = 0.0
        """Mean loss of the optimiser step under way, as far as this process has got with its share."""

    def check(self, strategy: Strategy) -> None:
        """Find what M_0 or a strategy cannot do, before an engine starts or a file is written.

        Raises:
            UserError: There is no such layer for an adapter, or the strategy does it another way.
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
            self.lora.add_to(shell(locate(self.base)))

    def setup(self, stage: str) -> None:
        """Know what counts as right."""
        if stage in ("validate", "test"):
            self.self_correction = SelfCorrection(self.trainer.datamodule.algorithm.threshold)

    def configure_model(self) -> None:
        """Load M_0; only training needs it here, everything else samples through an engine."""
        if self.trainer.training and not hasattr(self, "model"):
            self.model = load_model(locate(self.base), self.lora)
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.likelihood = NegativeLogLikelihood(self.model, self.attention)
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy) and strategy.mixed_precision is None:
            # In bf16 the rotary frequencies would be off by up to 0.2 %: far positions end up elsewhere than
            # in sampling. They are buffers, which Lightning has FSDP round with the parameters.
            strategy.mixed_precision = dataclasses.replace(
                strategy.mixed_precision_config, buffer_dtype=torch.float32
            )

    def configure_optimizers(self) -> dict[str, Any]:
        """A fresh optimiser and schedule; the outer loop asks for them at the start of every iteration."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # On a CPU what PyTorch takes by itself (None) copies each weight several times. Under MixedPrecision
        # Lightning does not clip the gradients of a fused optimiser.
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
        """Find batches that M_0 cannot read before it has sampled; remember the accumulation."""
        if self.trainer.datamodule:
            self.likelihood.check(prefix_sharing=self.trainer.datamodule.prefix_sharing)
        self.accumulate = self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Batch | None, batch_idx: int) -> int | None:
        """Have Lightning step the optimiser where a step of the batches ends, as steps may differ in length.

        Skips the epoch of an empty D_n, for which the loader gives the one batch None.
        """
        if batch is None:
            return -1
        self.trainer.accumulate_grad_batches = 1 if batch.ends_step else GO_ON
        return None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the step's mean loss, scaled so that averaging over processes and
        micro-batches, as Lightning does, gives that mean.
        """
        summed = self.likelihood(batch)
        share = summed * (self.trainer.world_size / batch.step_tokens)
        self.step_loss += share.detach()
        if tokens := int(batch.counts.sum()):
            self.epoch_loss.update(summed.detach() / tokens, weight=tokens)
        if batch.ends_step:
            self.log("step/loss", self.step_loss, prog_bar=True, sync_dist=True)
            self.log("step/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
            self.step_loss = 0.0
        return share * self.trainer.accumulate_grad_batches

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Not where Lightning takes a step to begin: with a changing number of batches it does not know."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: LightningOptimizer, optimizer_closure: Callable[[], Any]
    ) -> None:
        """Drop the gradients as soon as they are used."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        """Put back the accumulation that was asked for, by which the next epoch's batches are made."""
        self.trainer.accumulate_grad_batches = self.accumulate

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all shards, for which FSDP has a method that Lightning does not call."""
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val:
            self.trainer.strategy.model.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def test_step(self, batch: Sequence[tuple[float, ...]], batch_idx: int) -> None:
        """Mean rewards and transitions, from the rewards (r1, r2, ...) of all turns of sampled answers."""
        r1, r2, *later = zip(*batch, strict=True)
        self.self_correction.update(r1, r2)
        for turn, rewards in enumerate(later, start=3):
            mean = torch.tensor(rewards, dtype=torch.float32).mean()
            self.log(f"r{turn}", mean, on_epoch=True, batch_size=len(batch), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log them over all processes."""
        for name, value in self.self_correction.compute().items():
            # The metric has synchronised it already, so averaging changes nothing but Lightning's warning.
            self.log(name, value.float(), sync_dist=True)
        self.self_correction.reset()

    def validation_step(self, batch: Sequence[tuple[float, ...]], batch_idx: int) -> None:
        """As ``test_step``."""
        self.test_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """As ``on_test_epoch_end``."""
        self.on_test_epoch_end()

    def predict_step(self, batch: Sequence[str], batch_idx: int) -> Sequence[str]:
        """The corrections; the data module has sampled them, and written both turns."""
        return batch
