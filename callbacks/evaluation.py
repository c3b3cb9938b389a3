"""Every M_n on the questions of validation and test: curves, and a line and a table on the terminal."""

from __future__ import annotations

import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from callbacks.curves import Curves
from data import TrajectoryDataModule
from stasc.experiment import Experiment
from stasc.model_card import write_card
from stasc.progress import say
from stasc.run import read_json
from stasc.statistics import verdict
from stasc.texts import table_cell
from stasc.training.module import CorrectionSFT
from stasc.trajectory import TRANSITIONS, Records, Trajectory

TABLE_ROWS = 12
"""Trajectories in TensorBoard's table."""

_CHANGES = {name: f"{name[0]}>{name.rpartition('_')[2][0]}" for name in TRANSITIONS}
"""Short names of what became of answers: ``w>r 3`` are three that were wrong and became right."""

_OF_THE_TEST = ("test", "greedy", "rounds", "samples")
"""Groups of metrics that the test questions give."""


class Evaluation(Callback):
    """Evaluates every M_n, M_0 included, shows the metrics, and writes them into the card of M_n.

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
        choice = self._evaluate(trainer, last)
        if trainer.is_global_zero:
            files = [experiment.run.iteration(n) for n in range(last + 1)]
            iterations = [read_json(of_n.metrics, "iteration") for of_n in files]
            data.pace.end()
            say(f"\n{summary(iterations, choice)}")
            empty = [str(n) for n, metrics in enumerate(iterations) if n and not metrics["dataset"]["size"]]
            if empty:
                say(f"Nothing was learnt in iteration {', '.join(empty)}: D_n was empty, see above.")
            report = f"{_typed('python')} -m stasc report {_quoted(experiment.run.folder)}"
            say(f"\nreport  {report} --out report")
            for logger in trainer.loggers:
                say(f"curves  {whereabouts(logger)}")
            if models := [of_n.model for of_n in files[1:] if of_n.model.is_dir()]:
                all_there = f"{models[0]} to {models[-1]}"
                say(f"models  {all_there if len(models) == last else ', '.join(map(str, models))}")

    def on_test_end(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """Show the metrics of a model folder."""
        if trainer.is_global_zero:
            path = trainer.datamodule.metrics_path(trainer.state.fn.value)
            say(f"all metrics              {path}\n\n{evaluation_table(read_json(path))}")

    def on_validation_end(self, trainer: Trainer, pl_module: CorrectionSFT) -> None:
        """As ``on_test_end``."""
        self.on_test_end(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, n: int) -> int | None:
        """Evaluate M_n, and after the last one the model that validation chooses: its iteration."""
        experiment: Experiment = trainer.datamodule.experiment
        missing = experiment.missing(experiment.run.iteration(n).metrics)
        metrics = experiment.evaluate(n)
        if missing and trainer.is_global_zero:
            say(summary_lines(metrics))
            experiment.run.note_seconds(trainer.datamodule.pace.seconds, trainer.world_size)
        choice = experiment.choose() if n == experiment.algorithm.iterations else None
        if trainer.is_global_zero:
            if choice not in (None, n) and not experiment.tests(choice):  # it was tested just now, if ever
                self._show(trainer, choice, _OF_THE_TEST)
            self._show(trainer, n)
            experiment.remove_models(n)
        return choice

    def _show(self, trainer: Trainer, n: int, groups: Sequence[str] | None = None) -> None:
        """Give the metrics of M_n to the loggers and to its card; all groups of them, or some."""
        experiment: Experiment = trainer.datamodule.experiment
        run = experiment.run
        iterations = [read_json(run.iteration(m).metrics, "iteration") for m in range(n + 1)]
        points = {
            name: value
            for name, value in curves(iterations).items()
            if groups is None or name.partition("/")[0] in groups
        }
        answers = run.iteration(n).test_answers(2) if "test" in iterations[n] else run.iteration(n).validation
        evaluated = answers.is_file()  # it is not between two times that the test questions are asked
        if evaluated:
            _write_card(experiment, n)
            trajectories = list(islice(Records(answers), TABLE_ROWS))
        for logger in trainer.loggers:
            logger.log_metrics(points, step=n)
            if evaluated and isinstance(logger, Curves | TensorBoardLogger):
                logger.experiment.add_text(f"{answers.stem}/trajectories", sample_table(trajectories), n)
            logger.save()


def _write_card(experiment: Experiment, n: int) -> None:
    if n and experiment.model_folder(n).is_dir():  # who needs the space may remove models of a run
        write_card(experiment, n)


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
        return f"{_typed('tensorboard')} --logdir {_quoted(logger.root_dir or logger.save_dir)}"
    if isinstance(logger, CSVLogger):
        return ", ".join(map(str, sorted(Path(logger.root_dir).rglob("metrics.csv"))))  # one of each start
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        return f"{_typed('wandb')} sync {_quoted(Path(run.dir).parent)}" if run.offline else run.url
    place = logger.log_dir or logger.save_dir
    return type(logger).__name__ + (f", {place}" if place else "")


def _typed(program: str) -> str:
    """A program of this environment as a user can type it, whether or not the environment is activated."""
    ours = Path(sys.executable).with_name(program)
    first = shutil.which(program)
    if not ours.exists() or (first and Path(first).parent.samefile(ours.parent)):
        return program
    return _quoted(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


def curves(iterations: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last iteration's points of all curves, among them the best rewards so far.

    Args:
        iterations: The metrics of M_0 to M_n.
    """
    points = {
        f"{group}/{name}": value
        for group, values in iterations[-1].items()
        if isinstance(values, dict) and group != "measured"
        for name, value in values.items()
        if value is not None
    }
    tested = [metrics["test"] for metrics in iterations if "test" in metrics]
    return points | {f"best/{turn}": max(test[turn] for test in tested) for turn in ("r1", "r2")}


def summary_lines(metrics: dict[str, Any]) -> str:
    """One iteration in a line for each group of questions, of 80 columns."""
    n, lines = metrics["iteration"], []
    for group in ("validation", "test", "train"):
        if group not in metrics:
            continue
        rewards = metrics[group]
        parts = [
            f"{group:<10}",
            *(f"r({turn}) {rewards[turn.replace('Y', 'r')]:.3f}" for turn in ("Y1", "Y2")),
        ]
        if group == "train":
            loss = metrics["training"]["loss"]
            parts.append(f"|D_{n}| {metrics['dataset']['size']}")
            parts += [] if loss is None else [f"mean loss {loss:.3f}"]
        else:
            parts.append(" ".join(f"{short} {rewards[name]}" for name, short in _CHANGES.items()))
        lines.append(f"{'' if lines else f'M_{n}':<6}{'  '.join(parts)}")
    return "\n".join(lines)


def summary(iterations: Sequence[dict[str, Any]], choice: int | None) -> str:
    """What a run has found: its tables, and whether the chosen model's corrections help.

    Args:
        iterations: The metrics of M_0 to M_N.
        choice: The iteration that the validation questions choose, if there are such questions; else it is
            the last one that is spoken of.
    """
    groups = ("test",) if choice is None else ("validation", "test")
    tables = [summary_table(iterations, group) for group in groups]
    if choice is not None:
        tables = [f"{group}\n{table}" for group, table in zip(groups, tables, strict=True)]
    tested = [metrics for metrics in iterations if "test" in metrics]
    best = {} if choice is None else {"best on validation": iterations[choice]}
    best |= {
        "last": iterations[-1],
        "maximum on test": max(tested, key=lambda metrics: metrics["test"]["r2"]),
    }
    lines = [
        f"{name:<20} M_{metrics['iteration']}, test r(Y2) {metrics['test']['r2']:.3f}"
        for name, metrics in best.items()
    ]
    chosen = iterations[-1 if choice is None else choice]
    return "\n\n".join([*tables, "\n".join(lines), textwrap.fill(_verdict(chosen), 80)])


def _verdict(metrics: dict[str, Any]) -> str:
    test = metrics["test"]
    return verdict(f"M_{metrics['iteration']}", test["delta"], test["delta_p"], test.get("repeated"))


def summary_table(iterations: Sequence[dict[str, Any]], group: str = "test") -> str:
    """The iterations that were evaluated on a group of questions as a table of 80 columns at most.

    Delta is r(Y2) - r(Y1), +-SE its standard error over questions; w>r counts wrong answers that became
    right, and so on; same is the share of corrections that repeat the answer, edit how far the others change
    it.
    """
    return _table(
        {
            f"{metrics['iteration']:>3}": (metrics[group], str(metrics.get("dataset", {}).get("size", "-")))
            for metrics in iterations
            if group in metrics
        },
        "  n",
        "|D_n|",
    )


def evaluation_table(metrics: dict[str, Any]) -> str:
    """All metrics of a model folder: a table of 80 columns at most, and lines for what has other columns."""
    groups = [group for group in ("validation", "test", "greedy") if group in metrics]
    width = max(map(len, groups))
    lines = [_table({f"{group:<{width}}": (metrics[group], "") for group in groups}, " " * width, "")]
    if rounds := metrics.get("rounds"):
        lines.append("rounds   " + "  ".join(f"r(Y{name[1:]}) {value:.3f}" for name, value in rounds.items()))
    if samples := metrics.get("samples"):
        k = samples["k"]
        for title, name in ((f"pass@{k}", "pass"), (f"majority of {k}", "majority")):
            lines.append(f"{title}  r(Y1) {samples[f'{name}_r1']:.3f}  r(Y2) {samples[f'{name}_r2']:.3f}")
    return "\n".join(lines)


def _table(rows: dict[str, tuple[dict[str, float], str]], first: str, last: str) -> str:
    """Rows of metrics by their names.

    Args:
        rows: By the first cell, as wide as its column, the metrics and the size of D_n.
        first: Head of the first column.
        last: Head of the column of sizes; empty if there is none.
    """
    counts = "  ".join(f"{short:>5}" for short in _CHANGES.values())
    size_column = f"{last:>5}  " if last else ""
    lines = [f"{first}  r(Y1)  r(Y2)   Delta  +-SE   {size_column}{counts}  same  edit"]
    for name, (found, size) in rows.items():
        error, same, edit = (
            f"{found[metric]:{form}}" if metric in found else "-"
            for metric, form in (("delta_se", ".3f"), ("repeated", ".0%"), ("edited", ".2f"))
        )
        counts = "  ".join(f"{found[metric]:>5}" for metric in TRANSITIONS)
        r1, r2 = found["r1"], found["r2"]
        delta = found.get("delta", r2 - r1)
        size_column = f"{size:>5}  " if last else ""
        rewards = f"{name}  {r1:.3f}  {r2:.3f}  {delta:+.3f}  {error:>5}"
        lines.append(f"{rewards}  {size_column}{counts}  {same:>4}  {edit:>4}")
    return "\n".join(lines)


def sample_table(trajectories: Sequence[Trajectory]) -> str:
    """Trajectories as a Markdown table."""
    rows = ["| question | references | initial answer | r1 | correction | r2 |", "|---|---|---|---|---|---|"]
    for t in trajectories:
        initial, correction = t.after(1), t.after(2)
        texts = (t.question.text, "; ".join(t.question.references), initial.text, correction.text)
        question, references, y1, y2 = map(table_cell, texts)
        rows.append(
            f"| {question} | {references} | {y1} | {initial.reward:g} | {y2} | {correction.reward:g} |"
        )
    return "\n".join(rows)
