"""The run folder: which file holds what, and how files are written as a whole or not at all.

A stage of an iteration is done when its file exists. Files and folders are written under a temporary name,
flushed to disk, and renamed, so a kill at any moment leaves a stage either done or not done.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from stasc.disk import naming
from stasc.errors import UserError


class FirstUse:
    """From where on an option has a part in a run's results.

    Args:
        *files: Patterns of the first files of a run folder that follow from the option; it may be changed as
            long as none of them exists. Without any the option changes no result.
    """

    def __init__(self, *files: str) -> None:
        self.files = files

    def reached(self, folder: Path) -> bool:
        """Whether a run has come that far."""
        return any(True for file in self.files for _ in folder.glob(file))


_LINES = "lines.json"

WRITTEN_ANEW = (
    "put it back, or remove its iteration's folder, those of later ones and checkpoints, and the same "
    "command goes on from there"
)
"""What to do about a file of an iteration that was damaged."""

NEVER = FirstUse()
START = FirstUse("iteration-*/*")
SECOND_TURN = FirstUse(
    "iteration-01/trajectories.jsonl", "iteration-00/test*.jsonl", "iteration-00/validation.jsonl"
)
SELECTION = FirstUse("iteration-01/dataset.jsonl")
EVALUATION = FirstUse("iteration-00/test*.jsonl", "iteration-00/validation.jsonl")
TRAINING = FirstUse("iteration-01/training.json", "checkpoints/last.ckpt")


def more_iterations(before: int | None, now: int | None) -> FirstUse:
    """The first use of a changed number of iterations: more of them continue a run."""
    return START if before is None or now is None else FirstUse(f"iteration-{min(before, now) + 1:02d}")


FirstUses = Mapping[str, FirstUse | Callable[[Any, Any], FirstUse]]
"""First uses of a part's options by name, or functions of the values before and now that give them."""


def first_use(first_uses: FirstUses, option: str, before: Any, now: Any) -> FirstUse:
    """From where on it matters that an option is ``now`` what it was not ``before``.

    Options that ``first_uses`` does not have are those of their group (``lora.r`` those of ``lora``), else
    START.
    """
    found = first_uses.get(option) or first_uses.get(option.partition(".")[0], START)
    return found if isinstance(found, FirstUse) else found(before, now)


@dataclass(frozen=True)
class SystemRecord:
    """What a run says of its system, for those who read run folders without the objects that made them.

    Attributes:
        name: Of the algorithm, such as ``EIF``.
        iterations: N, as many as were asked for.
        threshold: t, the reward from which on an answer is right.
        uses_references: Whether the system sees the references at inference.
        seed: What all draws follow from.
        options: All other options that change a result, by dotted name.
    """

    name: str
    iterations: int
    threshold: float
    uses_references: bool
    seed: int
    options: dict[str, Any]


class Iteration:
    """The files of iteration ``n``; iteration 0 is the untrained M_0 and has only its evaluation."""

    def __init__(self, run_dir: Path, n: int) -> None:
        self.n = n
        self.folder = run_dir / f"iteration-{n:02d}"
        self.lines = self.folder / _LINES
        """How many lines were written to each of the files of answers and of D_n."""
        self.dataset = self.folder / "dataset.jsonl"
        """D_n: what is learnt of the trajectories."""
        self.training = self.folder / "training.json"
        """Rewards of the trajectories, what D_n holds, and how the fine-tuning went."""
        self.probe = self.folder / "probe.json"
        """Log-probabilities of a few fixed sequences under M_n while it is still in the trainer, or M_0's."""
        self.model = self.folder / "model"
        """M_n as a Hugging Face folder."""
        self.validation = self.folder / "validation.jsonl"
        """Answers of M_n to the validation questions, with one correction each."""
        self.test_greedy = self.folder / "test-greedy.jsonl"
        """Greedy answers of M_n to the test questions, with one correction each."""
        self.metrics = self.folder / "metrics.json"
        """What the curves show for iteration n."""

    def answers(self, turn: int) -> Path:
        """Answers to the training questions after so many turns, with their rewards."""
        return self.folder / {1: "initial.jsonl", 2: "trajectories.jsonl"}.get(turn, f"turn-{turn}.jsonl")

    def test_answers(self, turn: int) -> Path:
        """Answers of M_n to the test questions after so many turns; the first two are in one file."""
        return self.folder / ("test.jsonl" if turn <= 2 else f"test-turn-{turn}.jsonl")


class Run:
    """A run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = self.folder / "config.yaml"
        self.system = self.folder / "system.json"
        self.starts = self.folder / "starts.json"
        """Each start of the program: when, which versions, on what, with which model and questions; and how
        long it has worked until the last iteration that was done."""
        self.checkpoints = self.folder / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.draws = self.folder / "draws"
        """Draws of the stage under way, and all draws of M_0."""
        self.handover = self.folder / "handover"
        """The weights between two on-policy updates; nothing of it outlives a start."""
        self._lock: IO[str] | None = None

    def iteration(self, n: int) -> Iteration:
        """The files of iteration ``n``."""
        return Iteration(self.folder, n)

    def wandb_id(self) -> str | None:
        """The id of its last run in Weights & Biases, which a resume goes on with; None if it has none."""
        names = sorted(path.name for path in self.folder.glob("wandb/*run-*-*"))  # they begin with the time
        return names[-1].rpartition("-")[2] if names else None

    def read_system(self) -> SystemRecord:
        """The content of ``system.json``.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            record = SystemRecord(**json.loads(self.system.read_text(encoding="utf-8")))
            kinds = (str, int, (int, float), bool, int, dict)
            for (name, value), kind in zip(vars(record).items(), kinds, strict=True):
                if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                    raise ValueError(f"{name} is {value!r}")
            if record.iterations < 0 or not math.isfinite(record.threshold):
                raise ValueError(f"iterations is {record.iterations}, and threshold {record.threshold}")
            return record
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.system} cannot be read ({' '.join(str(error).split())}): it is written when a run "
                "starts, so start the run again with the same command."
            ) from error

    def lock(self) -> None:
        """Keep all others from running in this folder until this process ends or the object is gone.

        The lock is the kernel's, on the file ``lock``. It ends with the process, however that ends, and no
        engine or rank inherits it, so what a killed run has left behind does not hold up the next start. Over
        NFS it keeps other machines out too, unless the folder is mounted with ``nolock`` or ``local_lock``:
        then it holds on each machine for itself.

        Raises:
            UserError: Another process holds the lock, the file system has no locks, or the folder cannot be
                written to.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"run_dir is {self.folder}, which is a file: name a folder.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{self.folder} has a run under way ({file.read().strip() or 'just started'}): wait for its "
                "end or stop it, or choose another --run_dir."
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be locked ({error.strerror}): choose a --run_dir on a file system "
                "that has locks."
            ) from error
        with naming(self.folder / "lock"):
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        self._lock = file

    def unlock(self) -> None:
        """Let others run in this folder again."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def claim(
        self,
        config: dict[str, Any],
        system: SystemRecord,
        first_use: Callable[[str, Any, Any], FirstUse],
        start: dict[str, Any],
    ) -> None:
        """Make this the folder of a run with ``config``, or find that it is already.

        Args:
            config: The whole configuration.
            system: What there is to say of it.
            first_use: From where on it matters that an option, by dotted name, was changed from one value to
                another.
            start: What there is to say of this start of the program.

        Raises:
            UserError: The folder belongs to a run whose results follow from another configuration.
        """
        for place in (self.checkpoints, self.draws):
            if place.exists() and not place.is_dir():
                raise UserError(f"{place} is a file where a run has a folder: choose another --run_dir.")
        if self.config.is_file():
            if not self.system.is_file() and START.reached(self.folder):
                raise UserError(
                    f"{self.folder} holds a run of an earlier version of stasc: choose another --run_dir, or "
                    "remove that folder."
                )
            before, now = flatten(self.read_config()), flatten(config)
            for option in sorted(before.keys() | now.keys()):
                old, new = before.get(option), now.get(option)
                if old != new and first_use(option, old, new).reached(self.folder):
                    typed = option.replace(".init_args", "").removesuffix(".class_path")
                    raise UserError(
                        f"{self.folder} holds a run with another --{typed} ({old}, now {new}): "
                        "choose another --run_dir, or remove that folder."
                    )
        elif self.folder.is_dir() and any(self.folder.glob("iteration-*")):
            raise UserError(f"{self.folder} holds a run without its config.yaml: choose another --run_dir.")
        try:
            write_lines(self.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).splitlines())
            write_json(self.system, vars(system))
            before = read_json(self.starts, "starts")["starts"] if self.starts.is_file() else []
            write_json(self.starts, {"starts": [*before, start]})
        except OSError as error:
            raise self._unwritable(error) from error

    def note_seconds(self, seconds: float, processes: int) -> None:
        """Note how long this start has worked so far, on how many processes; the start is the last one."""
        starts = read_json(self.starts, "starts")["starts"]
        starts[-1] |= {"seconds": round(seconds, 1), "processes": processes}
        write_json(self.starts, {"starts": starts})

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"run_dir {self.folder} cannot be written to ({error.strerror}): see to that, or choose another."
        )

    def read_config(self) -> dict[str, Any]:
        """The configuration of the run that is here.

        Raises:
            UserError: It cannot be read.
        """
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it is no mapping")
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(
                f"{self.config} cannot be read ({' '.join(str(error).split())}): put back what was there, or "
                "choose another --run_dir."
            ) from error
        return config

    @staticmethod
    def lines(path: Path) -> int | None:
        """How many lines were written to a file of an iteration; None if that was not noted."""
        noted = path.parent / _LINES
        return read_json(noted).get(path.name) if noted.is_file() else None

    @staticmethod
    def note_lines(path: Path, count: int) -> None:
        """Note how many lines were written to a file of an iteration: one that was cut does not say so."""
        noted = path.parent / _LINES
        before = read_json(noted) if noted.is_file() else {}
        write_json(noted, dict(sorted({**before, path.name: count}.items())))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of a configuration by their dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write a text file as a whole or not at all; how many lines it has."""
    count = 0
    with write_file(path, "w", encoding="utf-8", newline="\n") as file:
        for count, line in enumerate(lines, start=1):  # noqa: B007
            file.write(f"{line}\n")
    return count


def write_json(path: Path, value: Any) -> None:
    """Write a readable JSON file as a whole or not at all."""
    write_lines(path, [json.dumps(value, indent=2)])


def read_json(path: Path, *names: str) -> dict[str, Any]:
    """The mapping that ``write_json`` wrote.

    Raises:
        UserError: It cannot be read, or has nothing by one of ``names``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): {WRITTEN_ANEW}.") from error
    if not isinstance(content, dict) or not content.keys() >= set(names):
        raise UserError(f"{path} does not hold what was written to it: {WRITTEN_ANEW}.")
    return content


@contextmanager
def write_file(path: Path, mode: str, **options: Any) -> Iterator[IO[Any]]:
    """Give a file to fill, opened as by ``open``, which becomes ``path`` at the end if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with naming(path), unfinished.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)  # it may have filled the disk
        raise
    unfinished.replace(path)
    _sync(path.parent)


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the place of ``folder`` at the end if nothing went wrong."""
    unfinished, replaced = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with naming(folder):
            yield unfinished
            for path in sorted(unfinished.rglob("*")):
                _sync(path)
            _sync(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():  # a folder that is not empty cannot be replaced in one step
        folder.replace(replaced)
    unfinished.replace(folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, as a whole or not at all."""
    leaving = folder.with_name(folder.name + ".old")
    shutil.rmtree(leaving, ignore_errors=True)
    if folder.exists():
        folder.replace(leaving)
        shutil.rmtree(leaving)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
