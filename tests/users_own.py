"""What users bring along and name by its class path: a reward, a callback, samplers."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from stasc.reward import InAccuracy
from stasc.sampling import TransformersSampler


class PaysInIteration(InAccuracy):
    """In-accuracy in one iteration, which is known by counting the calls, and 0 before and after it."""

    def __init__(self, iteration: int, calls_per_iteration: int) -> None:
        super().__init__()
        self.iteration = iteration
        self.calls_per_iteration = calls_per_iteration
        self.calls = 0

    def score(self, prediction: str, references: Sequence[str]) -> float:
        iteration = self.calls // self.calls_per_iteration + 1
        self.calls += 1
        return super().score(prediction, references) if iteration == self.iteration else 0.0


class Kill(Callback):
    """kill -9 in a hook of Lightning, after so many training epochs."""

    def __init__(self, hook: str, epochs_done: int) -> None:
        self.epochs_done = epochs_done
        setattr(self, hook, self._kill)

    def _kill(self, trainer: Trainer, *_: object) -> None:
        if trainer.datamodule.epochs_done == self.epochs_done:
            os.kill(os.getpid(), signal.SIGKILL)


class KeepsABatch(Callback):
    """Writes the tokens of the last batch to ``default_root_dir``."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.save(batch.input_ids, Path(trainer.default_root_dir) / "batch.pt")


class StaleSampler(TransformersSampler):
    """Says that it took the new weights, and samples from the old ones."""

    def load(self, model: Path) -> None:
        return None
