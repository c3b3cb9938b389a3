"""Common code of the scripts: start many runs of ``python -m stasc fit``, each in its own folder."""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from stasc.errors import UserError
from stasc.house import config_file
from stasc.run import Run

INTERRUPT_TIMEOUT = 30
"""Seconds after which an interrupted run is killed."""


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """The command-line parser with the options that all ablation scripts share."""
    options = argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog="Other options are passed to every run, such as --algorithm.iterations 5.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "--config",
        nargs="+",
        action="append",
        type=_config,
        required=True,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a config and its overlays, by path or name; repeat the option for more models",
    )
    options.add_argument(
        "--seeds", nargs="+", type=int, default=[42], metavar="SEED", help="seeds; one run for each"
    )
    options.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    options.add_argument(
        "--devices",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="DEVICE",
        help="devices, with one run at a time on each: a GPU number (an index into CUDA_VISIBLE_DEVICES if "
        "that is set), several for one run (0,1), or cpu, which may be repeated; by default one run at a "
        "time on the devices of the config",
    )
    return options


def _config(name: str) -> str:
    try:
        path = config_file(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return path


@dataclass(frozen=True)
class Slot:
    """Options and environment variables that make a run use certain devices only."""

    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def slots(devices: Sequence[str]) -> list[Slot]:
    """One slot for each of ``--devices``; without devices one slot that leaves them to the config.

    Raises:
        UserError: A GPU number is not an index into CUDA_VISIBLE_DEVICES.
    """
    result = []
    one_device = ("--trainer.devices", "1", "--trainer.strategy", "auto")
    for device in devices:
        if device == "cpu":
            threads = max(1, len(os.sched_getaffinity(0)) // devices.count("cpu"))
            result.append(
                Slot(("--trainer.accelerator", "cpu", *one_device), {"OMP_NUM_THREADS": str(threads)})
            )
        else:
            numbers = device.split(",")
            count = one_device if len(numbers) == 1 else ("--trainer.devices", str(len(numbers)))
            visible = ",".join(map(_visible_device, numbers))
            result.append(Slot(("--trainer.accelerator", "gpu", *count), {"CUDA_VISIBLE_DEVICES": visible}))
    return result or [Slot()]


def _visible_device(number: str) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a GPU number, which counts within the caller's own value."""
    callers_value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if callers_value is None or not number.isdecimal():
        return number
    visible = [name.strip() for name in callers_value.split(",") if name.strip()]
    if int(number) >= len(visible):
        raise UserError(
            f"--devices {number} is out of range: CUDA_VISIBLE_DEVICES={callers_value} makes "
            f"{len(visible)} GPUs visible, and numbers start at 0."
        )
    return visible[int(number)]


@dataclass(frozen=True)
class Job:
    """One run: its name, folder, config files, and command without the options of its slot."""

    name: str
    folder: Path
    configs: tuple[str, ...]
    command: tuple[str, ...]

    @classmethod
    def of(
        cls, folder: Path, root: Path, configs: Sequence[str], options: Sequence[str], seed: int, reuse: Path
    ) -> Self:
        """A run with ``options`` of ``fit`` in ``folder``, named after its place in ``root``."""
        command = [sys.executable, "-m", "stasc", "fit"]
        for config in configs:
            command += ["--config", config]
        # The options under comparison come last, so that no other option overrides them.
        command += ["--reuse", str(reuse), *options, "--seed_everything", str(seed), "--run_dir", str(folder)]
        return cls(str(folder.relative_to(root)), folder, tuple(configs), tuple(command))

    @property
    def log(self) -> Path:
        """The output of the run; the first line is its command."""
        return self.folder / "fit.log"

    def finished(self) -> bool:
        """Whether this exact command has completed the last iteration of the run."""
        run = Run(self.folder)
        try:
            last = run.iteration(run.read_system().iterations)
        except UserError:  # not started yet
            return False
        if not (self.log.is_file() and last.metrics.is_file()):
            return False
        edited = max((Path(config).stat().st_mtime for config in self.configs), default=0.0)
        with self.log.open(encoding="utf-8") as lines:
            return lines.readline() == f"{shlex.join(self.command)}\n" and edited < self.log.stat().st_mtime

    def under_way(self) -> bool:
        """Whether a process still writes the log, such as one that a killed script left behind."""
        if not self.log.is_file():
            return False
        with self.log.open("a") as log:
            return not _lock(log)

    def start(self, slot: Slot) -> subprocess.Popen[bytes]:
        """Start or resume the run.

        Raises:
            UserError: It is under way already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            if not _lock(log):  # the process and its own ones keep the lock as long as they can write the log
                raise UserError(
                    f"{self.folder} has a run under way, which a killed script may have left behind: wait "
                    "for its end, and run the same command again."
                )
            log.truncate(0)
            print(shlex.join(self.command), file=log, flush=True)
            return subprocess.Popen(
                [*self.command, *slot.options],
                env={**os.environ, **slot.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # keeps Ctrl-C from the run; `stop` interrupts it
            )

    def last_line(self) -> str:
        """The last non-blank line of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in reversed(lines) if line.strip())


def _lock(log: IO[str]) -> bool:
    """Lock a log for this process and those that inherit it, unless others have locked it."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def run(
    systems: Mapping[str, Sequence[str]], arguments: argparse.Namespace, run_options: Sequence[str]
) -> int:
    """Run every system with every config and seed, and return the exit status.

    Args:
        systems: Options of ``fit`` for each system, by its name.
        arguments: The parsed options of ``parser``.
        run_options: Options for every run.
    """
    try:
        free_slots = slots(vars(arguments).get("devices", []))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    jobs = []
    for configs in arguments.config:
        out = arguments.out / Path(configs[0]).stem if len(arguments.config) > 1 else arguments.out
        for system, options in systems.items():
            options = (*run_options, *options)
            for seed in arguments.seeds:
                folder = out / system / f"seed-{seed}"
                jobs.append(Job.of(folder, arguments.out, configs, options, seed, reuse=out))
    if len({job.folder for job in jobs}) < len(jobs):
        print("two runs would share a folder: give every seed, number and config once.", file=sys.stderr)
        return 2
    signals_received = note_signals()
    try:
        failed = _run_all(jobs, free_slots, signals_received)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if signals_received:
        return interrupted(signals_received)
    print(f"\n{len(jobs) - len(failed)} of {len(jobs)} runs are finished.")
    for job in failed:
        print(f"{job.name} failed: {job.last_line()}\n  see {job.log}")
    return 1 if failed else 0


def note_signals() -> list[int]:
    """From now on, a list of the signals that ask this process to end, instead of its end."""
    signals_received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: signals_received.append(received))
    return signals_received


def interrupted(signals_received: Sequence[int]) -> int:
    """Say so, and return the exit status."""
    print("interrupted; run the same command again to resume.", flush=True)
    return 128 + signals_received[0]


def _run_all(jobs: Sequence[Job], free_slots: list[Slot], signals_received: Sequence[int]) -> list[Job]:
    """Run the jobs, one at a time in each slot, until a signal is received, and return those that failed."""
    waiting = [job for job in jobs if not job.finished()]
    for job in jobs:
        if job not in waiting:
            print(f"{job.name}: already finished", flush=True)
    failed = []
    running: dict[subprocess.Popen[bytes], tuple[Job, Slot, float]] = {}
    try:
        while (waiting or running) and not signals_received:
            while waiting and free_slots:
                job, slot = waiting.pop(0), free_slots.pop(0)
                print(f"{job.name}: started", flush=True)
                running[job.start(slot)] = job, slot, time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                job, slot, start = running.pop(process)
                free_slots.append(slot)
                if process.returncode:
                    failed.append(job)
                result = f"failed with status {process.returncode}" if process.returncode else "finished"
                print(f"{job.name}: {result} after {time.monotonic() - start:.0f} s", flush=True)
            time.sleep(0.1)
    finally:
        stop(running)
    return failed


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Interrupt runs as Ctrl-C does, and kill those that do not end in time."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + INTERRUPT_TIMEOUT
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
