"""The run folder: where each box of the algorithm lies, and how it gets there whole or not at all.

A stage is done when its file is there. Files and folders are written beside their place, flushed to disk,
and renamed, so a kill at any moment leaves a stage done or not done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from stasc.errors import UserError


class Iteration:
    """The files of iteration ``n``; iteration 0 is the untrained M_0 and has only the last two."""

    def __init__(self, run_dir: Path, n: int) -> None:
        self.n = n
        self.folder = run_dir / f"iteration-{n:02d}"
        self.initial = self.folder / "initial.jsonl"
        """Initial answers of the training questions with their rewards."""
        self.trajectories = self.folder / "trajectories.jsonl"
        """All corrections of them, with both rewards."""
        self.dataset = self.folder / "dataset.jsonl"
        """D_n: the trajectories that the filter kept."""
        self.training = self.folder / "training.json"
        """Rewards of the trajectories, what D_n holds, and how the fine-tuning went."""
        self.probe = self.folder / "probe.json"
        """What M_n says of a few fixed sequences while it is still in the trainer."""
        self.model = self.folder / "model"
        """M_n as a Hugging Face folder."""
        self.test = self.folder / "test.jsonl"
        """Answers and corrections of the test questions by M_n."""
        self.test_greedy = self.folder / "test-greedy.jsonl"
        """The same, greedily."""
        self.metrics = self.folder / "metrics.json"
        """What the curves show for iteration n."""

    def test_round(self, turn: int) -> Path:
        """Corrections number ``turn`` of the test questions, each of the correction before it."""
        return self.test if turn == 1 else self.folder / f"test-round-{turn}.jsonl"


# What may change between two starts of the same run: it has no part in the results.
_FREE_TO_CHANGE = (
    "run_dir",
    "reuse",
    "ckpt_path",
    "data.output",
    "data.predict",
    "sampler.init_args",
    "trainer.accelerator",
    "trainer.callbacks",
    "trainer.devices",
    "trainer.enable_",
    "trainer.log",
    "trainer.max_epochs",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)


class Run:
    """A run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.checkpoints = self.folder / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.tensorboard = self.folder / "tensorboard"
        self.journals = self.folder / "under-way"
        """Draws of the stage under way."""

    def iteration(self, n: int) -> Iteration:
        """The files of iteration ``n``."""
        return Iteration(self.folder, n)

    def options(self) -> dict[str, Any]:
        """What the run was started with, by dotted name; nothing if this is no run's folder yet."""
        return flatten(yaml.safe_load(self.config.read_text())) if self.config.is_file() else {}

    def claim(self, config: dict[str, Any]) -> None:
        """Make this the folder of a run with ``config``, or find that it is already.

        More iterations than before continue a run.

        Raises:
            UserError: The folder belongs to a run whose results would be others.
        """
        before, now = self.options(), flatten(config)
        if before:
            for option in sorted(before.keys() | now.keys()):
                old, new = before.get(option), now.get(option)
                grows = option == "algorithm.init_args.iterations" and None not in (old, new) and new > old
                if old != new and not grows and not option.startswith(_FREE_TO_CHANGE):
                    typed = option.replace(".init_args", "").removesuffix(".class_path")
                    raise UserError(
                        f"{self.folder} holds a run with another --{typed} ({old}, now {new}): "
                        "choose another --run_dir, or remove that folder."
                    )
        elif self.folder.is_dir() and any(self.folder.glob("iteration-*")):
            raise UserError(f"{self.folder} holds a run without its config.yaml: choose another --run_dir.")
        write_lines(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).splitlines())


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of a configuration by their dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    _sync(path.parent)


def copy_file(source: Path, path: Path) -> None:
    """Copy a text file as a whole or not at all."""
    with source.open(encoding="utf-8", newline="\n") as lines:
        write_lines(path, (line.removesuffix("\n") for line in lines))


def write_json(path: Path, value: Any) -> None:
    """Write a readable JSON file as a whole or not at all."""
    write_lines(path, [json.dumps(value, indent=2)])


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes ``folder`` at the end if nothing went wrong."""
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    for path in sorted(unfinished.rglob("*")):
        _sync(path)
    _sync(unfinished)
    unfinished.replace(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
