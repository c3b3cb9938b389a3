"""Checkpoints: the one before stays whole until the new one is."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from stasc.errors import UserError
from stasc.training.checkpoints import check_checkpoint

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


def test_a_checkpoint_that_would_run_code_is_refused_and_not_read(tmp_path, monkeypatch):
    class Strange:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "last.ckpt"
    for damage in (None, "cut", "empty"):
        torch.save({"state_dict": {}, "epoch": Strange() if damage is None else 1}, path)
        if damage:
            os.truncate(path, path.stat().st_size // 2 if damage == "cut" else 0)
        with pytest.raises(UserError, match=r"last\.ckpt is damaged, or not a checkpoint of this program"):
            check_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"weight": torch.ones(2)}, "loops": {"epoch": 1}}, path)
    check_checkpoint(path)
