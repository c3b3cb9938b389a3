"""Where results come from: what is said of the program, the machine, the model and the questions."""

import json
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.metadata import version

import pytest
from conftest import ROOT

from stasc import __version__
from stasc.model_folder import ModelFolder
from stasc.provenance import fingerprint, this_start
from stasc.trajectory import Question

QUESTIONS = [Question("1", "Why?", ("a", "b")), Question("2", "Who?", ("c",))]


def test_a_start_has_versions_the_commit_and_the_machine():
    start = json.loads(json.dumps(this_start()))
    assert datetime.now().astimezone() - datetime.fromisoformat(start["date"]) < timedelta(minutes=1)
    assert start["stasc"]["version"] == __version__
    assert start["libraries"].items() >= {name: version(name) for name in ("torch", "lightning")}.items()
    assert start["hardware"]["cores"] >= 1
    assert start["hardware"]["memory_gib"] > 0
    git = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if git.returncode == 0:
        assert start["stasc"]["commit"] == git.stdout.strip()


@pytest.mark.parametrize(
    "others",
    [
        QUESTIONS[:1],
        QUESTIONS[::-1],
        [QUESTIONS[0], replace(QUESTIONS[1], id="3")],
        [QUESTIONS[0], replace(QUESTIONS[1], text="Who")],
        [QUESTIONS[0], replace(QUESTIONS[1], references=("d",))],
    ],
)
def test_other_questions_have_another_fingerprint(others):
    assert fingerprint(QUESTIONS) == fingerprint(list(QUESTIONS))
    assert fingerprint(others) != fingerprint(QUESTIONS)


def test_a_snapshot_of_the_hub_knows_its_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert ModelFolder(tmp_path / "models--me--mine/snapshots" / commit).revision == commit
    assert ModelFolder(tmp_path / "mine").revision is None
