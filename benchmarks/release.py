"""One stage of an iteration as a process of its own, the way the paper's release does it.

    python benchmarks/release.py initial|corrections|train|evaluate N --config FILE --run_dir FOLDER

For benchmarks/iteration.py. The stages are those of the program's own ``Experiment``; only, each that samples
starts an engine, and training starts an interpreter and loads M_{n-1} from disk. Files and seeds are the
same, so both ways end with the same trajectories. It is kinder than the release in one respect: vLLM runs in
the stage's own process, which starts faster than vLLM's default of several.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from bare import Bare

from data import DemoQuestions, demo
from stasc.algorithm import STaSC
from stasc.experiment import Evaluation, Experiment
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue
from stasc.reward import InAccuracy
from stasc.rollout import Rollout
from stasc.run import Run, write_json
from stasc.sampling import Sampling
from stasc.seeds import derived_seed


class Stages(Experiment):
    """An experiment whose models come each with a new engine."""

    config: dict[str, Any]
    ready: float
    """When the engine of this stage was there."""

    def load(self, n: int) -> None:
        """Start an engine with M_n."""
        if not hasattr(self, "rollout"):
            cache = self.config["sampler"]["init_args"]["kv_cache_gib"]
            self.sampler = Bare(self.model_folder(n), self.context, cache)
            self.rollout = Rollout(
                self.sampler, self.dialogue, self.answer, self.reward, self.seed, self.context
            )
            self.ready = time.perf_counter()

    def train(self, n: int) -> float:
        """M_n from M_{n-1} and D_n; the seconds that training took."""
        from lightning.pytorch import Trainer
        from torch.utils.data import DataLoader

        from stasc.training.batches import CorrectionBatches
        from stasc.training.module import CorrectionSFT

        batches = CorrectionBatches(
            self.dataset(n),
            self.training_dialogue.example,
            self.config["data"]["batches"]["size"],
            seed=derived_seed(self.seed, n - 1, "epoch"),
        )
        base = self.model_folder(self.base_model(n))
        module = CorrectionSFT(**{**self.config["model"], "base": str(base)})
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
        seconds = time.perf_counter() - started
        files = self.run.iteration(n)
        module.model.save_pretrained(files.model)
        self.dialogue.tokenizer.save_pretrained(files.model)
        write_json(files.training, self.training_metrics(n))
        return seconds

    def sampled(self, stage: Callable[[int], Any], n: int) -> float:
        """Do a stage that samples; the seconds that it took with the engine there."""
        stage(n)
        return time.perf_counter() - self.ready


def stages(config: dict[str, Any], run_dir: Path) -> Stages:
    """The stages of a run.

    Args:
        config: The config.yaml of a finished run of the program on the demo task, EIE.
        run_dir: Where the files of this run lie.
    """
    data = config["data"]
    base = ModelFolder(demo.base_model())
    dialogue = Dialogue(base.tokenizer(), demo.PROMPTS, base.generation_config())
    made = Stages(
        algorithm=STaSC(**config["algorithm"]["init_args"]),
        sampler=None,
        dialogue=dialogue,
        training_dialogue=dialogue,
        reward=InAccuracy(),
        questions={name: DemoQuestions(**data[name]["init_args"]).load() for name in ("train", "test")},
        sampling=Sampling(**data["sampling"]),
        evaluation=Evaluation(Sampling(**data["evaluation"]["sampling"])),
        base=base,
        run=Run(run_dir),
        seed=config["seed_everything"],
    )
    made.config = config
    return made


def main() -> None:
    """Run one stage; the last line it prints says how many seconds of it were work."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["initial", "corrections", "train", "evaluate"])
    parser.add_argument("n", type=int)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run_dir", type=Path, required=True)
    options = parser.parse_args()
    made = stages(yaml.safe_load(options.config.read_text()), options.run_dir)
    # D_n is part of the corrections' stage, as in the release.
    sampling = {"initial": made.initial_answers, "corrections": made.dataset, "evaluate": made.evaluate}
    if options.stage == "train":
        working = made.train(options.n)
    else:
        working = made.sampled(sampling[options.stage], options.n)
    print(json.dumps({"working": working}))


if __name__ == "__main__":
    main()
