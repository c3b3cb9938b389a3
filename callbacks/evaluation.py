"""Every M_n on the test questions: curves over iterations, one line and one table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.curves import Curves
from data import TrajectoryDataModule
from stasc.module import CorrectionSFT
from stasc.run import write_json
from stasc.scoring import figures
from stasc.trajectory import Trajectory

TRANSITIONS = ("wrong_to_right", "right_to_wrong", "right_to_right", "wrong_to_wrong")
SHOWN = 12
"""Trajectories in TensorBoard's table."""


class Evaluation(Callback):
    """Samples an initial answer and a correction of every test question from each M_n, M_0 included.

    M_{n-1} is evaluated at the start of iteration n, while the sampler still holds it; M_N at the end. Each
    iteration's figures go into its ``metrics.json`` and from there to the loggers, with the iteration as the
    step.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Tell the loggers what is compared in ablations."""
        for logger in trainer.loggers:
            logger.log_hyperparams(hyperparameters(trainer.datamodule, pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Evaluate M_{n-1}."""
        data: TrajectoryDataModule = trainer.datamodule
        _begin_curves(trainer)
        if data.epochs_done % data.algorithm.epochs == 0:
            self._evaluate(trainer, data.iteration - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Evaluate M_N, show all iterations and say where everything lies.

        Not in ``on_train_end``, which a run that was killed after its last checkpoint never sees.
        """
        data: TrajectoryDataModule = trainer.datamodule
        run, last = data.run, data.algorithm.iterations
        if data.epochs_done == trainer.max_epochs:
            _begin_curves(trainer)
            self._evaluate(trainer, last)
        boxes = [run.iteration(n) for n in range(last + 1)]
        if trainer.is_global_zero and all(box.metrics.is_file() for box in boxes):
            print("\n" + summary_table([json.loads(box.metrics.read_text()) for box in boxes]))
            print(f"\ncurves  tensorboard --logdir '{run.tensorboard}'")
            if last:
                print(f"models  {run.iteration(1).model} to {boxes[-1].model}")

    def _evaluate(self, trainer: Trainer, n: int) -> None:
        data: TrajectoryDataModule = trainer.datamodule
        box = data.run.iteration(n)
        rounds = data.test_rounds(n)
        greedy = data.test_greedily(n)
        missing = data.missing(box.metrics)
        if trainer.is_global_zero:
            trajectories = list(rounds[0])
            if missing:
                metrics = {"iteration": n, **figures(rounds, greedy, data.algorithm.threshold)}
                if n > 0:
                    metrics |= json.loads(box.training.read_text())
                write_json(box.metrics, metrics)
                print(summary_line(metrics), flush=True)
            points = curves([json.loads(data.run.iteration(m).metrics.read_text()) for m in range(n + 1)])
            for logger in trainer.loggers:
                logger.log_metrics(points, step=n)
                if isinstance(logger, Curves | TensorBoardLogger):
                    logger.experiment.add_text("test/trajectories", sample_table(trajectories), n)
                logger.save()
        trainer.strategy.barrier("metrics are written")


def _begin_curves(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, Curves):
            logger.begin(trainer.datamodule.epochs_done)


def hyperparameters(data: TrajectoryDataModule, module: CorrectionSFT) -> dict[str, str | float]:
    """What tells the runs of an ablation from each other."""
    return {
        "system": data.algorithm.name,
        "model": "/".join(Path(data.base).parts[-2:]),
        "seed": data.seed,
        "n_init": data.algorithm.n_init,
        "n_corr": data.algorithm.n_corr,
        "epochs": data.algorithm.epochs,
        "learning_rate": module.learning_rate,
        "batch_size": data.batch_size,
        "temperature": data.sampling.temperature,
    }


def curves(iterations: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last iteration's points of all curves, among them the best rewards up to there.

    Args:
        iterations: The metrics of M_0 to M_n.
    """
    points = {
        f"{group}/{name}": value
        for group, values in iterations[-1].items()
        if isinstance(values, dict)
        for name, value in values.items()
        if value is not None
    }
    best = {f"best/{turn}": max(metrics["test"][turn] for metrics in iterations) for turn in ("r1", "r2")}
    return points | best


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
