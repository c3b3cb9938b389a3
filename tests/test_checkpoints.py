"""Checkpoints: the one before stays whole until the new one is."""

import os
import subprocess
import sys

import torch
from conftest import ROOT

KILLED_WHILE_IT_WRITES = """
import os, signal, sys
import torch
from stasc.training.checkpoints import WholeCheckpoints

class Kill:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)

path = sys.argv[1]
WholeCheckpoints().save_checkpoint({"weights": torch.ones(3)}, path)
WholeCheckpoints().save_checkpoint({"weights": torch.zeros(3), "and": Kill()}, path)
"""


def test_a_kill_while_it_is_written_leaves_the_checkpoint_before_and_no_temporary_file(tmp_path):
    (temporary := tmp_path / "temporary").mkdir()
    path = tmp_path / "checkpoints" / "last.ckpt"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_IT_WRITES, path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        check=False,
    )
    assert killed.returncode == -9
    assert torch.load(path)["weights"].tolist() == [1, 1, 1]
    assert (path.parent / "last.ckpt.tmp").exists(), "it was written beside its place"
    assert not any(temporary.iterdir())
