"""How far a fine-tuning is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from stasc.progress import Progress


class TrainingProgress(ProgressBar):
    """Shows the optimiser steps of each fine-tuning, in place of Lightning's bar."""

    def __init__(self) -> None:
        super().__init__()
        self.stage: Progress | None = None

    def disable(self) -> None:
        """Do nothing: of several processes the first one speaks anyway."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """The fine-tuning begins, unless D_n is empty; or another on-policy update."""
        data, epochs = trainer.datamodule, trainer.datamodule.experiment.algorithm.epochs
        if data.experiment.on_policy:
            if data.epochs_done % epochs == 0:
                self.stage = Progress(f"iteration {data.iteration}: updates", epochs)
            return
        title = f"iteration {data.iteration}: training steps"
        if epochs > 1:
            title += f", epoch {data.epochs_done % epochs + 1} of {epochs}"
        self.stage = Progress(title, data.steps) if data.steps else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is done, and perhaps a step."""
        if self.stage and not trainer.datamodule.experiment.on_policy and batch.ends_step:
            metrics = trainer.progress_bar_metrics.items()
            note = ", ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in metrics)
            self.stage.update(1, note)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        """The fine-tuning is done; or one of the updates of an iteration."""
        data = trainer.datamodule
        if data.experiment.on_policy:
            ends = data.epochs_done % data.experiment.algorithm.epochs == 0
            rewards = data.experiment.updates.last_rewards()
            note = data.clock.shares() if ends else f"r(Y1) {rewards['r1']:.3f}, r(Y2) {rewards['r2']:.3f}"
            self.stage.update(1, note)
            if not ends:
                return
        if self.stage:
            self.stage.finish()

    def on_exception(self, *args: Any) -> None:
        """Remove the bar before the error is printed."""
        if self.stage:
            self.stage.close()
