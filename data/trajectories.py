"""The data module: questions in, the batches of D_n out, every iteration anew."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.questions import QuestionSource
from stasc.algorithm import Algorithm
from stasc.errors import UserError
from stasc.filtering import select
from stasc.packing import CorrectionBatches
from stasc.pretrained import context_length, load_generation_config, load_tokenizer, locate
from stasc.probe import SEQUENCES, TOKENS, Probe
from stasc.prompting import Dialogue, Prompts
from stasc.reward import InAccuracy, Reward
from stasc.rollout import Rollout
from stasc.run import Run, write_lines
from stasc.sampling import Sampler, Sampling
from stasc.trajectory import InitialAnswer, Question, Trajectory, read_records, to_json

Record = TypeVar("Record", InitialAnswer, Trajectory)


class TrajectoryDataModule(LightningDataModule):
    """Samples, scores and filters trajectories, and hands out D_n in batches.

    Args:
        train: Questions to learn from (D_0).
        test: Questions to evaluate on.
        prompts: What is asked.
        sampling: How training answers and corrections are drawn.
        test_sampling: How answers and corrections are drawn in evaluation; one of each per question.
        reward: Scores completions.
        batch_size: Corrections per optimiser step, over all devices and accumulation together.
        predict: Questions for ``predict``; references are not needed.
        output: Where ``validate``, ``test`` and ``predict`` write their trajectories; by default
            ``SUBCOMMAND.jsonl`` in the run folder.
        algorithm: Set from ``algorithm``.
        sampler: Set from ``sampler``.
        base: Set from ``model.base``.
        run_dir: Set from ``run_dir``.
        seed: Set from ``seed_everything``.
    """

    def __init__(
        self,
        train: QuestionSource,
        test: QuestionSource,
        prompts: Prompts,
        sampling: Sampling,
        test_sampling: Sampling,
        algorithm: Algorithm,
        sampler: Sampler,
        base: str,
        run_dir: str,
        reward: Reward = InAccuracy(),  # noqa: B008  (has no state)
        batch_size: int = 8,
        predict: QuestionSource | None = None,
        output: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}: it must be 1 or more.")
        if sampling.temperature == 0 and max(algorithm.n_init, algorithm.n_corr) > 1:
            raise UserError(
                "data.sampling.temperature is 0, so all draws of a prompt are the same: "
                "raise it, or set algorithm.n_init and algorithm.n_corr to 1."
            )
        self.sources = {"train": train, "test": test, "predict": predict}
        self.prompts = prompts
        self.sampling = sampling
        self.test_sampling = test_sampling
        self.reward = reward
        self.batch_size = batch_size
        self.output = output
        self.algorithm = algorithm
        self.sampler = sampler
        self.base = base
        self.run = Run(run_dir)
        self.seed = seed
        self.questions: dict[str, list[Question]] = {}
        self.dataset: list[Trajectory] = []
        """D_n of the iteration under way."""
        self.loaded: Path | None = None
        """Model folder that the sampler holds."""

    # What is under way

    @property
    def epochs_done(self) -> int:
        """Training epochs of the run that are done; right after a resume too, as ``current_epoch`` is not."""
        return self.trainer.fit_loop.epoch_progress.current.processed

    @property
    def iteration(self) -> int:
        """The iteration n under way."""
        return self.algorithm.iteration(self.epochs_done)

    @property
    def epoch_seed(self) -> int:
        """Seed of everything random in the training epoch under way."""
        key = f"{self.seed}/{self.epochs_done}/epoch".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")

    def model_folder(self, n: int) -> Path:
        """Where M_n lies."""
        return self.run.iteration(n).model if n else self.base_folder

    @property
    def probe_sequences(self) -> list[list[int]]:
        """A few token sequences on which an engine and the trainer must agree."""
        questions = self.questions["train"][:SEQUENCES]
        return [self.dialogue.initial_prompt(question.text)[-TOKENS:] for question in questions]

    # Set-up

    def load_questions(self, subcommand: str) -> None:
        """Read what a subcommand needs; touches nothing, so that a mistake in it costs nothing."""
        needed = {"fit": ("train", "test"), "predict": ("predict",)}.get(subcommand, ("test",))
        for name in needed:
            source = self.sources[name]
            if source is None:
                raise UserError(f"data.{name} is not set: give the questions, as data.train has them.")
            self.questions[name] = source.load(with_references=name != "predict")
        self.base_folder = locate(self.base)
        tokenizer = load_tokenizer(self.base_folder)
        self.dialogue = Dialogue(tokenizer, self.prompts, load_generation_config(self.base_folder))
        self.context = max(self._check_context(name) for name in needed)

    def setup(self, stage: str) -> None:
        """Start the engine, which gets ready while the trainer loads its model."""
        if not self.questions:
            self.load_questions(stage)
        journals = self.run.journals if stage == "fit" else None
        self.rollout = Rollout(self.sampler, self.dialogue, self.reward, self.seed, self.context, journals)
        log = self.run.folder / f"engine-{self.trainer.global_rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        device = self.trainer.strategy.root_device
        self.sampler.start(self.base_folder, device=device, context=self.context, log=log)

    def teardown(self, stage: str) -> None:
        """End the engine."""
        self.sampler.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the engine."""
        self.sampler.close()

    # One iteration: Algorithm 1, lines 2 to 12

    def train_dataloader(self) -> DataLoader:
        """Steps 1 to 3 of iteration n, as far as they are not done yet, and the batches of D_n."""
        n = self.iteration
        box = self.run.iteration(n)
        first = box if self.algorithm.evolving_initialization else self.run.iteration(1)
        answers = self._stage(first.initial, lambda: self._initial_answers(first.n))
        trajectories = self._stage(box.trajectories, lambda: self._corrections(answers, n))
        self.dataset = self._stage(box.dataset, lambda: select(trajectories, self.algorithm))
        if not self.dataset:
            # Lightning ends the whole fit on an empty loader; the module skips this one batch instead.
            return DataLoader([None], batch_size=None)
        batches = CorrectionBatches(
            self.dataset,
            self.dialogue,
            self.batch_size,
            seed=self.epoch_seed,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
        )
        return DataLoader(batches, batch_size=None)

    def test_trajectories(self, n: int) -> list[Trajectory]:
        """One answer and one correction of every test question by M_n."""
        return self._stage(
            self.run.iteration(n).test, lambda: self._answer_and_correct("test", n, f"M_{n} on test")
        )

    def _load(self, n: int) -> None:
        """Have the sampler take M_n, and make sure that it did."""
        folder = self.model_folder(n)
        if folder != self.loaded:
            self.sampler.load(folder)
            if n > 0:
                Probe.read(self.run.iteration(n).probe).check(self.sampler, folder)
            self.loaded = folder

    def _initial_answers(self, n: int) -> list[InitialAnswer]:
        self._load(n - 1)
        return self.rollout.initial_answers(
            self.questions["train"], self.algorithm.n_init, self.sampling, f"iteration {n}"
        )

    def _corrections(self, answers: Sequence[InitialAnswer], n: int) -> list[Trajectory]:
        self._load(n - 1)
        return self.rollout.corrections(answers, self.algorithm.n_corr, self.sampling, f"iteration {n}")

    def _answer_and_correct(self, questions: str, n: int, title: str) -> list[Trajectory]:
        self._load(n)
        answers = self.rollout.initial_answers(self.questions[questions], 1, self.test_sampling, title)
        return self.rollout.corrections(answers, 1, self.test_sampling, title)

    # A model folder on its own: validate, test, predict

    def test_dataloader(self) -> DataLoader:
        """Rewards (r1, r2) of the test questions' trajectories by ``model.base``, this process's share."""
        trajectories = self._answer_and_correct("test", 0, "test")
        self._write_output(map(to_json, trajectories))
        return self._share([(t.r1, t.r2) for t in trajectories])

    def val_dataloader(self) -> DataLoader:
        """As ``test_dataloader``; the paper has no validation split."""
        return self.test_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Corrections of the ``predict`` questions by ``model.base``, this process's share."""
        trajectories = self._answer_and_correct("predict", 0, "predict")
        self._write_output(map(_both_turns, trajectories))
        return self._share([t.correction.text for t in trajectories])

    def output_path(self, subcommand: str) -> Path:
        """Where a subcommand other than ``fit`` writes."""
        return Path(self.output) if self.output else self.run.folder / f"{subcommand}.jsonl"

    def _write_output(self, lines: Iterable[str]) -> None:
        if self.trainer.is_global_zero:
            path = self.output_path(self.trainer.state.fn.value)
            write_lines(path, lines)
            print(f"answers and corrections  {path}", flush=True)

    def _share(self, values: Sequence[Any]) -> DataLoader:
        share = values[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(share, batch_size=64, collate_fn=list)

    # Stages and files

    def missing(self, path: Path) -> bool:
        """Whether a stage is still to be done: rank 0 looks, so that all ranks agree."""
        return self.trainer.strategy.broadcast(not path.exists())

    def _stage(self, path: Path, make: Callable[[], list[Record]]) -> list[Record]:
        """The records of a stage: made and written once, and read where they are written already."""
        if not self.missing(path):
            return read_records(path)
        records = make()
        if self.trainer.is_global_zero:
            write_lines(path, map(to_json, records))
            shutil.rmtree(self.run.journals, ignore_errors=True)
        self.trainer.strategy.barrier(f"{path.name} is written")
        return records

    def _check_context(self, name: str) -> int:
        """Tokens that the longest correction of a question set can need.

        Raises:
            UserError: They are more than the model takes.
        """
        takes = context_length(self.base_folder)
        sampling = [self.sampling, self.test_sampling] if name == "train" else [self.test_sampling]
        answer = max(s.max_tokens for s in sampling)
        longest = 0
        for question in self.questions[name]:
            initial = len(self.dialogue.initial_prompt(question.text)) + answer
            correction = len(self.dialogue.correction_prompt(question.text, "")) + 2 * answer
            if max(initial, correction) > takes:
                raise UserError(
                    f"data.{name}, question '{question.id}': its prompts and answers can need "
                    f"{max(initial, correction)} tokens, and the model takes {takes}; "
                    "shorten the question or the prompts, or lower max_tokens."
                )
            # Broken UTF-8 that a model writes comes back as a replacement character of three bytes, so an
            # answer that is tokenised again inside a prompt can be that much longer than it was sampled.
            longest = max(longest, initial, correction + 2 * answer)
        return min(longest, takes)


def _both_turns(trajectory: Trajectory) -> str:
    return json.dumps(
        {
            "id": trajectory.question.id,
            "question": trajectory.question.text,
            "initial_answer": trajectory.initial.text,
            "correction": trajectory.correction.text,
        },
        ensure_ascii=False,
    )
