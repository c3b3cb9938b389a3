"""Lightning's progress bar in the words of the algorithm."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class IterationProgressBar(TQDMProgressBar):
    """One bar for each fine-tuning, titled by its iteration as the bars of sampling are."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Title the bar."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"iteration {trainer.datamodule.iteration}: training")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What training logs, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
