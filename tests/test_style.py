"""The code is formatted and lint-free."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]])
def test_ruff(check):
    process = subprocess.run(
        [sys.executable, "-m", "ruff", *check, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
