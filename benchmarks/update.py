"""An on-policy update of SCoRe by this program, and by a plain loop of transformers on the same work.

    python benchmarks/update.py [--questions N] [--updates N] [--append FILE]

The plain loop does what a script of one file does: ``generate`` with padded prompts, all logits of the model
and of M_0 in padded rows, and a loss of one line. Both do what configs/smollm2.yaml says: SmolLM2-135M, sums
of three numbers, the same prompts, rewards and precision. The first update of each is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from common import CORES, DEVICE, ENVIRONMENT, ROOT, machine, publish, spread, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, PreTrainedModel

from callbacks.curves import tag
from data import ReasoningGym, smollm2
from data.reasoning_gym import Verifier
from stasc.answers import LastNumber
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message
from stasc.score import SCoRe
from stasc.trajectory import Answer, Trajectory

PHASES = {"sampling": "sampling", "training": "training", "handing_over": "weights to the engine"}
CONFIG = ROOT / "configs/smollm2.yaml"
ROWS = 8
"""Rows that the plain loop trains at the same time."""


def options(updates: int, questions: int) -> list[str]:
    """Of ``fit``, for a second stage of so many updates."""
    sizes = {"stage_one": 0, "stage_two": updates, "updates_per_iteration": updates, "questions": questions}
    words = [word for name, size in sizes.items() for word in (f"--algorithm.{name}", str(size))]
    few = ["--data.test.init_args.size", "1", "--data.validation", "null"]
    return [*words, "--algorithm.n_init", "1", "--algorithm.n_corr", "1", *few]


def program(folder: Path, updates: int, questions: int) -> list[dict[str, float]]:
    """Seconds of each phase of each update; leave if the program fails."""
    configs = (
        "--config",
        str(CONFIG),
        "--config",
        "configs/baselines/score.yaml",
        "--run_dir",
        folder / "run",
    )
    command = [sys.executable, "-m", "stasc", "fit", *map(str, configs), *options(updates, questions)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}).Reload()
    seconds = {phase: [e.value for e in events.Scalars(tag(f"step/seconds_{phase}"))] for phase in PHASES}
    return [
        {phase: values[i] for phase, values in seconds.items() if i < len(values)}
        for i in range(1, updates - 1)  # the last hands nothing over
    ]


class PlainLoop:
    """SCoRe's second stage in a script's way.

    Args:
        config: That of the program.
        questions: Of an update.
    """

    def __init__(self, config: dict[str, Any], questions: int) -> None:
        base = ModelFolder(smollm2.base_model())
        messages = yaml.safe_load((CONFIG.parent / config["data"]["prompts"]).read_text())
        prompts = {name: [Message(**message) for message in of_one] for name, of_one in messages.items()}
        self.dialogue = Dialogue(base.tokenizer(), prompts, base.generation_config())
        self.questions = ReasoningGym(**config["data"]["train"]["init_args"]).load()
        self.size, self.max_tokens = questions, config["data"]["sampling"]["max_tokens"]
        self.find, self.reward = LastNumber().find, Verifier()
        self.system = SCoRe(stage_one=0, questions=questions)
        self.model, self.m0 = (
            AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).to(DEVICE) for _ in range(2)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config["model"]["learning_rate"])
        self.clip = config["trainer"]["gradient_clip_val"]

    def autocast(self) -> Any:
        """The config's mixed precision."""
        return torch.autocast(DEVICE.type, torch.bfloat16)

    def update(self, number: int) -> dict[str, float]:
        """Seconds of its two phases."""
        began = time.monotonic()
        first = number * self.size % (len(self.questions) - self.size + 1)
        trajectories = [Trajectory(question) for question in self.questions[first : first + self.size]]
        for prompt in ("initial", "correction"):
            trajectories = self.answer(prompt, trajectories)
        sampled = time.monotonic()
        examples = list(self.system.select(1, trajectories))
        for start in range(0, len(examples), ROWS):
            self.learn(examples[start : start + ROWS])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"sampling": sampled - began, "training": time.monotonic() - sampled}

    @torch.no_grad()
    def answer(self, prompt: str, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """One more answer to each, all at once."""
        dialogue = self.dialogue
        prompts = dialogue.ask(prompt, trajectories)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        with self.autocast():
            completed = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.max_tokens,
                eos_token_id=list(dialogue.stop_ids),
                pad_token_id=0,
            )
        extended = []
        for trajectory, row in zip(trajectories, completed[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(row) if token in dialogue.stop_ids), None)
            token_ids = tuple(row[:end])
            text = dialogue.decode(token_ids)
            reward = self.reward.judge(self.find(text), trajectory.question)
            answer = Answer(prompt, 0, text, token_ids, end is not None, reward)
            extended.append(Trajectory(trajectory.question, (*trajectory.answers, answer)))
        return extended

    def learn(self, examples: Sequence[Any]) -> None:
        """Add the gradient of some examples, padded to the longest."""
        rows = [self.dialogue.example(example) for example in examples]
        width = max(len(prompt) + len(target) for prompt, target in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=DEVICE)
        weights, kls = (torch.zeros(len(rows), width - 1, device=DEVICE) for _ in range(2))
        for i, ((prompt, target), example) in enumerate(zip(rows, examples, strict=True)):
            ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
            weights[i, len(prompt) - 1 : len(prompt) + len(target) - 1] = example.weight
            kls[i, len(prompt) - 1 : len(prompt) + len(target) - 1] = example.kl
        with self.autocast():
            ours = self.scores(self.model, ids)
            with torch.no_grad():
                theirs = self.scores(self.m0, ids)
        likelihood = ours.gather(-1, ids[:, 1:, None])[..., 0]
        divergence = (ours.exp() * (ours - theirs)).sum(-1)
        (kls * divergence - weights * likelihood).sum().backward()

    @staticmethod
    def scores(of: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of all tokens everywhere."""
        return of(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def main() -> None:
    """Run both, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--append", type=Path)
    arguments = parser.parse_args()
    parts = [
        f"### One update of SCoRe: {arguments.questions} questions, an answer and a correction each",
        machine(),
    ]
    config = yaml.safe_load(CONFIG.read_text())
    with tempfile.TemporaryDirectory() as folder:
        ours = program(Path(folder), arguments.updates, arguments.questions)
    torch.set_num_threads(CORES)
    loop = PlainLoop(config, arguments.questions)
    plain = [loop.update(number) for number in range(arguments.updates)][1:-1]
    rows = []
    for name, updates in (("this program", ours), ("plain loop", plain)):
        cells = [
            spread([update[phase] for update in updates], 1) if phase in updates[0] else "-"
            for phase in PHASES
        ]
        rows.append(
            [name, f"{len(updates)}", *cells, spread([sum(update.values()) for update in updates], 1)]
        )
    times = median(sum(u.values()) for u in plain) / median(sum(u.values()) for u in ours)
    head = ["way", "updates", *PHASES.values(), "all, seconds"]
    parts += [table(head, rows), f"Median (lowest..highest). This program is {times:.1f} times as fast."]
    publish("\n\n".join(parts) + "\n", arguments.append)


if __name__ == "__main__":
    main()
