"""The TensorBoard logger of a run: curves without repetitions, and the hyper-parameters of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

METRICS = ("test/r1", "test/r2", "best/r1", "best/r2")
"""Curves whose last points stand in TensorBoard's table of hyper-parameters."""


class Curves(Logger):
    """Writes TensorBoard's event files, in which a resume repeats nothing.

    A resume trains a whole epoch again. So the points of each training epoch are in a separate file, and when
    an epoch begins, the files that an earlier start wrote for it and for later epochs are removed.

    Args:
        folder: Where the event files lie.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.hyperparameters: dict[str, str | float] = {}
        self._writer: SummaryWriter | None = None

    @property
    def name(self) -> str:
        """Empty: the run's folder has a name."""
        return ""

    @property
    def version(self) -> str:
        """Empty as well."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where the event files lie."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """Writes to the file of the current epoch; before the first epoch to a file of this start."""
        if self._writer is None:
            for path in self.folder.glob("events.out.tfevents.*.start"):
                path.unlink()
            self._writer = SummaryWriter(self.folder, filename_suffix=".start")
        return self._writer

    @rank_zero_only
    def begin(self, epoch: int) -> None:
        """Begin the file of a training epoch (from 0); remove those of earlier starts from it on."""
        self._close()
        for path in self.folder.glob("events.out.tfevents.*.epoch-*"):
            if int(path.name.rpartition("-")[2]) >= epoch:
                path.unlink()
        self._writer = SummaryWriter(self.folder, filename_suffix=f".epoch-{epoch}")
        if epoch == 0:
            experiment, start, _ = self._session()
            self._writer.file_writer.add_summary(experiment)
            self._writer.file_writer.add_summary(start)
        self.save()

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, str | float]) -> None:
        """Keep the hyper-parameters of the run, which are written when its first epoch begins."""
        self.hyperparameters |= params

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)

    @rank_zero_only
    def save(self) -> None:
        """Write what is buffered to disk, so that a kill loses nothing."""
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; with status ``success`` TensorBoard shows the run as finished."""
        if self._writer is not None and status == "success":
            *_, end = self._session()
            self._writer.file_writer.add_summary(end)
        self._close()

    def _session(self) -> tuple[Summary, Summary, Summary]:
        """TensorBoard's records of the compared metrics, of the start of a run, and of its end."""
        return hparams(self.hyperparameters, dict.fromkeys(METRICS, 0.0))

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
