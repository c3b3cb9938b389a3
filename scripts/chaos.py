"""Random faults at random moments of small random runs, then the same command: every byte must be the same.

python scripts/chaos.py --rounds 300

A start is a fork of this process, which has the libraries; from there on it is the program. Ranks and
engines are processes as always. The disk is full for a process whose files may not grow any more
(RLIMIT_FSIZE): that needs no rights, and whatever else the machine does goes on. It needs Linux and the
repository, as FSDP on CPU processes is one of the tests' helpers.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

import stasc.command_line.cli  # what takes seconds in every start  # noqa: F401
from stasc import __main__ as program
from stasc.algorithm import VARIANTS
from stasc.ending import end_with
from stasc.house import HOUSE

PATIENCE = 3600
"""Seconds after which a start counts as hung."""

PROCESSES = {
    "one": (),
    "ddp": ("--trainer.devices", "2", "--trainer.strategy", "ddp"),
    "fsdp": ("--trainer.devices", "2", "--trainer.strategy.class_path", "cpu_fsdp.CPUFSDPStrategy"),
}
LONG = ("--algorithm.iterations", "2", "--algorithm.epochs", "{epochs}")
UPDATES = ("stage_one", "stage_two", "updates_per_iteration", "questions")
SYSTEMS = {variant: ("--algorithm.variant", variant, *LONG) for variant in VARIANTS} | {
    name: ("--config", f"configs/baselines/{name}.yaml", *options)
    for name, options in {
        "star": LONG,
        "score": [word for name in UPDATES for word in (f"--algorithm.{name}", "4")],
        "self_refine": (),
        "reflexion": (),
    }.items()
}
"""How each is chosen; SCoRe, which is on-policy, by a few updates in each stage."""
SIZES = (0, 1_000, 30_000, 1_000_000)
"""Bytes to which a file can still grow when the disk gets full."""


class Configuration(NamedTuple):
    """A small run of the demo."""

    system: str
    processes: str
    sampler: str
    epochs: str
    lora: str

    @classmethod
    def drawn(cls, draw: random.Random) -> Configuration:
        """Any; vLLM and several processes, which take longer to start, less often."""
        return cls(
            draw.choice(list(SYSTEMS)),
            *draw.choices(list(PROCESSES), (6, 1, 1)),
            *draw.choices(("TransformersSampler", "VLLMSampler"), (19, 1)),
            draw.choice("12"),
            draw.choice(("full", "lora")),
        )

    def command(self, run: Path) -> list[str]:
        """What fits it in the folder ``run``."""
        system = [word.format(epochs=self.epochs) for word in SYSTEMS[self.system]]
        return [
            *("fit", "--config", "configs/quickstart.yaml", *system, "--run_dir", str(run)),
            *("--sampler", self.sampler, *PROCESSES[self.processes]),
            *("--data.train.init_args.size", "16", "--data.test.init_args.size", "4"),
            *("--data.batches.size", "4", "--model.learning_rate", "0.002"),
            *(("--model.lora.r", "4") if self.lora == "lora" else ()),
        ]


class Start:
    """A start of the program."""

    def __init__(self, command: list[str]) -> None:
        self._stderr, stderr = os.pipe()
        fcntl.fcntl(stderr, fcntl.F_SETPIPE_SZ, 1 << 20)  # it is read at the end
        sys.stdout.flush()
        if not (pid := os.fork()):
            self._be_the_program(command, stderr)
        os.close(stderr)
        self.process = psutil.Process(pid)
        self.family = [self.process]

    @staticmethod
    def _be_the_program(command: list[str], stderr: int) -> None:
        status = 1
        try:
            end_with(os.getppid())
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(stderr, 2)
            os.chdir(HOUSE)
            sys.modules["__main__"] = program  # what Lightning starts ranks of
            sys.argv = [program.__file__, *command]
            program.main()
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            os._exit(status)

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.status() != psutil.STATUS_ZOMBIE

    def look(self) -> list[psutil.Process]:
        """Its processes that run now: the trainer or rank 0, other ranks, engines."""
        if self.runs():
            self.family = [self.process, *self.process.children(recursive=True)]
        return self.family

    def end(self) -> tuple[int, str]:
        """Wait for its end; its status, negative for a signal, and what it wrote to standard error."""
        deadline = time.monotonic() + PATIENCE
        while self.runs():
            self.look()
            if time.monotonic() > deadline:
                for process in self.family:
                    process.kill()
                raise Broken(f"hung for {PATIENCE} s")
            time.sleep(0.3)
        status = self.process.wait()
        _, left = psutil.wait_procs(self.family[1:], timeout=10)
        if left:
            raise Broken(f"{left} outlive the program")
        said = b""
        while select.select([self._stderr], [], [], 10)[0] and (more := os.read(self._stderr, 1 << 16)):
            said += more
        os.close(self._stderr)
        return status, said.decode(errors="replace")


class Broken(Exception):
    """What must not happen, in one sentence."""


@dataclass
class Round:
    """Faults in one run, and starts until it is done."""

    number: int
    seed: int
    out: Path
    faults: list[str] = field(default_factory=list)

    def play(self) -> None:
        """Raise Broken if it does not end as the undisturbed run did."""
        self.draw = random.Random(f"{self.seed} {self.number}")
        self.configuration = Configuration.drawn(self.draw)
        undisturbed = self.out / "undisturbed" / "-".join(self.configuration) / "run"
        if not (undisturbed.parent / "done").exists():
            shutil.rmtree(undisturbed.parent, ignore_errors=True)
            status, said = Start(self.configuration.command(undisturbed)).end()
            if status:
                raise Broken(f"the undisturbed run ended with status {status}: {self.kept(said)}")
            (undisturbed.parent / "done").touch()
        run = self.out / f"round-{self.number}" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        for _ in range(self.draw.choice((1, 1, 2))):
            start = Start(self.configuration.command(run))
            self.strike(start, self.moment(run, undisturbed))
            self.check_end(*start.end())
            self.cut(run)
        status, said = Start(self.configuration.command(run)).end()
        if status:
            raise Broken(f"the last start ended with status {status}: {self.kept(said)}")
        found, expected = contents(run), contents(undisturbed)
        if different := sorted(name for name in found | expected if found.get(name) != expected.get(name)):
            raise Broken(f"{', '.join(different)} differ from {undisturbed}")
        shutil.rmtree(run.parent)

    def moment(self, run: Path, undisturbed: Path) -> tuple[Path, float]:
        """A file that is to appear, and seconds from then on; the folder itself is there at once."""
        files = [run / path.relative_to(undisturbed) for path in sorted(undisturbed.rglob("*"))]
        missing = [path for path in files if not path.exists() and "tfevents" not in path.name]
        if not missing or self.draw.random() < 0.1:
            return run.parent, self.draw.uniform(0, 10)
        return self.draw.choice(missing), self.draw.uniform(0, 0.3)

    def strike(self, start: Start, moment: tuple[Path, float]) -> None:
        """A fault at a moment, if the start lasts that long."""
        there, seconds = moment
        fault = self.draw.choice(("SIGKILL", "SIGKILL", "SIGTERM", "disk full"))
        victim, size = self.draw.random(), self.draw.choice(SIZES)
        while start.runs() and not there.exists():
            time.sleep(0.01)
        time.sleep(seconds)
        family, what = start.look(), "none, it was over"
        with suppress(psutil.NoSuchProcess):
            if start.runs() and fault == "disk full":
                for process in family:
                    process.rlimit(psutil.RLIMIT_FSIZE, (size, size))
                what = f"{fault} at {size:,} bytes"
            elif start.runs():
                i = int(victim * len(family))
                who = "trainer" if i == 0 else "rank" if "fit" in family[i].cmdline() else "engine"
                family[i].send_signal(signal.Signals[fault])
                what = f"{fault} of {who}"
        self.faults.append(f"{what} {seconds:.2f} s after {there.name}")

    def check_end(self, status: int, said: str) -> None:
        """A start that met a fault ends well, by the fault itself, or with one sentence."""
        sentences = [line for line in said.splitlines() if line.startswith("stasc: ")]
        self.faults[-1] += f" [{status}{': ' * bool(sentences)}{' '.join(sentences)}]"
        well = status in (0, -signal.SIGKILL) or (status in (2, 137, 143) and len(sentences) == 1)
        if "Traceback" in said or not well:
            raise Broken(f"it ended with status {status}: {self.kept(said)}")

    def kept(self, said: str) -> str:
        """The last line of what a start said; all of it goes to a file."""
        (log := self.out / f"round-{self.number}" / "stderr").parent.mkdir(parents=True, exist_ok=True)
        log.write_text(said)
        return f"{said.strip().rpartition(chr(10))[2][:300]} (see {log})"

    def cut(self, run: Path) -> None:
        """Cut what a crash of the machine can cut: the end of a journal, curves, or what is being written."""
        names = (("draws", "*/*.jsonl"), (".", "*tfevents*"), (".", "**/*.tmp"), (".", "**/*.tmp/*"))
        files = [path for folder, name in names for path in sorted((run / folder).glob(name))]
        files = [path for path in files if path.is_file() and path.stat().st_size]
        if files and self.draw.random() < 0.4:
            path = self.draw.choice(files)
            content = path.read_bytes()
            last = content.rstrip(b"\n").rfind(b"\n") + 1 if "draws" in path.parts else 0
            os.truncate(path, at := self.draw.randrange(last, len(content)))
            self.faults.append(f"{path.name} cut at {at:,} of {len(content):,} bytes")


def contents(run: Path) -> dict[str, bytes]:
    """Every file of all iterations."""
    files = (path for path in run.glob("iteration-*/**/*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def main() -> int:
    """Play rounds; 1 if one of them is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="what all that is random follows from")
    parser.add_argument("--round", type=int, help="play this one alone, as it was among others")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/chaos"),
        help="folder for undisturbed runs, which stay until you remove them, and for broken ones",
    )
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HOUSE), str(HOUSE / "tests")])}
    sys.path.insert(0, str(HOUSE / "tests"))
    numbers = range(1, arguments.rounds + 1) if arguments.round is None else [arguments.round]
    broken = 0
    for number in numbers:
        begin, this = time.monotonic(), Round(number, arguments.seed, out)
        try:
            this.play()
            result = "same"
        except Broken as error:
            broken, result = broken + 1, f"BROKEN, {error}"
        print(
            f"{number}: {'-'.join(this.configuration)}: {'; '.join(this.faults)}: {result} "
            f"({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    print(f"{len(numbers)} rounds, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
