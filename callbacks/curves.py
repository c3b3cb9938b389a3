"""The TensorBoard logger of a run: curves without repetitions, and the hyper-parameters of the run."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from stasc.disk import naming

T = TypeVar("T")

# TensorBoard sorts by name, and its table of hyper-parameters shows the first five curves: those of ``test``
# and ``best``, which have numbers for that.
_GROUPS = {
    "test": "1 test",
    "best": "1 test",
    "validation": "2 validation",
    "train": "3 training questions",
    "dataset": "4 learnt from (D_n)",
    "training": "5 fine-tuning",
    "step": "6 optimiser steps",
}
_NAMES = {
    "r1": "1 reward of initial answers, r(Y1)",
    "r2": "2 reward of corrections, r(Y2)",
    "delta": "3 gain, r(Y2) less r(Y1)",
    "best/r1": "4 highest r(Y1) so far",
    "best/r2": "5 highest r(Y2) so far",
    "r1_se": "r(Y1), standard error",
    "r2_se": "r(Y2), standard error",
    "delta_se": "gain, standard error",
    "delta_p": "gain, p of no gain",
    "repeated": "corrections that repeat the answer, share",
    "edited": "other corrections, share of words that they change",
    "count": "answers, number",
    "train/answers": "sampled answers, number",
    "train/tokens": "sampled tokens, number",
    "right_to_right": "right to right, number",
    "right_to_wrong": "right to wrong, number",
    "wrong_to_right": "wrong to right, number",
    "wrong_to_wrong": "wrong to wrong, number",
    "dataset/size": "trajectories",
    "dataset/improving": "trajectories, improving",
    "dataset/non_decreasing": "trajectories, others",
    "training/loss": "loss, mean of the iteration",
}


def tag(name: str) -> str:
    """What TensorBoard calls a curve, so that it explains itself; a user's own curve keeps its name."""
    group, _, metric = name.partition("/")
    if group not in _GROUPS:
        return name
    return f"{_GROUPS[group]}/{_NAMES.get(name) or _NAMES.get(metric) or metric.replace('_', ' ')}"


def _naming_the_file(write: Callable[..., T]) -> Callable[..., T]:
    """TensorBoard's errors do not say which file could not be written."""

    @wraps(write)
    def named(curves: Curves, *args: Any, **kwargs: Any) -> T:
        with naming(curves.folder / "events.out.tfevents"):
            return write(curves, *args, **kwargs)

    return named


class Curves(Logger):
    """Writes TensorBoard's event files, in which a resume repeats nothing.

    A resume trains a whole epoch again. So every epoch begins with a mark in the file of its start, and the
    next start cuts off what follows the mark of the epoch that it begins with. The files lie in the run
    folder itself: its name is then the name of the run in TensorBoard.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.folder = Path(save_dir)
        self.hyperparameters: dict[str, str | float] = {}
        self._writer: SummaryWriter | None = None
        self._begun = False

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
    @_naming_the_file
    def experiment(self) -> SummaryWriter:
        """Writes to the file of this start; before the first epoch to one that the next start replaces."""
        if self._writer is None:
            for path in self.folder.glob("events.out.tfevents.*.start"):
                path.unlink()
            self._writer = SummaryWriter(self.folder, filename_suffix=".start")
        return self._writer

    @rank_zero_only
    @_naming_the_file
    def begin(self, epoch: int) -> None:
        """Begin a training epoch (from 0); what earlier starts wrote of it and after it is removed."""
        if not self._begun:
            self._begun = True
            self._close()
            for path in self.folder.glob("events.out.tfevents.*"):
                if path.suffix != ".start":
                    _cut(path, epoch)
            self._writer = SummaryWriter(self.folder)
        self._writer.file_writer.add_event(_mark(epoch))
        if epoch == 0:
            start, _ = self._session()
            self._writer.file_writer.add_summary(start)
        self.save()

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, str | float]) -> None:
        """Keep the hyper-parameters of the run, which are written when its first epoch begins."""
        self.hyperparameters |= params

    @rank_zero_only
    @_naming_the_file
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each curve."""
        for name, value in metrics.items():
            self.experiment.add_scalar(tag(name), value, step)

    @rank_zero_only
    @_naming_the_file
    def save(self) -> None:
        """Write what is buffered to disk, so that a kill loses nothing."""
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    @_naming_the_file
    def finalize(self, status: str) -> None:
        """Close the file; with status ``success`` TensorBoard shows the run as finished."""
        if self._writer is not None and status == "success":
            _, end = self._session()
            self._writer.file_writer.add_summary(end)
        self._close()

    def _session(self) -> tuple[Summary, Summary]:
        """TensorBoard's records of the start of a run and of its end.

        Not the one of the experiment, which would say what the table of hyper-parameters shows: a run does
        not know by what it differs from others. Without it TensorBoard finds that out, and shows it first.
        """
        _, start, end = hparams(self.hyperparameters, {})
        return start, end

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _mark(epoch: int) -> Event:
    """What TensorBoard passes over, and ``_cut`` finds."""
    return Event(session_log=SessionLog(status=SessionLog.CHECKPOINT, checkpoint_path=f"epoch {epoch}"))


def _cut(path: Path, epoch: int) -> None:
    """Cut off an event file at the first mark from an epoch on; without an earlier epoch it goes."""
    earlier, size = False, path.stat().st_size
    with path.open("r+b") as file:
        while (end := file.tell()) + 16 <= size:
            header = file.read(12)  # the length of the event, and its checksum
            length = struct.unpack("<Q", header[:8])[0]
            if end + 16 + length > size:  # what a kill or a full disk left unfinished
                break
            record = file.read(length + 4)  # the event, and its checksum
            try:
                mark = Event.FromString(record[:-4]).session_log.checkpoint_path
            except DecodeError:  # a damaged file keeps its curves up to there
                break
            if mark and int(mark.removeprefix("epoch ")) >= epoch:
                break
            earlier = earlier or bool(mark)
        file.truncate(end)
    if not earlier:
        path.unlink()
