"""The data module: questions in, the batches of D_n out, every iteration anew."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.questions import QuestionSource
from stasc.algorithm import Algorithm
from stasc.errors import UserError
from stasc.packing import CorrectionBatches
from stasc.pretrained import context_length, load_generation_config, load_tokenizer, locate
from stasc.probe import SEQUENCES, TOKENS, Probe
from stasc.prompting import Dialogue, Prompts
from stasc.reward import InAccuracy, Reward
from stasc.rollout import Rollout
from stasc.run import Iteration, Run, write_json, write_lines
from stasc.sampling import Sampler, Sampling
from stasc.scoring import figures, scores, sizes
from stasc.trajectory import Completion, InitialAnswer, Question, Record, Records, Trajectory, to_json

Answered = TypeVar("Answered", bound=Sequence[Trajectory])


class TrajectoryDataModule(LightningDataModule):
    """Samples, scores and filters trajectories, and hands out D_n in batches.

    Args:
        train: Questions to learn from (D_0).
        test: Questions to evaluate on.
        prompts: What is asked.
        sampling: How training answers and corrections are drawn.
        test_sampling: How answers and corrections are drawn in evaluation.
        test_samples: Initial answers per test question, each with one correction.
        test_greedy: Evaluate one more, greedy answer and correction per question.
        training_prompts: What the training examples ask; by default what was asked in sampling.
        prefix_sharing: Compute what the examples of a micro-batch begin with once for all of them; otherwise
            each is a padded row of its own. The gradient is the same.
        token_budget: Tokens of a micro-batch of one process, which bound the memory of training.
        group_corrections: Keep the corrections of an initial answer side by side in the shuffle.
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
        test_samples: int = 1,
        test_greedy: bool = False,
        training_prompts: Prompts | None = None,
        prefix_sharing: bool = True,
        token_budget: int = 16384,
        group_corrections: bool = False,
        predict: QuestionSource | None = None,
        output: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("test_samples", test_samples)):
            if size < 1:
                raise UserError(f"data.{name} is {size}: it must be 1 or more.")
        if sampling.temperature == 0 and max(algorithm.n_init, algorithm.n_corr) > 1:
            raise UserError(
                "data.sampling.temperature is 0, so all draws of a prompt are the same: "
                "raise it, or set algorithm.n_init and algorithm.n_corr to 1."
            )
        if test_sampling.temperature == 0 and test_samples > 1:
            raise UserError(
                "data.test_sampling.temperature is 0, so all samples of a question are the same: "
                "raise it, or set data.test_samples to 1."
            )
        for name in algorithm.prompts:
            if getattr(prompts, name) is None:
                raise UserError(f"data.prompts has no {name}: {algorithm.name} needs these messages.")
        self.sources = {"train": train, "test": test, "predict": predict}
        self.prompts = prompts
        self.training_prompts = training_prompts
        self.sampling = sampling
        self.test_sampling = test_sampling
        self.test_samples = test_samples
        self.test_greedy = test_greedy
        self.prefix_sharing = prefix_sharing
        self.token_budget = token_budget
        self.group_corrections = group_corrections
        self.reward = reward
        self.batch_size = batch_size
        self.output = output
        self.algorithm = algorithm
        self.sampler = sampler
        self.base = base
        self.run = Run(run_dir)
        self.seed = seed
        self.questions: dict[str, list[Question]] = {}
        self.dataset: Sequence[Trajectory] = []
        """D_n of the iteration under way."""
        self.learnt_from: dict[str, dict[str, Any]] = {}
        """Rewards of that iteration's trajectories, and what D_n holds."""
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
        generation_config = load_generation_config(self.base_folder)
        self.dialogue = Dialogue(tokenizer, self.prompts, generation_config)
        self.training_dialogue = Dialogue(tokenizer, self.training_prompts or self.prompts, generation_config)
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
        if self.algorithm.iterations == 0:
            return DataLoader([None], batch_size=None)
        n = self.iteration
        box = self.run.iteration(n)
        # M_0's answers, under Fixed initialisation, are those of iteration 1.
        first = self.run.iteration(self.algorithm.initial_model(n) + 1)
        answers = self._stage(first.initial, lambda: self._initial_answers(first.n))
        trajectories = self._stage(box.trajectories, lambda: self._second_turns(answers, n))
        self.dataset = self._stage(box.dataset, lambda: self.algorithm.select(trajectories))
        self.learnt_from = {
            "train": scores(trajectories, self.algorithm.threshold),
            "dataset": sizes(self.dataset),
        }
        if not self.dataset:
            # Lightning ends the whole fit on an empty loader; the module skips this one batch instead.
            return DataLoader([None], batch_size=None)
        batches = CorrectionBatches(
            self.dataset,
            lambda trajectory: self.algorithm.example(self.training_dialogue, trajectory),
            self.batch_size,
            seed=self.epoch_seed,
            token_budget=self.token_budget,
            prefix_sharing=self.prefix_sharing,
            group_corrections=self.group_corrections,
            longest=None if self.training_prompts else self.context,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
        )
        return DataLoader(batches, batch_size=None)

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

    def _second_turns(self, answers: Iterable[InitialAnswer], n: int) -> list[Trajectory]:
        self._load(n - 1)
        return self.algorithm.second_turns(self.rollout, list(answers), self.sampling, f"iteration {n}")

    # Evaluation

    def test_rounds(self, n: int) -> list[Records[Trajectory]]:
        """Answers of M_n to the test questions: trajectories of each round of corrections."""
        box, title = self.run.iteration(n), f"M_{n} on test"
        return self._rounds(n, title, lambda turn, make: self._stage(box.test_round(turn), make))

    def test_greedily(self, n: int) -> Records[Trajectory] | None:
        """The same greedily, with one correction; None unless ``test_greedy`` is set."""
        if not self.test_greedy:
            return None
        return self._stage(
            self.run.iteration(n).test_greedy, lambda: self._greedily(n, f"M_{n} on test, greedily")
        )

    def _rounds(
        self, n: int, title: str, stage: Callable[[int, Callable[[], list[Trajectory]]], Answered]
    ) -> list[Answered]:
        """One element for each round, which ``stage`` makes of its number and what makes its trajectories."""
        sampling = self.test_sampling

        def first() -> list[Trajectory]:
            own = partial(self._answer, "test", self.test_samples, n, sampling, title)
            return self._correct(self._to_correct(n, lambda box: box.test, own), n, sampling, title)

        rounds = [stage(1, first)]
        for turn in range(2, self.algorithm.rounds + 1):
            answers = [InitialAnswer(t.question, t.j, t.correction, t.r2) for t in rounds[-1]]
            again = partial(self._correct, answers, n, sampling, f"{title}, round {turn}")
            rounds.append(stage(turn, again))
        return rounds

    def _greedily(self, n: int, title: str) -> list[Trajectory]:
        greedy = dataclasses.replace(self.test_sampling, temperature=0.0)
        own = partial(self._answer, "test", 1, n, greedy, title)
        return self._correct(self._to_correct(n, lambda box: box.test_greedy, own), n, greedy, title)

    def _to_correct(
        self, n: int, file: Callable[[Iteration], Path], own: Callable[[], list[InitialAnswer]]
    ) -> list[InitialAnswer]:
        """The test answers that M_n corrects: its own, or those in a file of another model's evaluation."""
        model = self.algorithm.test_initial_model(n)
        if model == n:
            return own()
        evaluated = Records(file(self.run.iteration(model)))
        return [InitialAnswer(t.question, t.j, t.initial, t.r1) for t in evaluated]

    def _answer(
        self, questions: str, samples: int, n: int, sampling: Sampling, title: str
    ) -> list[InitialAnswer]:
        self._load(n)
        return self.rollout.initial_answers(self.questions[questions], samples, sampling, title)

    def _correct(
        self, answers: list[InitialAnswer], n: int, sampling: Sampling, title: str
    ) -> list[Trajectory]:
        self._load(n)
        return self.rollout.corrections(answers, 1, sampling, title, asks=self.algorithm.asks_again)

    # A model folder on its own: validate, test, predict

    def test_dataloader(self) -> DataLoader:
        """Rewards (r1, r2, ...) of the answers of ``model.base`` to the test questions, one for each turn.

        This process's share. The trajectories of all rounds are written one after another, and all figures
        beside them.
        """
        rounds = self._rounds(0, "test", lambda turn, make: make())
        greedy = self._greedily(0, "test, greedily") if self.test_greedy else None
        self._write_output(to_json(trajectory) for turn in rounds for trajectory in turn)
        if self.trainer.is_global_zero:
            path = self.output_path(self.trainer.state.fn.value).with_suffix(".metrics.json")
            write_json(path, figures(rounds, greedy, self.algorithm.threshold))
            print(f"all figures              {path}", flush=True)
        firsts = [t.r1 for t in rounds[0]]
        return self._share(list(zip(firsts, *([t.r2 for t in turn] for turn in rounds), strict=True)))

    def val_dataloader(self) -> DataLoader:
        """As ``test_dataloader``; the paper has no validation split."""
        return self.test_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Corrections of the ``predict`` questions by ``model.base``, this process's share."""
        answers = self._answer("predict", 1, 0, self.test_sampling, "predict")
        trajectories = self._correct(answers, 0, self.test_sampling, "predict")
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

    def _stage(self, path: Path, make: Callable[[], Iterable[Record]]) -> Records[Record]:
        """The records of a stage, which is done where its file is; what is used is what the file says."""
        if self.missing(path):
            records = make()
            if self.trainer.is_global_zero:
                write_lines(path, map(to_json, records))
                shutil.rmtree(self.run.journals, ignore_errors=True)
            self.trainer.strategy.barrier(f"{path.name} is written")
        return Records(path)

    def _check_context(self, name: str) -> int:
        """Tokens that the longest correction of a question set can need.

        Raises:
            UserError: They are more than the model takes.
        """
        takes = context_length(self.base_folder)
        sampling = [self.sampling, self.test_sampling] if name == "train" else [self.test_sampling]
        answer = max(s.max_tokens for s in sampling)
        longest = 0
        questions, nothing = self.questions[name], Completion("", (), True)
        firsts = self.dialogue.initial_prompts([question.text for question in questions])
        seconds = self.dialogue.correction_prompts([InitialAnswer(q, 0, nothing, 0.0) for q in questions])
        for question, first, second in zip(questions, firsts, seconds, strict=True):
            initial = len(first) + answer
            correction = len(second) + 2 * answer
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
