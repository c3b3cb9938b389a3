"""A full disk, as a limit on the size of files: a sentence names the file, and with space it is written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import MANUAL, tiny_model

from callbacks.curves import Curves
from stasc.disk import naming, refusal
from stasc.errors import chain
from stasc.run import write_lines
from stasc.sampling import Draw, Request
from stasc.sampling.journal import Journal
from stasc.training.checkpoints import WholeCheckpoints
from stasc.training.weights import load_model, write_model
from stasc.users_code import blame

FULL = 2_000
"""Bytes to which a file can grow."""


@contextmanager
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_trajectories(path: Path, m_0: Path) -> None:
    write_lines(path, map(str, range(FULL)))


def write_checkpoint(path: Path, m_0: Path) -> None:
    WholeCheckpoints().save_checkpoint({"weights": torch.zeros(FULL)}, path)


def write_weights(path: Path, m_0: Path) -> None:
    write_model(load_model(m_0).state_dict(), m_0, path, MANUAL)


def write_draws(path: Path, m_0: Path) -> None:
    journal = Journal(path.parent, path.name.partition(".")[0], 0, "")
    for seed in range(FULL):
        journal.add(Request([1], 1, seed), [Draw((1,), True)])


def write_curves(path: Path, m_0: Path) -> None:
    logger = Curves(path.parent)
    logger.begin(0)
    for step in range(FULL):
        logger.log_metrics({"test/r1": 0.5}, step)
    logger.save()


WRITERS = {
    "iteration-01/trajectories.jsonl": write_trajectories,
    "checkpoints/last.ckpt": write_checkpoint,
    "iteration-01/model": write_weights,
    "draws/M_0/draws.0.jsonl": write_draws,
    "events.out.tfevents": write_curves,
}


@pytest.fixture(scope="module")
def m_0(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m_0"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_with_the_file_and_leaves_none_that_is_half_written(m_0, tmp_path, name):
    write, path = WRITERS[name], tmp_path / name
    with full_disk(), pytest.raises(OSError) as error:  # noqa: PT011
        write(path, m_0)
    assert refusal(error.value) == (
        f"{path} cannot be written or read (File too large): see to that, or choose another --run_dir; "
        "what is finished is kept, and the same command goes on."
    )
    assert not path.exists() or write is write_draws, "journals are read up to what is whole"
    assert not list(tmp_path.rglob("*.tmp"))
    write(path, m_0)
    assert path.exists() or write is write_curves, "which adds the time to the name"


def test_errors_that_name_each_other_are_each_looked_at_once(tmp_path):
    """As a thread's error does that is raised again while what came of it is handled."""
    thread, named = ValueError("in the thread"), RuntimeError("named")
    named.__cause__, thread.__context__ = thread, named
    assert list(chain(named)) == [named, thread]
    assert blame(named) is None
    with pytest.raises(RuntimeError, match="named"), naming(tmp_path / "file"):
        raise named
