"""The data module: questions in, the batches of D_n out, every iteration anew."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.questions import QuestionSource, hold_out, load
from stasc.answers import FinalAnswer, WholeCompletion
from stasc.ending import set_handlers
from stasc.errors import UserError
from stasc.experiment import Evaluation, Experiment
from stasc.memory import engine_share
from stasc.progress import Clock, Pace, say
from stasc.prompting import Message
from stasc.reward import InAccuracy, Reward
from stasc.run import EVALUATION, NEVER, START, TRAINING, FirstUses, write_json, write_lines
from stasc.sampling import Sampling
from stasc.seeds import derived_seed
from stasc.training.batches import CorrectionBatches
from stasc.trajectory import Example, Question, Trajectory, to_json


@dataclass(frozen=True)
class Batches:
    """How D_n is cut into batches.

    Args:
        size: Corrections per optimiser step, over all devices and accumulation together.
        prefix_sharing: Compute what the examples of a micro-batch begin with once for all of them; otherwise
            each is a padded row. The gradient is the same.
        token_budget: Tokens of a micro-batch of one process, which bound the memory of training.
        group_corrections: Keep the corrections of an initial answer side by side in the shuffle.
    """

    size: int = 8
    prefix_sharing: bool = True
    token_budget: int = 16384
    group_corrections: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "token_budget"):
            if getattr(self, name) < 1:
                raise UserError(f"data.batches.{name} is {getattr(self, name)}: it must be 1 or more.")


class TrajectoryDataModule(LightningDataModule):
    """Questions, prompts, sampling and reward, and the batches of D_n, new for every training epoch.

    Args:
        train: Questions to learn from (D_0).
        test: Questions to report the rewards of.
        prompts: The messages of each prompt: ``initial``, ``correction``, and others that the algorithm asks.
            Without ``fit`` these, ``evaluation.sampling`` and ``answer`` are by default what the folder of
            ``model.base`` names (its ``stasc.yaml``).
        sampling: How training answers and corrections are drawn (``temperature``, ``top_p``, ``max_tokens``);
            only ``fit`` draws them.
        evaluation: How models are evaluated.
        validation: Questions to choose the iteration on, or the share of ``train`` that is held out as such;
            without any nothing chooses but the test set.
        training_prompts: Prompts of the training examples; by default those of sampling.
        answer: Finds the answer in a completion; by default all of it is the answer.
        reward: Scores the answer.
        batches: How D_n is cut into batches.
        predict: Questions for ``predict``; references are not needed.
        output: Where ``validate``, ``test`` and ``predict`` write their trajectories; by default
            ``SUBCOMMAND.jsonl`` in the run folder.
    """

    first_uses: ClassVar[FirstUses] = {
        "test": EVALUATION,
        # A share is taken from the training questions.
        "validation": lambda before, now: START if isinstance(before or now, float) else EVALUATION,
        "evaluation": EVALUATION,
        "training_prompts": TRAINING,
        "batches.size": TRAINING,
        "batches.group_corrections": TRAINING,
        "batches": NEVER,
        "predict": NEVER,
        "output": NEVER,
    }
    """For each option from where on it has a part in the results; START if it is not here."""

    experiment: Experiment
    """Samples, filters and evaluates; whoever puts the parts of the program together sets it."""

    def __init__(
        self,
        train: QuestionSource | None = None,
        test: QuestionSource | None = None,
        prompts: dict[str, list[Message]] | None = None,
        sampling: Sampling | None = None,
        evaluation: Evaluation = Evaluation(),  # noqa: B008  (frozen)
        validation: QuestionSource | float | None = None,
        training_prompts: dict[str, list[Message]] | None = None,
        answer: FinalAnswer = WholeCompletion(),  # noqa: B008  (has no state)
        reward: Reward = InAccuracy(),  # noqa: B008  (has no state)
        batches: Batches = Batches(),
        predict: QuestionSource | None = None,
        output: str | None = None,
    ) -> None:
        super().__init__()
        if type(reward) is Reward:
            raise UserError(
                "data.reward is stasc.reward.Reward, which judges nothing: name a subclass of it, such as "
                "stasc.reward.InAccuracy."
            )
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.prompts = prompts
        self.sampling = sampling
        self.evaluation = evaluation
        self.training_prompts = training_prompts
        self.answer = answer
        self.reward = reward
        self.batches = batches
        self.output = output
        self.steps = 0
        """Optimiser steps of the training epoch under way; 0 if D_n is empty."""

    def load_questions(self, subcommand: str) -> dict[str, list[Question]]:
        """The questions that a subcommand asks, by the name of their source."""
        needed = {"fit": ("train", "validation", "test"), "validate": ("validation",)}
        questions: dict[str, list[Question]] = {}
        for name in needed.get(subcommand, (subcommand,)):
            source = self.sources[name]
            if isinstance(source, float):
                questions["train"], questions[name] = hold_out(
                    load(self.sources["train"], "data.train"), source
                )
            elif source is not None:
                questions[name] = load(source, f"data.{name}", with_references=name != "predict")
            elif name != "validation" or subcommand != "fit":
                raise UserError(
                    f"data.{name} is not set: give a source of questions, such as data.QuestionFile."
                )
        return questions

    # Training

    @property
    def epochs_done(self) -> int:
        """Training epochs of the run that are done; right after a resume too, as ``current_epoch`` is not."""
        return self.trainer.fit_loop.epoch_progress.current.processed

    @property
    def iteration(self) -> int:
        """The iteration n, from 1 to N, that is under way."""
        algorithm = self.experiment.algorithm
        return min(self.epochs_done // algorithm.epochs + 1, algorithm.iterations)

    @property
    def epoch_seed(self) -> int:
        """Seed of everything random in the training epoch under way."""
        return derived_seed(self.experiment.seed, self.epochs_done, "epoch")

    def setup(self, stage: str) -> None:
        """Start the engine, which gets ready while the trainer loads its model."""
        self.pace = Pace(self.experiment.algorithm.iterations)
        self.clock = Clock()
        device = self.trainer.strategy.root_device
        training = self.trainer.lightning_module.training_bytes() if stage == "fit" else 0
        memory = engine_share(device, training, self.trainer.num_devices)
        log = self.experiment.run.folder / f"engine-{self.trainer.global_rank}.log"
        self.experiment.start(device, log, memory)

    def train_dataloader(self) -> DataLoader:
        """Steps 1 to 3 of the iteration under way, unless they are done, and the batches of D_n."""
        set_handlers()  # Lightning calls nothing of ours between this and the setting of its own
        self.steps, dataset = 0, []
        if self.experiment.algorithm.iterations:
            if self.epochs_done < self.trainer.max_epochs:
                self._begin_epoch()
            dataset = self._dataset()
        if not dataset:
            # Lightning ends the whole fit on an empty loader; the module skips this one batch instead.
            return DataLoader([None], batch_size=None)
        on_policy = self.experiment.on_policy
        batches = CorrectionBatches(
            dataset,
            self.experiment.training_dialogue.example,
            len(dataset) if on_policy else self.batches.size,
            seed=self.epoch_seed,
            token_budget=self.batches.token_budget,
            prefix_sharing=self.batches.prefix_sharing,
            group_corrections=self.batches.group_corrections,
            longest=self._longest_example(),
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
        )
        self.steps = batches.steps
        return DataLoader(batches, batch_size=None)

    def _dataset(self) -> Sequence[Example]:
        """What this epoch learns: all of D_n, or the share of an on-policy update."""
        if not self.experiment.on_policy:
            return self.experiment.dataset(self.iteration)
        if self.epochs_done == self.trainer.max_epochs:  # a start that finds all trained
            return []
        self.clock.switch("sampling")
        examples = self.experiment.updates.sample(self.iteration, self.epochs_done)
        self.clock.switch(None)
        return examples

    def _begin_epoch(self) -> None:
        """Say that the iteration begins, if it does with this epoch or with this start of the program."""
        first = self.epochs_done % self.experiment.algorithm.epochs == 0
        if first or not self.pace.begun:
            done = self.experiment.run.iteration(self.iteration).folder.exists()
            self.pace.begin(self.iteration, whole=first and not done)

    def _longest_example(self) -> int | None:
        """Tokens that no training example exceeds, if its prompts are among those that were sampled from."""
        algorithm = self.experiment.algorithm
        sampled_from = {turn.prompt for turn in algorithm.turns}
        known = self.training_prompts is None and algorithm.learns <= sampled_from
        return self.experiment.context if known else None

    # A model folder on its own: test, validate, predict

    def test_dataloader(self) -> DataLoader:
        """All metrics of ``model.base`` on the test questions as one batch; writes them and trajectories."""
        rounds, metrics = self.experiment.test()
        flat = metrics["test"] | {k: v for k, v in metrics.get("rounds", {}).items() if k not in ("r1", "r2")}
        return self._evaluated(rounds, metrics, flat)

    def val_dataloader(self) -> DataLoader:
        """As ``test_dataloader``, on the validation questions."""
        rounds, metrics = self.experiment.validate()
        return self._evaluated(rounds, metrics, metrics["validation"])

    def _evaluated(
        self,
        rounds: Sequence[Iterable[Trajectory]],
        metrics: dict[str, dict[str, float]],
        shown: dict[str, float],
    ) -> DataLoader:
        """One batch with the metrics to show; all metrics and the trajectories of all rounds are written."""
        self._write_output(to_json(trajectory) for trajectories in rounds for trajectory in trajectories)
        if self.trainer.is_global_zero:
            write_json(self.metrics_path(self.trainer.state.fn.value), metrics)
        return DataLoader([shown], batch_size=None)

    def predict_dataloader(self) -> DataLoader:
        """Corrections of the ``predict`` questions by ``model.base``, as one batch; writes both turns."""
        trajectories = self.experiment.predict()
        self._write_output(map(_texts, trajectories))
        return DataLoader([[trajectory.after(2).text for trajectory in trajectories]], batch_size=None)

    def output_path(self, subcommand: str) -> Path:
        """Where a subcommand other than ``fit`` writes."""
        return Path(self.output) if self.output else self.experiment.run.folder / f"{subcommand}.jsonl"

    def check_batches(self, accumulate: int) -> None:
        """Find settings with which no batch could be made, before anything is sampled.

        Args:
            accumulate: Least number of micro-batches of an optimiser step.

        Raises:
            UserError: A prompt alone exceeds the token budget, or there are more micro-batches than examples.
        """
        tokens, question = self.experiment.longest_prompt
        budget, size = self.batches.token_budget, self.batches.size
        if self.training_prompts is None and tokens >= budget:
            raise UserError(
                f"data.batches.token_budget is {budget}, and a prompt of training question '{question}' has "
                f"{tokens} tokens without its answer: raise it."
            )
        if self.experiment.algorithm.questions_per_update is None and accumulate > size:
            raise UserError(
                f"trainer.accumulate_grad_batches is {accumulate}, and data.batches.size {size}, so that "
                "batches would have no example: lower the first, or raise the second."
            )

    def check_output(self, subcommand: str) -> None:
        """Find out whether a subcommand other than ``fit`` can write its files, before it samples.

        Raises:
            UserError: One is there, or their folder cannot be written to.
        """
        output, metrics = self.output_path(subcommand), self.metrics_path(subcommand)
        for path in (output,) if subcommand == "predict" else (output, metrics):
            if path.exists():
                raise UserError(f"{path} exists: choose another --data.output, or remove it.")
        if output == metrics:
            raise UserError(f"data.output {output} is a name for metrics: give one such as test.jsonl.")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output.parent):
                pass
        except OSError as error:
            raise UserError(
                f"{output} cannot be written ({error.strerror}): choose another --data.output or --run_dir."
            ) from error

    def metrics_path(self, subcommand: str) -> Path:
        """Where a subcommand other than ``fit`` writes what it has measured."""
        return self.output_path(subcommand).with_suffix(".metrics.json")

    def _write_output(self, lines: Iterable[str]) -> None:
        if self.trainer.is_global_zero:
            path = self.output_path(self.trainer.state.fn.value)
            write_lines(path, lines)
            say(f"answers and corrections  {path}")

    # The end

    def teardown(self, stage: str) -> None:
        """End the engine."""
        self.experiment.sampler.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the engine."""
        self.experiment.sampler.close()


def _texts(trajectory: Trajectory) -> str:
    texts = {
        "id": trajectory.question.id,
        "question": trajectory.question.text,
        "initial_answer": trajectory.after(1).text,
        "correction": trajectory.after(2).text,
    }
    return json.dumps(texts, ensure_ascii=False)
