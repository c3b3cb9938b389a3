"""Every M_n on the questions of validation and test: curves, and a line and a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from callbacks.curves import Curves
from data import TrajectoryDataModule
from stasc.run import read_json
from stasc.statistics import verdict
from stasc.training.module import CorrectionSFT
from stasc.trajectory import TRANSITIONS, Records, Trajectory

TABLE_ROWS = 12
"""Trajectories in TensorBoard's table."""


class Evaluation(Callback):
    """Evaluates every M_n, M_0 included, and shows the metrics.

    M_{n-1} is evaluated at the start of iteration n, while the sampler still holds it; M_N at the end. Each
    iteration's metrics go from its ``metrics.json`` to the loggers, with the iteration as the step.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Give the loggers what is compared in ablations."""
        for logger in trainer.loggers:
            logger.log_hyperparams(hyperparameters(trainer.datamodule, pl_module))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Evaluate M_{n-1}."""
        data: TrajectoryDataModule = trainer.datamodule
        _begin_curves(trainer)
        if data.epochs_done % data.experiment.algorithm.epochs == 0:
            self._evaluate(trainer, data.iteration - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Evaluate M_N, show all iterations and where everything lies.

        Not in ``on_train_end``, which is not called for a run that was killed after its last checkpoint.
        """
        data: TrajectoryDataModule = trainer.datamodule
        experiment, last = data.experiment, data.experiment.algorithm.iterations
        if data.epochs_done < trainer.max_epochs:  # a callback ended it
            return
        _begin_curves(trainer)
        self._evaluate(trainer, last)
        choice = experiment.choose()
        if trainer.is_global_zero:
            files = [experiment.run.iteration(n) for n in range(last + 1)]
            iterations = [read_json(of_n.metrics) for of_n in files]
            print(f"\n{summary(iterations, choice)}")
            empty = [str(n) for n, metrics in enumerate(iterations) if n and not metrics["dataset"]["size"]]
            if empty:
                print(f"Nothing was learnt in iteration {', '.join(empty)}: D_n was empty, see above.")
            print()
            for logger in trainer.loggers:
                print(f"curves  {whereabouts(logger)}")
            if last:
                print(f"models  {files[1].model} to {files[-1].model}")

    def _evaluate(self, trainer: Trainer, n: int) -> None:
        data: TrajectoryDataModule = trainer.datamodule
        run = data.experiment.run
        missing = data.experiment.missing(run.iteration(n).metrics)
        metrics = data.experiment.evaluate(n)
        if not trainer.is_global_zero:
            return
        if missing:
            print(summary_line(metrics), flush=True)
        points = curves([read_json(run.iteration(m).metrics) for m in range(n + 1)])
        answers = run.iteration(n).test_answers(2) if "test" in metrics else run.iteration(n).validation
        trajectories = list(islice(Records(answers), TABLE_ROWS))
        for logger in trainer.loggers:
            logger.log_metrics(points, step=n)
            if isinstance(logger, Curves | TensorBoardLogger):
                logger.experiment.add_text(f"{answers.stem}/trajectories", sample_table(trajectories), n)
            logger.save()


def _begin_curves(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, Curves):
            logger.begin(trainer.datamodule.epochs_done)


def hyperparameters(data: TrajectoryDataModule, module: CorrectionSFT) -> dict[str, str | float]:
    """The settings by which the runs of an ablation differ."""
    algorithm = data.experiment.algorithm
    return {
        "system": algorithm.name,
        "model": "/".join(Path(module.base).parts[-2:]),
        "seed": data.experiment.seed,
        "n_init": algorithm.n_init,
        "n_corr": algorithm.n_corr,
        "epochs": algorithm.epochs,
        "learning_rate": module.learning_rate,
        "batch_size": data.batches.size,
        "temperature": data.sampling.temperature,
    }


def whereabouts(logger: Logger) -> str:
    """Where a logger's curves are, or the command that shows them."""
    if isinstance(logger, Curves | TensorBoardLogger):
        return f"tensorboard --logdir '{logger.root_dir or logger.save_dir}'"
    if isinstance(logger, CSVLogger):
        return ", ".join(map(str, sorted(Path(logger.root_dir).rglob("metrics.csv"))))  # one of each start
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        return f"wandb sync '{Path(run.dir).parent}'" if run.offline else run.url
    place = logger.log_dir or logger.save_dir
    return type(logger).__name__ + (f", {place}" if place else "")


def curves(iterations: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last iteration's points of all curves, among them the best rewards so far.

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
    tested = [metrics["test"] for metrics in iterations if "test" in metrics]
    return points | {f"best/{turn}": max(test[turn] for test in tested) for turn in ("r1", "r2")}


def summary_line(metrics: dict[str, Any]) -> str:
    """One iteration in one line."""
    n, parts = metrics["iteration"], []
    for group in ("validation", "test"):
        if group in metrics:
            rewards = metrics[group]
            # "w>r 3": three answers that were wrong became right.
            changes = {name: f"{name[0]}>{name.rpartition('_')[2][0]}" for name in TRANSITIONS}
            counts = ", ".join(f"{change} {rewards[name]}" for name, change in changes.items())
            parts.append(f"{group} r(Y1) {rewards['r1']:.3f}, r(Y2) {rewards['r2']:.3f} ({counts})")
    if "dataset" in metrics:
        train, loss = metrics["train"], metrics["training"]["loss"]
        part = f"train r(Y1) {train['r1']:.3f}, r(Y2) {train['r2']:.3f}, |D_{n}| {metrics['dataset']['size']}"
        parts.append(part if loss is None else f"{part}, loss {loss:.3f}")
    return f"M_{n}: {' | '.join(parts)}"


def summary(iterations: Sequence[dict[str, Any]], choice: int | None) -> str:
    """What a run has found: its tables, and whether the chosen model's corrections help.

    Args:
        iterations: The metrics of M_0 to M_N.
        choice: The iteration that the validation questions choose, if there are such questions; else it is
            the last one that is spoken of.
    """
    if choice is None:
        last = iterations[-1]
        return f"{summary_table(iterations)}\n\n{_verdict(last)}"
    tables = [f"{group}\n{summary_table(iterations, group)}" for group in ("validation", "test")]
    tested = [metrics for metrics in iterations if "test" in metrics]
    most = max(tested, key=lambda metrics: metrics["test"]["r2"])
    lines = [
        f"{name:<20} M_{metrics['iteration']}, test r(Y2) {metrics['test']['r2']:.3f}"
        for name, metrics in (
            ("best on validation", iterations[choice]),
            ("last", iterations[-1]),
            ("maximum on test", most),
        )
    ]
    return "\n\n".join([*tables, "\n".join(lines), _verdict(iterations[choice])])


def _verdict(metrics: dict[str, Any]) -> str:
    test = metrics["test"]
    return verdict(f"M_{metrics['iteration']}", test["delta"], test["delta_p"], test.get("repeated"))


def summary_table(iterations: Sequence[dict[str, Any]], group: str = "test") -> str:
    """The iterations that were evaluated on a group of questions as a table of 80 columns at most.

    Delta is r(Y2) - r(Y1), +-SE its standard error over questions; w>r counts wrong answers that became
    right, and so on; same is the share of corrections that repeat the answer, edit how far the others change
    it.
    """
    lines = ["  n  r(Y1)  r(Y2)   Delta  +-SE   |D_n|    w>r    r>w    r>r    w>w  same  edit"]
    for metrics in iterations:
        if group not in metrics:
            continue
        found, size = metrics[group], metrics.get("dataset", {}).get("size", "-")
        error, same, edit = (
            f"{found[name]:{form}}" if name in found else "-"
            for name, form in (("delta_se", ".3f"), ("repeated", ".0%"), ("edited", ".2f"))
        )
        counts = "  ".join(f"{found[name]:>5}" for name in TRANSITIONS)
        n, r1, r2, delta = metrics["iteration"], found["r1"], found["r2"], found["delta"]
        rewards = f"{n:>3}  {r1:.3f}  {r2:.3f}  {delta:+.3f}  {error:>5}"
        lines.append(f"{rewards}  {size:>5}  {counts}  {same:>4}  {edit:>4}")
    return "\n".join(lines)


def sample_table(trajectories: Sequence[Trajectory]) -> str:
    """Trajectories as a Markdown table."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")

    rows = ["| question | references | initial answer | r1 | correction | r2 |", "|---|---|---|---|---|---|"]
    for t in trajectories:
        initial, correction = t.after(1), t.after(2)
        texts = (t.question.text, "; ".join(t.question.references), initial.text, correction.text)
        question, references, y1, y2 = map(cell, texts)
        rows.append(
            f"| {question} | {references} | {y1} | {initial.reward:g} | {y2} | {correction.reward:g} |"
        )
    return "\n".join(rows)
