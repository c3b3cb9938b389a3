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
        """The fine-tuning begins, unless D_n is empty."""
        data, epochs = trainer.datamodule, trainer.datamodule.experiment.algorithm.epochs
        title = f"iteration {data.iteration}: training steps"
        if epochs > 1:
            title += f", epoch {data.epochs_done % epochs + 1} of {epochs}"
        self.stage = Progress(title, data.steps) if data.steps else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is done, and perhaps a step."""
        if self.stage and batch.ends_step:
            metrics = trainer.progress_bar_metrics.items()
            note = ", ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in metrics)
            self.stage.update(1, note)

    def on_train_epoch_end(self, *args: Any) -> None:
        """The fine-tuning is done."""
        if self.stage:
            self.stage.finish()

    def on_exception(self, *args: Any) -> None:
        """Remove the bar before the error is printed."""
        if self.stage:
            self.stage.close()
