"""Every M_n on the test questions: curves over iterations, one line and one table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from data import TrajectoryDataModule
from stasc.filtering import improves
from stasc.module import CorrectionSFT
from stasc.reward import SelfCorrection
from stasc.run import Iteration, write_json
from stasc.trajectory import Trajectory, read_records

TRANSITIONS = ("wrong_to_right", "right_to_wrong", "right_to_right", "wrong_to_wrong")
SHOWN = 12
"""Trajectories in TensorBoard's table."""


class Evaluation(Callback):
    """Samples an initial answer and a correction of every test question from each M_n, M_0 included.

    M_{n-1} is evaluated at the start of iteration n, while the sampler still holds it; M_N at the end. Each
    iteration's figures go into its ``metrics.json`` and to the loggers, with the iteration as the step.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Evaluate M_{n-1}."""
        data: TrajectoryDataModule = trainer.datamodule
        if data.epochs_done % data.algorithm.epochs == 0:
            self._evaluate(trainer, data.iteration - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Evaluate M_N, show all iterations and say where everything lies.

        Not in ``on_train_end``, which a run that was killed after its last checkpoint never sees.
        """
        data: TrajectoryDataModule = trainer.datamodule
        run, last = data.run, data.algorithm.iterations
        if data.epochs_done == trainer.max_epochs:
            self._evaluate(trainer, last)
        boxes = [run.iteration(n) for n in range(last + 1)]
        if trainer.is_global_zero and all(box.metrics.is_file() for box in boxes):
            print("\n" + summary_table([json.loads(box.metrics.read_text()) for box in boxes]))
            print(f"\ncurves  tensorboard --logdir '{run.tensorboard}'")
            print(f"models  {run.iteration(1).model} to {boxes[-1].model}")

    def _evaluate(self, trainer: Trainer, n: int) -> None:
        data: TrajectoryDataModule = trainer.datamodule
        box = data.run.iteration(n)
        trajectories = data.test_trajectories(n)
        if not data.missing(box.metrics):
            return
        if trainer.is_global_zero:
            threshold = data.algorithm.threshold
            metrics = {"iteration": n, "test": scores(trajectories, threshold), **training(box, threshold)}
            for logger in trainer.loggers:
                logger.log_metrics(_curves(metrics), step=n)
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_text("test/trajectories", sample_table(trajectories), n)
                logger.save()
            write_json(box.metrics, metrics)
            print(summary_line(metrics), flush=True)
        trainer.strategy.barrier("metrics are written")


def scores(trajectories: Sequence[Trajectory], threshold: float) -> dict[str, float]:
    """Mean rewards and transitions of trajectories."""
    # All of them are on rank 0, which alone computes this: there is nothing to synchronise.
    metric = SelfCorrection(threshold, sync_on_compute=False)
    metric.update([t.r1 for t in trajectories], [t.r2 for t in trajectories])
    return {name: value.item() for name, value in metric.compute().items()}


def training(box: Iteration, threshold: float) -> dict[str, Any]:
    """What an iteration learnt from; nothing for M_0."""
    if box.n == 0:
        return {}
    kept = read_records(box.dataset)
    improving = sum(map(improves, kept))
    return {
        "train": scores(read_records(box.trajectories), threshold),
        "dataset": {"size": len(kept), "improving": improving, "non_decreasing": len(kept) - improving},
        "training": json.loads(box.training.read_text()),
    }


def _curves(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        f"{group}/{name}": value
        for group, values in metrics.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value is not None
    }


def summary_line(metrics: dict[str, Any]) -> str:
    """One iteration in one line."""
    n, test = metrics["iteration"], metrics["test"]
    # "w>r 3": three answers that were wrong became right.
    transitions = ", ".join(f"{name[0]}>{name.rpartition('_')[2][0]} {test[name]}" for name in TRANSITIONS)
    line = f"M_{n}: test r(Y1) {test['r1']:.3f}, r(Y2) {test['r2']:.3f} ({transitions})"
    if "dataset" in metrics:
        sizes, train = metrics["dataset"], metrics["train"]
        line += f" | train r(Y1) {train['r1']:.3f}, r(Y2) {train['r2']:.3f}, |D_{n}| {sizes['size']}"
        if metrics["training"]["loss"] is not None:
            line += f", loss {metrics['training']['loss']:.3f}"
    return line


def summary_table(iterations: Sequence[dict[str, Any]]) -> str:
    """All iterations as a table: iteration, test r(Y1) and r(Y2), |D_n|, the four transitions."""
    lines = ["iteration  r(Y1)  r(Y2)  |D_n|  wrong>right  right>wrong  right>right  wrong>wrong"]
    for metrics in iterations:
        test, size = metrics["test"], metrics.get("dataset", {}).get("size", "-")
        counts = "  ".join(f"{test[name]:>11}" for name in TRANSITIONS)
        lines.append(f"{metrics['iteration']:>9}  {test['r1']:.3f}  {test['r2']:.3f}  {size:>5}  {counts}")
    return "\n".join(lines)


def sample_table(trajectories: Sequence[Trajectory]) -> str:
    """The first few trajectories as a Markdown table."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")

    rows = ["| question | references | initial answer | r1 | correction | r2 |", "|---|---|---|---|---|---|"]
    for t in trajectories[:SHOWN]:
        texts = (t.question.text, "; ".join(t.question.references), t.initial.text, t.correction.text)
        question, references, initial, correction = map(cell, texts)
        rows.append(f"| {question} | {references} | {initial} | {t.r1:g} | {correction} | {t.r2:g} |")
    return "\n".join(rows)
