"""The outer loop of Algorithm 1 inside one ``fit``: what an iteration trains, and M_n at its end."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from data import TrajectoryDataModule
from stasc.errors import UserError
from stasc.module import CorrectionSFT
from stasc.pretrained import gather_weights, load_weights, log_probabilities, write_model
from stasc.probe import Probe
from stasc.run import write_json


class OuterLoop(Callback):
    """Turns the epochs of one ``fit`` into the iterations of the algorithm.

    At the start of an iteration the base model is put in place (M_0 for Fixed fine-tuning; for Evolving
    M_{n-1} simply stays), with a fresh optimiser and a schedule as long as D_n is. At its end M_n is
    written as a Hugging Face folder. If D_n is empty, M_n is the base model.
    """

    def __init__(self) -> None:
        self.prepared = 0
        """The iteration whose base model, optimiser and schedule are in place."""
        self.losses: list[float] = []
        """Mean loss of each epoch of that iteration."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume between two epochs of an iteration needs."""
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``state_dict`` gave it."""
        self.losses = state_dict["losses"]

    def setup(self, trainer: Trainer, pl_module: CorrectionSFT, stage: str) -> None:
        """Keep Lightning's own validation loop out: M_n is evaluated where the sampler holds it."""
        if stage != "fit":
            return
        trainer.limit_val_batches = 0
        if trainer.reload_dataloaders_every_n_epochs != 1:
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs must stay 1: every iteration has its own D_n."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Step 4 begins: base model by policy, fresh optimiser and schedule."""
        data: TrajectoryDataModule = trainer.datamodule
        data.sampler.release()
        torch.manual_seed(data.epoch_seed)
        pl_module.train()
        self.prepared = data.iteration
        steps = trainer.train_dataloader.dataset.steps if data.dataset else 1
        pl_module.iteration_steps = steps * data.algorithm.epochs
        if data.epochs_done % data.algorithm.epochs:
            return
        base = data.algorithm.base_model(self.prepared)
        if base != self.prepared - 1:  # those of M_{n-1} are in place
            load_weights(trainer.strategy.model, data.model_folder(base), pl_module.lora)
        trainer.strategy.setup_optimizers(trainer)
        self.losses = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: CorrectionSFT, batch: Any, batch_idx: int
    ) -> None:
        """Guard against a resume that would train without the start of its iteration."""
        if self.prepared != trainer.datamodule.iteration:
            raise RuntimeError(
                f"iteration {trainer.datamodule.iteration} would train what was prepared for {self.prepared}"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Step 4 ends: after the last epoch of iteration n, M_n is written."""
        data: TrajectoryDataModule = trainer.datamodule
        if data.dataset:
            self.losses.append(pl_module.epoch_loss.compute().item())
            pl_module.epoch_loss.reset()
        if data.epochs_done % data.algorithm.epochs:
            return
        n = self.prepared
        if not data.dataset:
            base = data.algorithm.base_model(n)
            trainer.print(f"iteration {n}: D_{n} is empty, so M_{n} is M_{base}.", flush=True)
        if data.missing(data.run.iteration(n).model):
            self._write_model(trainer, pl_module)
        torch.cuda.empty_cache()  # the engine, another process, takes what training leaves

    def _write_model(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Write M_n, which comes last because it says that the iteration is trained."""
        data: TrajectoryDataModule = trainer.datamodule
        base, box = data.model_folder(0), data.run.iteration(self.prepared)
        weights = gather_weights(trainer.strategy.model, base, pl_module.lora)
        if trainer.is_global_zero:
            fitted = {
                "loss": sum(self.losses) / len(self.losses) if self.losses else None,
                "learning_rate": pl_module.learning_rate if self.losses else 0.0,
                "steps": pl_module.iteration_steps if self.losses else 0,
            }
            write_json(box.training, {**data.learnt_from, "training": fitted})
            sequences = data.probe_sequences
            Probe(sequences, log_probabilities(weights, base, sequences)).write(box.probe)
            write_model(weights, base, box.model)
        trainer.strategy.barrier("M_n is written")
