"""Lightning's progress bar, one for each fine-tuning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class IterationProgressBar(TQDMProgressBar):
    """A bar for each fine-tuning, open only while it trains: sampling shows other bars in between."""

    def on_train_start(self, *args: Any) -> None:
        """Open no bar yet: an iteration begins with sampling."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Open a bar with the number of the iteration."""
        self.train_progress_bar = self.init_train_tqdm()
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"iteration {trainer.datamodule.iteration}: training")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar and leave it on the screen."""
        super().on_train_epoch_end(trainer, pl_module)
        self.train_progress_bar.close()

    def on_train_end(self, *args: Any) -> None:
        """Do nothing: all bars are closed already."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The logged metrics without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
