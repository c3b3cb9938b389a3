"""Step 4 of Algorithm 1 inside one ``fit``: what an iteration trains, and M_n at its end."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from data import TrajectoryDataModule
from stasc import processes
from stasc.experiment import Experiment
from stasc.progress import say
from stasc.run import write_json
from stasc.sampling.probe import Probe
from stasc.training.handover import Handover
from stasc.training.module import CorrectionSFT
from stasc.training.weights import gather_weights, load_weights, log_probabilities, write_model


class OuterLoop(Callback):
    """Turns the epochs of one ``fit`` into the iterations of the algorithm.

    At the start of an iteration the base model is put in place (M_0 for Fixed fine-tuning; for Evolving
    M_{n-1} simply stays), with a fresh optimiser and a schedule as long as D_n is. At its end M_n is written
    as a Hugging Face folder. If D_n is empty, M_n is the base model.

    On-policy an epoch is an update, after which the engine gets the weights as they are. The optimiser goes
    on over iterations, with a schedule as long as they are, until the algorithm wants a new one.

    A checkpoint has what the next epoch needs and no model folder holds: no optimiser where an iteration has
    ended, no weights where the next iteration begins with those of a folder, no frozen weights of M_0.
    """

    def __init__(self) -> None:
        self.prepared = 0
        """The iteration whose base model, optimiser and schedule are in place."""
        self.losses: list[float] = []
        """Mean loss of each epoch of that iteration."""
        self._handover: Handover | None = None

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
            pl_module.strict_loading = False  # see on_save_checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Find a place for the weights between two updates."""
        experiment: Experiment = trainer.datamodule.experiment
        if experiment.on_policy:
            self._handover = Handover(experiment.run.handover, experiment.base.path, trainer.num_nodes)

    def teardown(self, trainer: Trainer, pl_module: CorrectionSFT, stage: str) -> None:
        """Give it back."""
        if self._handover:
            self._handover.close()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Step 4 begins: base model by policy, and a fresh optimiser and schedule unless those go on."""
        data: TrajectoryDataModule = trainer.datamodule
        experiment = data.experiment
        experiment.sampler.release()
        torch.manual_seed(data.epoch_seed)
        pl_module.train()
        before, self.prepared = self.prepared, data.iteration
        data.clock.switch("training")
        if data.epochs_done % experiment.algorithm.epochs:
            return
        base = experiment.base_model(self.prepared)
        # This process has trained M_{n-1}, or has loaded M_0, or a checkpoint with the weights of M_{n-1}.
        in_place = before == base or _only_in_checkpoint(experiment, pl_module, base)
        if base != self.prepared - 1 or not in_place:
            load_weights(trainer.strategy.model, experiment.model_folder(base), pl_module.lora)
        if not _optimizer_goes_on(trainer, self.prepared):
            pl_module.iteration_steps = _schedule_steps(data, self.prepared)
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
        iteration_ends = data.epochs_done % experiment.algorithm.epochs == 0
        learns_on = experiment.on_policy or data.steps  # in this iteration
        if not (_optimizer_goes_on(trainer, n + 1) if iteration_ends else learns_on):
            # Nothing uses them any more. Lightning could not load the optimiser of an empty D_n under FSDP.
            trainer.optimizers, trainer.strategy.lr_scheduler_configs = [], []
        if experiment.on_policy:
            self._end_update(trainer, pl_module, iteration_ends=iteration_ends)
        if not iteration_ends:
            return
        if not self.losses:
            base = experiment.base_model(n)
            say(
                f"iteration {n}: D_{n} is empty, so M_{n} is M_{base}: {experiment.why_empty(n)}. Draw more "
                "(algorithm.n_init, algorithm.n_corr), raise data.sampling.temperature, take a "
                "Non-decreasing variant or a lower algorithm.threshold, or an easier task."
            )
        self._write_model(trainer, pl_module)

    def _end_update(self, trainer: Trainer, pl_module: CorrectionSFT, *, iteration_ends: bool) -> None:
        """The engine gets the weights for the next update; or the iteration's updates are written."""
        data: TrajectoryDataModule = trainer.datamodule
        if iteration_ends:
            data.experiment.updates.write(self.prepared)
        elif data.steps:
            data.clock.switch("handing over")
            folder = self._handover.give(data.epochs_done, trainer.strategy.model, pl_module.lora)
            data.experiment.take_over(folder)
        data.clock.switch(None)
        pl_module.log_dict(
            {f"step/{name}": value for name, value in data.experiment.updates.last_rewards().items()}
        )
        seconds, data.clock.last = data.clock.last, {}  # the last update of an iteration hands nothing over
        pl_module.log_dict({f"step/seconds_{name.replace(' ', '_')}": seconds[name] for name in seconds})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: CorrectionSFT, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out what is not needed to go on, or lies in a model folder."""
        data: TrajectoryDataModule = trainer.datamodule
        experiment, n = data.experiment, self.prepared
        iteration_ended = not trainer.optimizers and data.epochs_done % experiment.algorithm.epochs == 0
        if not trainer.optimizers:  # FSDPStrategy loads as many as there will be then, or none
            del checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        stays = experiment.base_model(n + 1) == n
        if iteration_ended and not (stays and _only_in_checkpoint(experiment, pl_module, n)):
            checkpoint["state_dict"] = {}
        elif pl_module.lora and _first_base(experiment, n) == 0:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weights[name] for name in weights if ".lora_" in name}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: CorrectionSFT, checkpoint: dict[str, Any]
    ) -> None:
        """Have Lightning load no optimiser where there is none: the next iteration makes its own."""
        checkpoint.setdefault("optimizer_states", [])
        checkpoint.setdefault("lr_schedulers", [])

    def _write_model(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Write M_n, which comes last because its folder marks the iteration as trained.

        If it is there already, a kill came between it and the checkpoint, and M_n was trained again. On a
        GPU that need not give the same bits, and the next iteration goes on from what is in the trainer now.
        So it is written again; nothing has followed from the first one yet.
        """
        experiment, n = trainer.datamodule.experiment, self.prepared
        files = experiment.run.iteration(n)
        weights = gather_weights(trainer.strategy.model, experiment.base.path, pl_module.lora)
        metrics = experiment.training_metrics(n)
        if trainer.is_global_zero:
            metrics["training"] = {
                "loss": sum(self.losses) / len(self.losses) if self.losses else None,
                "learning_rate": pl_module.learning_rate if self.losses else 0.0,
                "steps": len(self.losses) * max(trainer.datamodule.steps, 1),
            }
            write_json(files.training, metrics)
            sequences = experiment.probe_sequences()
            base, of_m0 = experiment.base.path, experiment.run.iteration(0).probe
            if not of_m0.exists():
                Probe(sequences, log_probabilities(None, base, sequences)).write(of_m0)
            Probe(sequences, log_probabilities(weights, base, sequences)).write(files.probe)
            write_model(weights, base, files.model, experiment.manual)
        processes.wait_for(files.model)


def _only_in_checkpoint(experiment: Experiment, module: CorrectionSFT, n: int) -> bool:
    """Whether M_n's folder lacks what would train on: it is rounded to M_0's dtype, its adapters merged."""
    return n > 0 and (module.lora is not None or experiment.base.dtype != "float32")


def _optimizer_goes_on(trainer: Trainer, n: int) -> bool:
    """Whether iteration n begins with the optimiser of the one before; not if that has taken no step."""
    algorithm = trainer.datamodule.experiment.algorithm
    if algorithm.questions_per_update is None or n > algorithm.iterations or algorithm.new_optimizer(n):
        return False
    return any(optimizer.state for optimizer in trainer.optimizers)


def _schedule_steps(data: TrajectoryDataModule, n: int) -> int:
    """Optimiser steps of a schedule that begins with iteration n."""
    algorithm = data.experiment.algorithm
    if algorithm.questions_per_update is None:
        return max(data.steps, 1) * algorithm.epochs
    later = takewhile(lambda m: not algorithm.new_optimizer(m), range(n + 1, algorithm.iterations + 1))
    return (1 + len(list(later))) * algorithm.epochs


def _first_base(experiment: Experiment, n: int) -> int:
    """The model that was put in place last when M_n trained; its successors stayed in the trainer."""
    while n > 0 and experiment.base_model(n) == n - 1:
        n -= 1
    return experiment.base_model(n) if n else 0
