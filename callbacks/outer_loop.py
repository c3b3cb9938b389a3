"""Step 4 of Algorithm 1 inside one ``fit``: what an iteration trains, and M_n at its end."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from data import TrajectoryDataModule
from stasc.progress import say
from stasc.run import write_json
from stasc.sampling.probe import Probe
from stasc.training.module import CorrectionSFT
from stasc.training.weights import gather_weights, load_weights, log_probabilities, write_model


class OuterLoop(Callback):
    """Turns the epochs of one ``fit`` into the iterations of the algorithm.

    At the start of an iteration the base model is put in place (M_0 for Fixed fine-tuning; for Evolving
    M_{n-1} simply stays), with a fresh optimiser and a schedule as long as D_n is. At its end M_n is written
    as a Hugging Face folder. If D_n is empty, M_n is the base model.
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
        """Turn Lightning's own validation loop off: M_n is evaluated where the sampler holds it."""
        if stage == "fit":
            trainer.limit_val_batches = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Step 4 begins: base model by policy, fresh optimiser and schedule."""
        data: TrajectoryDataModule = trainer.datamodule
        experiment = data.experiment
        experiment.sampler.release()
        torch.manual_seed(data.epoch_seed)
        pl_module.train()
        self.prepared = data.iteration
        pl_module.iteration_steps = max(data.steps, 1) * experiment.algorithm.epochs
        if data.epochs_done % experiment.algorithm.epochs:
            return
        base = experiment.base_model(self.prepared)
        if base != self.prepared - 1:  # those of M_{n-1} are in place
            load_weights(trainer.strategy.model, experiment.model_folder(base), pl_module.lora)
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
        experiment, n = data.experiment, self.prepared
        if data.steps:
            self.losses.append(pl_module.epoch_loss.compute().item())
            pl_module.epoch_loss.reset()
        if data.epochs_done % experiment.algorithm.epochs:
            return
        if not data.steps:
            base = experiment.base_model(n)
            say(
                f"iteration {n}: D_{n} is empty, so M_{n} is M_{base}: {experiment.why_empty(n)}. Draw more "
                "(algorithm.n_init, algorithm.n_corr), raise data.sampling.temperature, take a "
                "Non-decreasing variant or a lower algorithm.threshold, or an easier task."
            )
        if experiment.missing(experiment.run.iteration(n).model):
            self._write_model(trainer, pl_module)
        torch.cuda.empty_cache()  # the engine, another process, takes what training leaves

    def _write_model(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Write M_n, which comes last because its folder marks the iteration as trained."""
        experiment, n = trainer.datamodule.experiment, self.prepared
        files = experiment.run.iteration(n)
        weights = gather_weights(trainer.strategy.model, experiment.base.path, pl_module.lora)
        metrics = experiment.training_metrics(n)
        if trainer.is_global_zero:
            metrics["training"] = {
                "loss": sum(self.losses) / len(self.losses) if self.losses else None,
                "learning_rate": pl_module.learning_rate if self.losses else 0.0,
                "steps": pl_module.iteration_steps if self.losses else 0,
            }
            write_json(files.training, metrics)
            sequences = experiment.probe_sequences()
            Probe(sequences, log_probabilities(weights, experiment.base.path, sequences)).write(files.probe)
            write_model(weights, experiment.base.path, files.model)
        trainer.strategy.barrier("M_n is written")
