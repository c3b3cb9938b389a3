"""What the ablations have in common: many runs of ``python -m stasc fit``, each with a folder of its own."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stasc.run import Run

PATIENCE = 30
"""Seconds that a run has to end when it is interrupted."""


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """The options of every ablation."""
    options = argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog="Any other option goes on to every run, such as --algorithm.iterations 5.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "--config",
        nargs="+",
        action="append",
        type=_file,
        required=True,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="what to run: a config, and others laid over it; once more for another model",
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[42], metavar="SEED", help="one run each")
    options.add_argument("--out", type=Path, default=Path(out), help="folder of the runs")
    options.add_argument(
        "--devices",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="DEVICE",
        help="one run at a time on each: the number of a GPU, numbers of several for one run (0,1), or cpu, "
        "which may stand here more than once; without it one run at a time, where the config says",
    )
    return options


def _file(name: str) -> str:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return name


@dataclass(frozen=True)
class Place:
    """What a run is told so that it goes on in one place and leaves the others alone."""

    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def places(devices: Sequence[str]) -> list[Place]:
    """A place for each device; without devices the one that the config names."""
    found = []
    for device in devices:
        one = ("--trainer.devices", "1", "--trainer.strategy", "auto")
        if device == "cpu":
            threads = max(1, len(os.sched_getaffinity(0)) // devices.count("cpu"))
            found.append(Place(("--trainer.accelerator", "cpu", *one), {"OMP_NUM_THREADS": str(threads)}))
        else:
            several = ("--trainer.devices", str(len(device.split(","))))
            options = ("--trainer.accelerator", "gpu", *(several if "," in device else one))
            found.append(Place(options, {"CUDA_VISIBLE_DEVICES": device}))
    return found or [Place()]


@dataclass(frozen=True)
class Job:
    """One run: what it is called, its folder, and its command, whatever the place."""

    name: str
    folder: Path
    configs: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def log(self) -> Path:
        """What the run says, after its command in the first line."""
        return self.folder / "fit.log"

    def finished(self) -> bool:
        """Whether this very command has brought the run to its last iteration."""
        run = Run(self.folder)
        last = run.iteration(run.options().get("algorithm.init_args.iterations", 0))
        if not (self.log.is_file() and last.metrics.is_file()):
            return False
        edited = max(Path(config).stat().st_mtime for config in self.configs)
        with self.log.open(encoding="utf-8") as lines:
            return lines.readline() == f"{shlex.join(self.command)}\n" and edited < self.log.stat().st_mtime

    def start(self, place: Place) -> subprocess.Popen[bytes]:
        """Start it, or let it go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            print(shlex.join(self.command), file=log, flush=True)
            return subprocess.Popen(
                [*self.command, *place.options],
                env={**os.environ, **place.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, and we pass it on
            )

    def last_words(self) -> str:
        """The last line that the run said."""
        said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in reversed(said) if line.strip())


def run(systems: Mapping[str, Sequence[str]], given: argparse.Namespace, others: Sequence[str]) -> int:
    """Run every system with every config and seed, and give the exit status.

    Args:
        systems: Options of ``fit`` by the name of what they make.
        given: The options of ``parser``.
        others: Options for every run.
    """
    jobs = []
    for configs in given.config:
        out = given.out / Path(configs[0]).stem if len(given.config) > 1 else given.out
        for system, options in systems.items():
            jobs += [_job(given.out, out, system, seed, configs, (*others, *options)) for seed in given.seeds]
    if len({job.folder for job in jobs}) < len(jobs):
        print("two runs would share a folder: name every seed, number and config once.", file=sys.stderr)
        return 2
    told_to_end: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: told_to_end.append(received))
    failed = _run_all(jobs, places(vars(given).get("devices", [])), told_to_end)
    if told_to_end:
        print("interrupted; the same command goes on.", flush=True)
        return 128 + told_to_end[0]
    print(f"\n{len(jobs) - len(failed)} of {len(jobs)} runs are finished.")
    for job in failed:
        print(f"{job.name} failed: {job.last_words()}\n  see {job.log}")
    return 1 if failed else 0


def _job(
    root: Path, out: Path, system: str, seed: int, configs: Sequence[str], options: Sequence[str]
) -> Job:
    folder = out / system / f"seed-{seed}"
    command = [sys.executable, "-m", "stasc", "fit"]
    for config in configs:
        command += ["--config", config]
    # What is compared comes last, so that no other option can change it.
    command += ["--reuse", str(out), *options, "--seed_everything", str(seed), "--run_dir", str(folder)]
    return Job(str(folder.relative_to(root)), folder, tuple(configs), tuple(command))


def _run_all(jobs: Sequence[Job], free: list[Place], told_to_end: Sequence[int]) -> list[Job]:
    """Run the jobs, one at a time in each place, until told to end, and give those that failed."""
    waiting = [job for job in jobs if not job.finished()]
    for job in jobs:
        if job not in waiting:
            print(f"{job.name}: was finished before", flush=True)
    failed = []
    running: dict[subprocess.Popen[bytes], tuple[Job, Place, float]] = {}
    try:
        while (waiting or running) and not told_to_end:
            while waiting and free:
                job, place = waiting.pop(0), free.pop(0)
                print(f"{job.name}: started", flush=True)
                running[job.start(place)] = job, place, time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                job, place, began = running.pop(process)
                free.append(place)
                if process.returncode:
                    failed.append(job)
                end = f"failed with status {process.returncode}" if process.returncode else "finished"
                print(f"{job.name}: {end} after {time.monotonic() - began:.0f} s", flush=True)
            time.sleep(0.1)
    finally:
        _end(running)
    return failed


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Interrupt runs, as Ctrl-C would; what does not end then is killed."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
