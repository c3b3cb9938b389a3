"""One stage of an iteration as a process of its own, the way the paper's release does it.

    python benchmarks/release.py initial|corrections|train|evaluate N --config FILE --run_dir FOLDER

Built from the program's parts, for benchmarks/iteration.py: each stage that samples starts an engine, and
training starts an interpreter and loads M_{n-1} from disk. Files and seeds are those of the program, so both
ways end with the same trajectories. It is kinder than the release in one respect: vLLM runs in the stage's
own process, which starts faster than vLLM's default of several.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from data import DemoQuestions, demo
from stasc.algorithm import STaSC
from stasc.pretrained import context_length, load_generation_config, load_tokenizer
from stasc.prompting import Dialogue
from stasc.reward import InAccuracy
from stasc.rollout import Rollout
from stasc.run import Run, write_lines
from stasc.sampling import Sampling
from stasc.trajectory import InitialAnswer, Trajectory, read_records, to_json


class Stages:
    """The stages of iteration ``n``.

    Args:
        config: The config.yaml of a finished run of the program on the demo task, EIE.
        run_dir: Where the files of this run lie.
        n: The iteration.
    """

    def __init__(self, config: dict[str, Any], run_dir: Path, n: int) -> None:
        data = config["data"]
        self.config = config
        self.n = n
        self.run = Run(run_dir)
        self.box = self.run.iteration(n)
        self.algorithm = STaSC(**config["algorithm"]["init_args"])
        self.sampling, self.test_sampling = Sampling(**data["sampling"]), Sampling(**data["test_sampling"])
        self.questions = {name: DemoQuestions(**data[name]["init_args"]).load() for name in ("train", "test")}
        base = demo.base_model()
        self.dialogue = Dialogue(load_tokenizer(base), demo.PROMPTS, load_generation_config(base))
        self.working = 0.0
        """Seconds spent on the stage's work, after everything has started."""

    def model(self, n: int) -> Path:
        """Where M_n lies."""
        return self.run.iteration(n).model if n else demo.base_model()

    def initial(self) -> None:
        """Initial answers by M_{n-1}."""
        rollout = self._rollout(self.n - 1)
        self._write(
            self.box.initial,
            rollout.initial_answers(
                self.questions["train"], self.algorithm.n_init, self.sampling, f"iteration {self.n}"
            ),
        )

    def corrections(self) -> None:
        """Corrections by M_{n-1}, and D_n."""
        rollout = self._rollout(self.n - 1)
        trajectories = rollout.corrections(
            read_records(self.box.initial), self.algorithm.n_corr, self.sampling, f"iteration {self.n}"
        )
        self._write(self.box.trajectories, trajectories)
        self._write(self.box.dataset, self.algorithm.select(trajectories))

    def evaluate(self) -> None:
        """Answers and corrections of the test questions by M_n."""
        rollout, title = self._rollout(self.n), f"M_{self.n} on test"
        answers = rollout.initial_answers(self.questions["test"], 1, self.test_sampling, title)
        self._write(self.box.test, rollout.corrections(answers, 1, self.test_sampling, title))

    def train(self) -> None:
        """M_n from M_{n-1} and D_n."""
        from lightning.pytorch import Trainer
        from torch.utils.data import DataLoader

        from stasc.module import CorrectionSFT
        from stasc.packing import CorrectionBatches

        # The order in which the program goes through D_n.
        key = f"{self.config['seed_everything']}/{self.n - 1}/epoch".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")
        batches = CorrectionBatches(
            read_records(self.box.dataset),
            self.dialogue.training_example,
            self.config["data"]["batch_size"],
            seed=seed,
        )
        module = CorrectionSFT(**{**self.config["model"], "base": str(self.model(self.n - 1))})
        module.iteration_steps = batches.steps
        trainer = Trainer(
            accelerator=self.config["trainer"]["accelerator"],
            devices=1,
            max_epochs=1,
            gradient_clip_val=self.config["trainer"]["gradient_clip_val"],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        started = time.perf_counter()
        trainer.fit(module, DataLoader(batches, batch_size=None))
        self.working = time.perf_counter() - started
        module.model.save_pretrained(self.box.model)
        self.dialogue.tokenizer.save_pretrained(self.box.model)

    def _rollout(self, n: int) -> Rollout:
        from bare import Bare

        model = self.model(n)
        context = context_length(model)
        engine = Bare(model, context, self.config["sampler"]["init_args"]["kv_cache_gib"])
        self._ready = time.perf_counter()
        return Rollout(engine, self.dialogue, InAccuracy(), self.config["seed_everything"], context)

    def _write(self, path: Path, records: Iterable[InitialAnswer | Trajectory]) -> None:
        write_lines(path, map(to_json, records))
        self.working = time.perf_counter() - self._ready


def main() -> None:
    """Run one stage; the last line it prints says how many seconds of it were work."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["initial", "corrections", "train", "evaluate"])
    parser.add_argument("n", type=int)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run_dir", type=Path, required=True)
    options = parser.parse_args()
    stages = Stages(yaml.safe_load(options.config.read_text()), options.run_dir, options.n)
    getattr(stages, options.stage)()
    print(json.dumps({"working": stages.working}))


if __name__ == "__main__":
    main()
