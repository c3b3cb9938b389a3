"""Lightning's loggers by class path: all points of a run, by iteration, also after a resume."""

import csv
import importlib
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, curves, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.curves import Curves, tag
from callbacks.evaluation import whereabouts
from stasc.__main__ import main

LOGGERS = "lightning.pytorch.loggers"
BIN = Path(sys.executable).parent
TWO = ("test/r2", "train/r2")
"""A curve from M_0 on, and one from M_1 on."""


@pytest.fixture
def fit(tmp_path, monkeypatch, capfd):
    """Trains a random model in this process with some loggers, and gives what the program says at its end."""
    monkeypatch.setenv("STASC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PATH", str(BIN), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tmp_path / "model")

    def run(loggers: object, iterations: int) -> str:
        config = {
            "run_dir": str(tmp_path / "run"),
            "model": {"base": str(model)},
            "sampler": "TransformersSampler",
            "algorithm": {"class_path": "STaSC", "init_args": {"variant": "ENE", "iterations": iterations}},
            "data": {
                "train": {"init_args": {"size": 4}},
                "test": {"init_args": {"size": 2}},
                "sampling": {"max_tokens": 4},
                "evaluation": {"sampling": {"max_tokens": 4}},
            },
            "trainer": {"logger": loggers, "enable_progress_bar": False},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        options = [
            "--config",
            str(ROOT / "configs/quickstart.yaml"),
            "--config",
            str(tmp_path / "config.yaml"),
        ]
        monkeypatch.setattr(sys, "argv", ["stasc", "fit", *options])
        main()
        return capfd.readouterr().out.rpartition("\n\n")[2]

    return run


def from_csv(run: Path, name: str) -> list[int]:
    """The steps of a curve in all files of the CSV logger."""
    rows = [row for path in sorted(run.rglob("metrics.csv")) for row in csv.DictReader(path.open())]
    return [int(row["step"]) for row in rows if row.get(name)]


def from_tensorboard(run: Path, name: str) -> list[int]:
    """The steps of a curve in all versions of Lightning's TensorBoard logger."""
    versions = sorted((run / "lightning_logs").glob("version_*"))
    found = [EventAccumulator(str(version)).Reload() for version in versions]
    return [e.step for events in found if name in events.Tags()["scalars"] for e in events.Scalars(name)]


def test_the_command_for_the_curves_can_be_typed_without_an_activated_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    tensorboard = shlex.quote(f"{BIN}/tensorboard")
    assert whereabouts(Curves("runs/a run")) == f"{tensorboard} --logdir 'runs/a run'"
    monkeypatch.chdir(BIN.parent)
    assert whereabouts(Curves("runs/mine")) == "bin/tensorboard --logdir runs/mine"


@pytest.mark.slow
def test_several_loggers_lie_in_the_run_folder_and_go_on_after_a_resume(fit, tmp_path):
    loggers = [
        "callbacks.Curves",
        {"class_path": f"{LOGGERS}.CSVLogger", "init_args": {"name": "csv"}},
        f"{LOGGERS}.TensorBoardLogger",
    ]
    run = tmp_path / "run"
    end = fit(loggers, iterations=0)
    assert [line for line in end.splitlines() if line.startswith("curves")] == [
        f"curves  tensorboard --logdir {run}",
        f"curves  {run}/csv/version_0/metrics.csv",
        f"curves  tensorboard --logdir {run}/lightning_logs",
    ]
    fit(loggers, iterations=1)
    for name, expected in zip(TWO, ([0, 1], [1]), strict=True):
        assert [step for step, _ in curves(run)[tag(name)]] == expected
        # A start evaluates the last model of the one before again, and has a file of its own.
        assert sorted(set(from_csv(run, name))) == expected
        assert sorted(set(from_tensorboard(run, name))) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model", "config.yaml"}


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("wandb"), reason="the Python package wandb is not installed")
def test_weights_and_biases_goes_on_with_the_same_run(fit, tmp_path):
    logger = {"class_path": f"{LOGGERS}.WandbLogger", "init_args": {"offline": True, "project": "stasc"}}
    for iterations in (0, 1):
        assert "curves  wandb sync" in fit(logger, iterations)
        wandb = importlib.import_module("wandb")
        assert wandb.run.summary["trainer/global_step"] == iterations
        assert 0 <= wandb.run.summary["test/r2"] <= 1
        wandb.finish()  # as the end of a process does
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
