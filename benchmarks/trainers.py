"""What benchmarks/train_step.py starts: one way to train, in a process of its own, step by step.

    PYTHON benchmarks/trainers.py WAY MODEL STEPS GROUPED

Each line of the standard input, ``step`` or ``profile``, is answered by one of JSON. This runs with two
interpreters: that of TRL's ways has neither Lightning nor anything else of the project's.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, peak_memory
from torch.profiler import ProfilerActivity, profile

from stasc.training.batches import CorrectionBatches
from stasc.trajectory import Answer, Example, Question, Trajectory

CUDA = DEVICE.type == "cuda"
SHARING, PADDED = "ours, prefix sharing", "ours, padded rows"
FLEX, FSDP = "ours, prefix sharing, flex", "ours, prefix sharing, FSDP on one device"
"""On CUDA alone."""
TRL_DEFAULTS, TRL_STORING = "TRL, its defaults", "TRL, no gradient checkpointing"
TRL_LABELLED = "TRL, that and logits at labels alone"
SETTINGS: dict[str, dict[str, Any]] = {
    TRL_DEFAULTS: {},
    TRL_STORING: {"gradient_checkpointing": False},
    TRL_LABELLED: {"gradient_checkpointing": False},
}
"""Of the ways that TRL has; float32 goes for all of them."""
BATCH, SHARED = 8, 450


def corrections(vocabulary: int, way: str, *, grouped: bool) -> CorrectionBatches:
    """A way's batches of a D_n with 5 corrections of each of 400 initial answers.

    All prompts begin with the same ``SHARED`` tokens; question and initial answer are 90 to 150 more, and a
    correction is 60 to 100.
    """
    draw = random.Random(0)

    def words(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, vocabulary) for _ in range(draw.randint(least, most)))

    shared = words(SHARED, SHARED)
    dataset = []
    for number in range(400):
        question, initial = Question(str(number), ""), Answer("initial", 0, "", words(90, 150), True, 0.0)
        for k in range(5):
            correction = Answer("correction", k, "", words(60, 100), True, 1.0)
            dataset.append(Trajectory(question, (initial, correction)).learn())

    def render(example: Example) -> tuple[list[int], list[int]]:
        initial, correction = example.trajectory.answers
        return [*shared, *initial.token_ids], [*correction.token_ids]

    sharing = way in (SHARING, FLEX, FSDP)
    options = {"prefix_sharing": sharing, "group_corrections": grouped, "longest": SHARED + 250}
    return CorrectionBatches(dataset, render, BATCH, seed=0, **options)


class Turns:
    """Lets a trainer go from step to step, and tells what each of them took."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # for all that libraries print
        self._profile: profile | None = None

    def tell(self, **found: Any) -> None:
        """Send one line."""
        print(json.dumps(found), file=self._answers)

    def wait(self) -> None:
        """Until the next step may begin; the process ends where there is none."""
        command = sys.stdin.readline().strip()
        if not command:
            sys.exit()
        if command == "profile":
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()
        self._before = _memory(reset=True)
        self._began = time.perf_counter()

    def done(self, loss: float) -> None:
        """The step is over."""
        seconds, memory = time.perf_counter() - self._began, _memory() - self._before
        operators = {}
        if self._profile:
            self._profile.stop()
            operators = {event.key: event.self_cpu_time_total for event in self._profile.key_averages()}
        self.tell(seconds=seconds, loss=loss, gib=memory / 2**30, operators=operators)


def _memory(*, reset: bool = False) -> int:
    if not CUDA:
        return peak_memory(reset=reset)
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def ours(model: str, batches: CorrectionBatches, steps: int, turns: Turns, way: str) -> None:
    """Train as the program does."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.strategies import FSDPStrategy
    from torch.utils.data import DataLoader
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    from stasc.training.module import CorrectionSFT

    class Paced(Callback):
        def on_train_start(self, *_: Any) -> None:
            turns.tell(versions=None)
            turns.wait()

        def on_train_batch_end(self, trainer: Trainer, module: CorrectionSFT, outputs: Any, *_: Any) -> None:
            turns.done(float(outputs["loss"]))
            turns.wait()

    attention = "flex" if way == FLEX else "auto"
    module = CorrectionSFT(model, weight_decay=0.0, warmup_ratio=0.0, attention=attention)
    module.iteration_steps = steps
    trainer = Trainer(
        accelerator=DEVICE.type,
        devices=1,
        strategy=FSDPStrategy(auto_wrap_policy={Qwen2DecoderLayer}) if way == FSDP else "auto",
        precision="bf16-mixed" if CUDA else "32-true",
        max_epochs=1,
        limit_train_batches=steps,
        gradient_clip_val=1.0,
        callbacks=[Paced()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


def sft_trainer(model: str, batches: CorrectionBatches, steps: int, turns: Turns, way: str) -> None:
    """Train with TRL; optimiser, schedule and clipping are the same."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Paced(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            packages = ("trl", "torch", "transformers", "accelerate")
            turns.tell(versions=", ".join(f"{package} {version(package)}" for package in packages))
            turns.wait()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # it is not in the summary at the end
                turns.done(logs["loss"])
                turns.wait()

    if way == TRL_LABELLED:
        # On CUDA it does so by itself. Elsewhere it computes the logits at all places, since a changing
        # number of them would make some compilers begin anew, and it offers no choice.
        trl.trainer.utils._use_triton = lambda device: True
    examples = [example for step in range(steps) for example in batches.examples(step)]
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            f"{model}-trl",
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            max_length=None,
            learning_rate=7e-6,
            lr_scheduler_type="cosine",
            bf16=CUDA,
            use_cpu=not CUDA,
            model_init_kwargs={"dtype": "float32"},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **SETTINGS[way],
        ),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [example.tokens for example in examples],
                "labels": [[-100] * len(example.prompt) + example.target for example in examples],
            }
        ),
        callbacks=[Paced()],
    )
    trainer.train()


def main() -> None:
    """Train one way."""
    way, model, steps, grouped = sys.argv[1:]
    turns = Turns()
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    batches = corrections(vocabulary, way, grouped=grouped == "True")
    if way in SETTINGS:
        sft_trainer(model, batches, int(steps), turns, way)
    else:
        ours(model, batches, int(steps), turns, way)


if __name__ == "__main__":
    main()
