"""What an optimiser step takes: prefix-sharing batches, padded rows, and TRL's SFTTrainer.

    python benchmarks/train_step.py [--trl PYTHON] [--repeats 5] [--quick] [--profile] [--append FILE]

TRL is no part of this project: PYTHON is the interpreter of an environment that is made for it.

    python -m venv trl-env
    trl-env/bin/pip install torch==2.13.0 transformers==5.19.0 trl==1.16.0 accelerate datasets

All ways train the same random Qwen2 on the same corrections in float32, each in a process of its own (see
trainers.py), and take turns step by step; a way that does not run is left out and named. A step is all that
lies between two of them: making the batch, forward, backward, clipping, AdamW and logging. If the losses of a
step differ, the benchmark fails.

On a CPU one model has a second race, in which the C library keeps the memory that is freed. By default it
returns large pieces at once and asks for them again in the next step, which can take longer than to compute,
above all on virtual machines: the second race tells how much of a ratio is due to that.

With CUDA it does so in bf16-mixed at the shape of Qwen2.5-1.5B, one way after another, as several do not fit
into the GPU. There are two more ways, FlexAttention and FSDP on one device, and the model FLOP utilisation.
That has not been run yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from common import ENVIRONMENT, ROOT, machine, publish, spread, table
from tokenizers import Tokenizer, models
from trainers import (
    CUDA,
    FLEX,
    FSDP,
    PADDED,
    SETTINGS,
    SHARING,
    TRL_DEFAULTS,
    TRL_LABELLED,
    TRL_STORING,
    corrections,
)
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

TOLERANCE = 1e-2 if CUDA else 1e-4
"""Of losses, relative."""

Taken = dict[str, list[dict[str, Any]]]
"""What each way says of each of its steps."""

WARM_UP = 2
"""Steps that are not measured: the first grows the heap, and they have been seen to get shorter after it."""

KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Has glibc return no memory."""

NOTE = """Memory is the peak of a step above what the process holds between steps: weights and optimiser.
Off CUDA, TRL computes logits at all places and offers no choice; on CUDA at labels alone. Its last way here
replaces the one line of TRL that decides this, and so shows what else makes the difference. TRL's batches
without padding are not here: they drop 5 % of the tokens, and a first step of them took no less time.
"""


class Shape(NamedTuple):
    """Of a Qwen2, and what it is an example of."""

    title: str
    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int


TINY = Shape("tiny", 4096, 64, 2, 176, 2, 1)
SMALL = Shape("Qwen2.5's vocabulary", 151_936, 512, 8, 1408, 8, 2)
LARGE = Shape("embedding to layers as in Qwen2.5-1.5B", 24_000, 768, 12, 3072, 12, 2)
FULL = Shape("Qwen2.5-1.5B", 151_936, 1536, 28, 8960, 12, 2)


class DoesNotRun(Exception):
    """A way to train ended; this is the last that it said."""


class Contender:
    """A way to train, in a process of its own.

    Raises:
        DoesNotRun: It has ended, also later, in ``step``.
    """

    def __init__(
        self, python: str, way: str, model: Path, steps: int, *, grouped: bool, keeping: bool
    ) -> None:
        self._log = model.with_name("log")
        self._process = subprocess.Popen(
            [python, str(ROOT / "benchmarks/trainers.py"), way, str(model), str(steps), str(grouped)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("ab"),
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (KEEPING if keeping else {}),
            text=True,
        )
        self.versions: str | None = self._answer()["versions"]

    def step(self, command: str) -> dict[str, Any]:
        """Seconds, loss and memory of the next step; ``profile`` adds microseconds by operator."""
        print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        said = self._log.read_text().strip()
        print(said[-3000:], file=sys.stderr, flush=True)
        raise DoesNotRun(said.rpartition("\n")[2][:200])


def config_of(shape: Shape) -> Qwen2Config:
    """The config of a Qwen2 of this shape."""
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        dtype="float32",
    )


def random_model(shape: Shape, folder: Path) -> tuple[int, int]:
    """Write a model; gives the number of weights in its layers, and in its embedding, which is tied."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config_of(shape))
    model.save_pretrained(folder)
    # The data are token ids, but TRL asks for a tokenizer.
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    tokenizer.save_pretrained(folder)
    embedding = model.get_input_embeddings().weight.numel()
    return model.num_parameters() - embedding, embedding


def race(
    pythons: dict[str, str], model: Path, commands: list[str], *, grouped: bool, keeping: bool
) -> tuple[Taken, str, list[str]]:
    """The same steps of every way, the versions of TRL's packages, and the ways that do not run.

    Leaves if the losses of a step differ.

    Args:
        pythons: The ways, and the interpreter of each.
        model: Folder.
        commands: What each step is.
        grouped: Whether the corrections of an initial answer stand together in D_n.
        keeping: Whether processes keep the memory that they have freed.
    """
    ways, options = list(pythons), {"grouped": grouped, "keeping": keeping}
    taken: Taken = {}
    versions, left_out = "", []
    for together in [[way] for way in ways] if CUDA else [ways]:
        field: dict[str, Contender] = {}
        for number, command in enumerate(["start", *commands]):
            turn = number % len(together)  # who begins changes
            for way in together[turn:] + together[:turn]:
                try:
                    if command == "start":
                        field[way] = Contender(pythons[way], way, model, len(commands), **options)
                        taken[way], versions = [], field[way].versions or versions
                    elif way in field:
                        taken[way].append(field[way].step(command))
                except DoesNotRun as end:
                    left_out.append(f"{way} did not run ({end}).")
                    field.pop(way, None), taken.pop(way, None)
            seconds = {way: round(taken[way][-1]["seconds"], 2) for way in field if taken[way]}
            print(f"({command} {number}: {seconds})", file=sys.stderr, flush=True)
        for contender in field.values():
            contender.close()
    if SHARING not in taken:
        sys.exit(f"There is nothing to compare with: {' '.join(left_out)}")
    for number in range(len(commands)):
        losses = {way: steps[number]["loss"] for way, steps in taken.items()}
        if max(losses.values()) - min(losses.values()) > TOLERANCE * losses[SHARING]:
            sys.exit(f"The losses of step {number} differ: {losses}.")
    return taken, versions, left_out


def section(shape: Shape, pythons: dict[str, str], options: argparse.Namespace, *, keeping: bool) -> str:
    """The text on a model of this shape: all ways on a shuffled D_n, and our own on a grouped one."""
    commands = ["step"] * (WARM_UP + options.repeats) + ["profile"] * options.profile
    ours = {way: python for way, python in pythons.items() if way not in SETTINGS}
    rows, profiles, versions, ends, apart, left_out = [], [], "", [], 0.0, []
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        weights = random_model(shape, model)
        for grouped, field in ((False, pythons), (True, ours)):
            taken, found, not_run = race(field, model, commands, grouped=grouped, keeping=keeping)
            versions, left_out = versions or found, left_out + not_run
            title = "grouped" if grouped else "shuffled"
            rows += measured(title, taken, shape, weights, options, grouped=grouped, keeping=keeping)
            profiles += [[title, way, _largest(steps[-1]["operators"])] for way, steps in taken.items()]
            losses = [[step["loss"] for step in steps] for steps in taken.values()]
            ends += [losses[0][0], losses[0][-1]]
            apart = max(apart, *((max(of) - min(of)) / min(of) for of in zip(*losses, strict=True)))
    head = ("D_n", "way", "tokens", "seconds", "times ours", "GiB in a step", *["MFU"] * CUDA)
    text = (
        f"#### {shape.title}: {weights[0] / 1e6:.0f}M weights in layers, {weights[1] / 1e6:.0f}M in the "
        f"embedding of {shape.vocabulary:,} tokens{', freed memory kept' * keeping}\n\n"
        f"{table(head, rows)}\n\n"
        f"In no step are the losses of two ways further apart than {apart:.0e} of them: they went from "
        f"{ends[0]:.4f} to {ends[1]:.4f} (shuffled) and from {ends[2]:.4f} to {ends[3]:.4f} (grouped).\n"
    )
    if left_out:
        text += f"\n{' '.join(left_out)}\n"
    if options.profile:
        text += f"\n{table(('D_n', 'way', 'time within operators, of one more step'), profiles)}\n"
    return f"{text}\nTRL's environment: {versions}.\n" if versions else text


def measured(
    title: str,
    taken: Taken,
    shape: Shape,
    weights: tuple[int, int],
    options: argparse.Namespace,
    *,
    grouped: bool,
    keeping: bool,
) -> list[list[str]]:
    """Rows of the table; of a process that keeps its memory there is no telling what a step needs."""
    steps = range(WARM_UP, WARM_UP + options.repeats)
    rows = []
    for way, found in taken.items():
        batches = corrections(shape.vocabulary, way, grouped=grouped)
        learnt = median(sum(len(example.target) for example in batches.examples(step)) for step in steps)
        tokens = median(batches[step].input_ids.numel() for step in steps)
        seconds = [found[step]["seconds"] for step in steps]
        # Step by step: what slows the machine down for a while slows neighbours down alike.
        factors = [found[step]["seconds"] / taken[SHARING][step]["seconds"] for step in steps]
        memory = "-" if keeping else f"{median(found[step]['gib'] for step in steps):.2f}"
        row = [title, way, f"{tokens:,.0f}", spread(seconds, 2), spread(factors, 1), memory]
        if CUDA:
            operations = 6 * (weights[0] * tokens + weights[1] * learnt)
            row.append(f"{operations / median(seconds) / options.peak / 1e12:.0%}")
        rows.append(row)
    return rows


def _largest(operators: dict[str, float]) -> str:
    whole = sum(operators.values())
    largest = sorted(operators, key=operators.get, reverse=True)[:8]
    return ", ".join(f"`{name}` {operators[name] / whole:.0%}" for name in largest)


def main() -> None:
    """Run all races and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trl", help="interpreter of an environment that has TRL")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of every way")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a tiny model alone")
    parser.add_argument("--profile", action="store_true", help="also say where a further step's time goes")
    parser.add_argument("--peak", type=float, default=989, help="the GPU's TFLOP/s in bfloat16")
    parser.add_argument("--append", type=Path, help="write the tables to the end of this file too")
    options = parser.parse_args()
    heading = machine()
    disable_progress_bar()
    everyone = dict.fromkeys((SHARING, PADDED), sys.executable)
    if options.trl:
        everyone |= dict.fromkeys(SETTINGS, options.trl)

    def without(*ways: str) -> dict[str, str]:
        return {way: python for way, python in everyone.items() if way not in ways}

    # Not all ways of a large model, nor of processes that keep all they ever held, fit into 24 GiB.
    keeping = without(PADDED, TRL_DEFAULTS)
    if options.quick:
        races = [(TINY, everyone, False), (TINY, keeping, True)]
    elif CUDA:  # where TRL computes logits at labels alone anyway
        races = [(FULL, without(TRL_LABELLED) | dict.fromkeys((FLEX, FSDP), sys.executable), False)]
    else:
        larger = without(TRL_STORING, TRL_LABELLED)
        races = [(SMALL, everyone, False), (SMALL, keeping, True), (LARGE, larger, False)]
    rounds = f"{options.repeats} steps of 8 corrections after {WARM_UP} others; median (lowest..highest)."
    publish(f"### One optimiser step\n\n{heading} {rounds}\n", options.append)
    for shape, pythons, keeps in races:
        publish(section(shape, pythons, options, keeping=keeps), options.append)
    publish(NOTE if options.trl else "TRL was left out: --trl was not given.\n", options.append)


if __name__ == "__main__":
    main()
