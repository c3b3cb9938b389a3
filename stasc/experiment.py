"""Algorithm 1 of the paper, on files: what each iteration samples, keeps, starts from and is evaluated by."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stasc import processes
from stasc.algorithm import Algorithm, Turn
from stasc.answers import FinalAnswer
from stasc.errors import UserError
from stasc.manual import Manual
from stasc.metrics import (
    answer_metrics,
    chosen,
    dataset_sizes,
    evaluation_metrics,
    reward_metrics,
    sampled,
    why_empty,
)
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, check_prompts
from stasc.provenance import fingerprint
from stasc.reward import Reward
from stasc.rollout import Rollout
from stasc.run import Iteration, Run, read_json, remove_folder, write_json, write_lines
from stasc.sampling import Sampler, Sampling
from stasc.sampling.journal import Journal
from stasc.sampling.probe import SEQUENCES, TOKENS, Probe
from stasc.trajectory import Example, Question, Record, Records, Trajectory, to_json, unanswered
from stasc.updates import Updates


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a model is evaluated.

    Args:
        sampling: How answers and corrections are drawn.
        samples: Initial answers per question, each with one correction.
        greedy: Also draw one greedy answer and correction per test question.
        marker: What comes before the final answer, in any case. The majority vote of several samples compares
            what follows it in the answer that ``data.answer`` finds, or that answer where it does not occur.
        test_every: Evaluate on the test questions after every so many iterations; M_0, M_N and the model that
            the validation questions choose always are. On the validation questions every model is evaluated.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    samples: int = 1
    greedy: bool = False
    marker: str | None = "Final Answer:"
    test_every: int = 1

    def __post_init__(self) -> None:
        if self.marker is not None and not self.marker.strip():
            raise UserError("data.evaluation.marker is blank: give a text, or null for none.")
        for name in ("samples", "test_every"):
            if getattr(self, name) < 1:
                raise UserError(f"data.evaluation.{name} is {getattr(self, name)}: it must be 1 or more.")
        if self.sampling.temperature == 0 and self.samples > 1:
            raise UserError(
                "data.evaluation.sampling.temperature is 0, so all samples of a question are the same: raise "
                "it, or set data.evaluation.samples to 1."
            )


@dataclasses.dataclass
class Experiment:
    """Algorithm 1 (section 2.2 of the paper): the stages of an iteration, in the order in which they follow.

    A stage is done when its file exists, and what it returns is what the file holds (``stasc/run.py`` has the
    files). So a stage may be asked for again, and a run that was killed goes on where it stopped. With
    several processes all methods that sample or read are collective calls.

    Args:
        algorithm: Makes the choices.
        sampler: The engine that holds the model which answers.
        dialogue: Renders the prompts.
        training_dialogue: Renders the prompts of training examples, which may have other words.
        answer: Finds the answer in a completion.
        reward: r, scores it.
        questions: ``train`` (D_0), ``validation`` if there are any, and ``test``; or one of these or
            ``predict`` alone. Only those that will be asked.
        sampling: How training answers and corrections are drawn; None without ``train``.
        evaluation: How a model is evaluated.
        base: M_0.
        run: The run folder.
        seed: What all draws follow from.
        reuse: A run, or a folder of runs, whose draws from M_0 are taken where they answer the same request.
        keep_models: So many models stay on disk, the last ones, beside the one that validation chooses; None:
            all.
        origin: What the metrics of a model folder on its own say of where they come from.
    """

    algorithm: Algorithm
    sampler: Sampler
    dialogue: Dialogue
    training_dialogue: Dialogue
    answer: FinalAnswer
    reward: Reward
    questions: Mapping[str, Sequence[Question]]
    sampling: Sampling | None
    evaluation: Evaluation
    base: ModelFolder
    run: Run
    seed: int
    reuse: Path | None = None
    keep_models: int | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    # ------------------------------------------------------------------ Algorithm 1: for n = 1 to N do

    def initial_answers(self, n: int) -> Sequence[Trajectory]:
        """Step 1 (lines 2 to 5): N_init initial answers to each question, from M_{n-1} or M_0."""
        m = self.algorithm.initial_model(n)
        # They are those of iteration m + 1: what M_0 answers is drawn once and serves all iterations.
        questions, turns = unanswered(self.questions["train"]), self.algorithm.turns[:1]
        ask = partial(self._ask, m, questions, turns, self.sampling, f"iteration {m + 1}")
        return self._stage(self.run.iteration(m + 1).answers(1), "train", ask)

    def trajectories(self, n: int) -> Sequence[Trajectory]:
        """Step 2 (lines 6 and 7): N_corr corrections of each by M_{n-1}, and any further turns."""
        if self.on_policy:  # ``updates.write`` has written them
            return self._records(self.run.iteration(n).answers(len(self.algorithm.turns)), "train")
        trajectories = self.initial_answers(n)
        for number, turn in enumerate(self.algorithm.turns[1:], start=2):
            ask = partial(self._ask, n - 1, trajectories, [turn], self.sampling, f"iteration {n}", number)
            trajectories = self._stage(self.run.iteration(n).answers(number), "train", ask)
        return trajectories

    def dataset(self, n: int) -> Sequence[Example]:
        """Step 3 (lines 8 to 12): D_n, what the filter keeps of them."""
        trajectories = self.trajectories(n)
        return self._stage(self.run.iteration(n).dataset, "train", lambda: self.select(n, trajectories))

    def base_model(self, n: int) -> int:
        """Step 4 (lines 13 to 16): the number of the model that training on D_n makes M_n."""
        return self.algorithm.base_model(n)

    def evaluate(self, n: int) -> dict[str, Any]:
        """Rewards of M_n on the validation questions, and on the test questions where that is due.

        It is done when ``metrics.json`` exists; what that file holds.
        """
        path = self.run.iteration(n).metrics
        if self.missing(path):
            metrics = {"iteration": n, **self._validation(n)}
            if self.tests(n):
                metrics |= self._test(n)
            if n:
                metrics |= read_json(self.run.iteration(n).training, "train", "dataset", "training")
            self._write(path, metrics | self._measured(n, metrics))
        return read_json(path, "iteration")

    def tests(self, n: int) -> bool:
        """Whether M_n is evaluated on the test questions in its turn, whatever is chosen in the end."""
        return n % self.evaluation.test_every == 0 or n == self.algorithm.iterations

    def choose(self) -> int | None:
        """The iteration whose corrections are best on the validation questions, once all are evaluated.

        The first of equals; it is evaluated on the test questions if it was not yet. None without validation
        questions: then nothing chooses but the test set.
        """
        if "validation" not in self.questions:
            return None
        n = self._best(self.algorithm.iterations)
        metrics = read_json(path := self.run.iteration(n).metrics)
        if "test" not in metrics:
            metrics |= self._test(n)
            self._write(path, metrics | self._measured(n, metrics))
        return n

    def remove_models(self, n: int) -> None:
        """Once M_n is evaluated and its checkpoint written, remove the models that are not to stay.

        What later iterations start from stays too, as long as they need it.
        """
        if self.keep_models is None:
            return
        algorithm, later = self.algorithm, range(n + 1, self.algorithm.iterations + 1)
        stay = {self._best(n)} if "validation" in self.questions else set()
        for needed in (algorithm.initial_model, algorithm.base_model, algorithm.test_initial_model):
            stay |= set(map(needed, later))
        for m in range(1, n - self.keep_models + 1):
            if m not in stay:
                remove_folder(self.run.iteration(m).model)

    # ------------------------------------------------------------------ around it

    def start(self, device: torch.device, log: Path, memory: int | None = None) -> None:
        """Start the engine with M_0; it gets ready while the trainer loads its model.

        Args:
            device: Where this process trains, and where its engine samples.
            log: What the engine itself prints.
            memory: Bytes of the device that the engine may take; None: whatever is free.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self.rollout = Rollout(self.sampler, self.dialogue, self.answer, self.reward, self.seed, self.context)
        self._loaded: int | None = 0
        self.sampler.memory = memory
        self.sampler.start(self.base.path, device=device, context=self.context, log=log)

    @property
    def on_policy(self) -> bool:
        """Whether each training epoch samples its own share of D_n; then ``updates`` makes it."""
        return self.algorithm.questions_per_update is not None

    def model_folder(self, n: int) -> Path:
        """Where M_n lies."""
        return self.run.iteration(n).model if n else self.base.path

    @property
    def manual(self) -> Manual:
        """How every M_n is asked in evaluation, for those who use it."""
        turns = [turn.prompt for turn in self.algorithm.test_turns(1)]
        return Manual.of_run(self.run.read_config(), turns)

    def probe_sequences(self) -> list[list[int]]:
        """A few token sequences on which the engine and the trainer must agree."""
        prompts = self.dialogue.ask(
            self.algorithm.turns[0].prompt, unanswered(self.questions["train"][:SEQUENCES])
        )
        return [prompt[-TOKENS:] for prompt in prompts]

    def training_metrics(self, n: int) -> dict[str, dict[str, float]]:
        """Rewards of the trajectories of iteration n and what was sampled for them, and the sizes of D_n."""
        trajectories = self.trajectories(n)
        first = 1 if self.algorithm.initial_model(n) == n - 1 else 2  # M_0's answers are drawn but once
        return {
            "train": reward_metrics(trajectories, self.algorithm.threshold) | sampled(trajectories, first),
            "dataset": dataset_sizes(self.dataset(n)),
        }

    def why_empty(self, n: int) -> str:
        """What there was to select D_n from, where it is empty."""
        return why_empty(self.trajectories(n), self.algorithm.threshold)

    def validate(self) -> tuple[list[Sequence[Trajectory]], dict[str, dict[str, float]]]:
        """M_0 on the validation questions, without files: the trajectories, and their metrics."""
        rounds = self._answers("validation", 0, "validation")
        metrics = {"validation": answer_metrics(rounds[0], self.algorithm.threshold)}
        return rounds, metrics | {"measured": dict(self.origin)}

    def test(self) -> tuple[list[Sequence[Trajectory]], dict[str, dict[str, float]]]:
        """M_0 on the test questions, without files: trajectories after each correction, and all metrics."""
        rounds, greedy = self._answers("test", 0, "test"), self._greedy(0, "test, greedily")
        return rounds, self._metrics(rounds, greedy) | {"measured": dict(self.origin)}

    def predict(self) -> Sequence[Trajectory]:
        """Answers and corrections of M_0 to the ``predict`` questions, without files."""
        turns = self.algorithm.test_turns(1)[:2]
        questions, sampling = unanswered(self.questions["predict"]), self.evaluation.sampling
        return self._ask(0, questions, turns, sampling, "predict", journal=False)

    def missing(self, path: Path) -> bool:
        """Whether a file is still to be made; rank 0 alone looks, so that all processes agree.

        On a network file system a node that looked too would go on for a while not to see the file.
        """
        return processes.from_rank_zero(processes.rank() == 0 and not path.exists())

    # ------------------------------------------------------------------ evaluation

    def _best(self, n: int) -> int:
        """The model among M_0 to M_n that the validation questions choose."""
        return chosen([read_json(self.run.iteration(m).metrics, "validation") for m in range(n + 1)])

    def _validation(self, n: int) -> dict[str, dict[str, float]]:
        """What M_n's initial answers and corrections reach on the validation questions, if there are any."""
        if "validation" not in self.questions:
            return {}
        turns = self.algorithm.test_turns(self.evaluation.samples)[:2]
        file = lambda files, _: files.validation  # noqa: E731
        [trajectories] = self._answers("validation", n, "M_{n} on validation", file, turns)
        return {"validation": answer_metrics(list(trajectories), self.algorithm.threshold)}

    def _test(self, n: int) -> dict[str, dict[str, float]]:
        """All metrics of M_n on the test questions."""
        rounds = self._answers("test", n, "M_{n} on test", Iteration.test_answers)
        greedy = self._greedy(n, "M_{n} on test, greedily", lambda files, _: files.test_greedy)
        return self._metrics(rounds, greedy)

    def _measured(self, n: int, metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Which model, config and questions the metrics of M_n are of; the same in every folder."""
        groups = [name for name in ("validation", "test") if name in metrics]
        questions = {name: fingerprint(self.questions[name]) for name in groups}
        return {
            "measured": {"model": f"M_{n}", "config": f"../{self.run.config.name}", "questions": questions}
        }

    def _answers(
        self,
        source: str,
        n: int,
        name: str,
        file: Callable[[Iteration, int], Path] | None = None,
        turns: Sequence[Turn] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Sequence[Trajectory]]:
        """M_n on a question set: trajectories after the first correction, after the second, and so on.

        Args:
            source: Name of the question set.
            n: Number of the model.
            name: From which, with ``n`` in it, the seeds follow.
            file: The file of an iteration for the trajectories after so many turns, if there is to be one.
            turns: By default those of the algorithm.
            sampling: By default that of the evaluation.
        """
        first, *later = turns or self.algorithm.test_turns(self.evaluation.samples)
        sampling = sampling or self.evaluation.sampling
        stage_name = name.format(n=n)
        ask = partial(self._ask, journal=file is not None)

        def stage(number: int, make: Callable[[], Sequence[Trajectory]]) -> Sequence[Trajectory]:
            return self._stage(file(self.run.iteration(n), number), source, make) if file else make()

        def first_two_turns() -> Sequence[Trajectory]:
            m = self.algorithm.test_initial_model(n)
            if m == n or file is None:
                answers = ask(n, unanswered(self.questions[source]), [first], sampling, stage_name)
            else:
                [of_m] = self._answers(source, m, name, file, [first, *later[:1]], sampling)
                answers = [trajectory.upto(1) for trajectory in of_m]
            return ask(n, answers, later[:1], sampling, stage_name, 2)

        rounds = [stage(2, first_two_turns)]
        for number, turn in enumerate(later[1:], start=3):
            rounds.append(stage(number, partial(ask, n, rounds[-1], [turn], sampling, stage_name, number)))
        return rounds

    def _greedy(
        self, n: int, name: str, file: Callable[[Iteration, int], Path] | None = None
    ) -> Sequence[Trajectory] | None:
        """M_n on the test questions, greedily, with one correction; None if that is not asked for."""
        if not self.evaluation.greedy:
            return None
        greedy = dataclasses.replace(self.evaluation.sampling, temperature=0.0)
        return self._answers("test", n, name, file, self.algorithm.test_turns(1)[:2], greedy)[0]

    def _metrics(
        self, rounds: Sequence[Sequence[Trajectory]], greedy: Sequence[Trajectory] | None
    ) -> dict[str, dict[str, float]]:
        threshold, marker = self.algorithm.threshold, self.evaluation.marker
        return evaluation_metrics(rounds, greedy, threshold, self.answer, marker)

    # ------------------------------------------------------------------ models and files

    def _ask(
        self,
        n: int,
        trajectories: Iterable[Trajectory],
        turns: Sequence[Turn],
        sampling: Sampling,
        stage: str,
        first: int = 1,
        *,
        journal: bool = True,
    ) -> Sequence[Trajectory]:
        """Have M_n take some turns, the number of the first of which is ``first``."""
        self.load(n)
        make_journal = partial(self._journal, n, sampling) if journal else None
        return self.take_turns(trajectories, turns, sampling, stage, first, make_journal)

    def take_turns(
        self,
        trajectories: Iterable[Trajectory],
        turns: Sequence[Turn],
        sampling: Sampling,
        stage: str,
        first: int = 1,
        make_journal: Callable[[str], Journal] | None = None,
        *,
        line: bool = True,
    ) -> list[Trajectory]:
        """Have the model that the sampler holds take some turns."""
        trajectories = list(trajectories)
        for number, turn in enumerate(turns, start=first):
            # A draw's seed follows from the name of its stage, so a third turn needs one that differs.
            name = stage if number <= 2 else f"{stage}, round {number - 1}"
            trajectories = self.rollout.ask(trajectories, turn, sampling, name, make_journal, line=line)
        return trajectories

    def load(self, n: int) -> None:
        """Have the sampler take M_n, and make sure that it did."""
        if n == self._loaded:
            return
        folder, before = self.model_folder(n), None
        if self._loaded is not None and (path := self.run.iteration(self._loaded).probe).is_file():
            before = Probe.read(path)
        self.sampler.load(folder)
        if n > 0:
            Probe.read(self.run.iteration(n).probe).check(self.sampler, folder, before)
        self._loaded = n

    def take_over(self, folder: Path) -> None:
        """Have the sampler hold weights that are no M_n, but those that train; ``folder`` has them."""
        self.sampler.load(folder)
        self._loaded = None

    def _journal(self, n: int, sampling: Sampling, stage: str) -> Journal:
        """The journal of a stage in which M_n answers; that of M_0 stays, for other runs."""
        model = ModelFolder(self.model_folder(n)).identity()
        follows_from = (model, self.sampler.identity, vars(sampling), self.dialogue.stop_ids)
        folder = self.run.draws / ("M_0" if n == 0 else "under-way")
        others = self.reuse.glob("**/draws/M_0") if self.reuse and n == 0 else ()
        return Journal(folder, stage, processes.rank(), json.dumps(follows_from), others)

    def select(self, n: int, trajectories: Iterable[Trajectory]) -> Iterator[Example]:
        """What the algorithm selects, if it is what the algorithm says that it learns."""
        name = type(self.algorithm).__name__
        selected = self.algorithm.select(n, trajectories)
        if not isinstance(selected, Iterable):
            raise UserError(
                f"{name}.select gave {selected!r}: it must give examples, as t.learn() makes them."
            )
        for example in selected:
            if not isinstance(example, Example):
                kind = type(example).__name__
                raise UserError(
                    f"{name}.select gave a {kind}: it must give examples, as t.learn() makes them."
                )
            if example.prompt not in self.algorithm.learns:
                raise UserError(
                    f"{name}.select gave an example for the prompt '{example.prompt}': "
                    f"add it to {name}.learns."
                )
            if example.kl and not self.algorithm.stays_near_m0:
                raise UserError(f"{name}.select gave an example with kl: set {name}.stays_near_m0 to True.")
            yield example

    def _stage(self, path: Path, source: str, make: Callable[[], Iterable[Record]]) -> Records[Record]:
        """The records in the file of a stage, which are made and written if it does not exist.

        Args:
            path: The file.
            source: Name of the question set that they answer.
            make: Gives the records.
        """
        if self.missing(path):
            records = make()
            if processes.rank() == 0:
                self.run.note_lines(path, write_lines(path, map(to_json, records)))
                shutil.rmtree(self.run.draws / "under-way", ignore_errors=True)
            processes.wait_for(path)
        return self._records(path, source)

    def _records(self, path: Path, source: str) -> Records[Record]:
        """The records in a file, all that were written, with the questions that were asked."""
        questions = {question.id: question for question in self.questions[source]}
        records = Records(path, questions, f"data.{source}")
        written, found = self.run.lines(path), len(records)
        if written is None and processes.rank() == 0:  # killed before it could note them
            self.run.note_lines(path, found)
        elif written not in (None, found):
            raise UserError(
                f"{path} has {found} lines, and {written} were written: remove it, and the same command "
                "makes it anew."
            )
        return records

    def _write(self, path: Path, metrics: dict[str, Any]) -> None:
        if processes.rank() == 0:
            write_json(path, metrics)
        processes.wait_for(path)

    # ------------------------------------------------------------------ checks before an engine starts

    def __post_init__(self) -> None:
        if self.reuse is not None and not self.reuse.is_dir():
            raise UserError(f"reuse is {self.reuse}, which is not a folder: name a run, or a folder of runs.")
        if self.keep_models is not None and self.keep_models < 1:
            raise UserError(f"keep_models is {self.keep_models}: it must be 1 or more, or null to keep all.")
        greedy = self.sampling is not None and self.sampling.temperature == 0
        if greedy and any(turn.samples > 1 for turn in self.algorithm.turns):
            raise UserError(
                "data.sampling.temperature is 0, so all draws of a prompt are the same: "
                "raise it, or set algorithm.n_init and algorithm.n_corr to 1."
            )
        self.algorithm.check(self.evaluation.samples)
        if self.on_policy and "train" in self.questions:
            self.updates = Updates(self)
        learns = self.algorithm.learns if self.algorithm.iterations else set()
        asks = {turn.prompt for turn in (*self.algorithm.turns, *self.algorithm.test_turns(1))}
        check_prompts(self.dialogue.prompts, asks | learns, "data.prompts")
        check_prompts(self.training_dialogue.prompts, learns, "data.training_prompts")
        if (last := max(self.dialogue.stop_ids)) >= (vocabulary := self.base.vocabulary):
            raise UserError(
                f"token {last} ends a turn, and the model in {self.base.path} has {vocabulary} tokens: "
                "correct the eos_token_id of its generation_config.json, or its tokenizer."
            )
        self._loaded = 0
        self.longest_prompt = 0, ""
        """Tokens of the longest prompt that answers may be learnt for, without the answers that it will hold,
        and the id of its question."""
        self.context = max(map(self._longest, self.questions))
        """Tokens that the longest prompt and its answer can take together."""

    def _longest(self, name: str) -> int:
        """Tokens that the longest prompt of a question set and its answer can take.

        Raises:
            UserError: They are more than the model takes.
        """
        if name == "train":
            turns, max_tokens = self.algorithm.turns, self.sampling.max_tokens
        else:
            turns, max_tokens = self.algorithm.test_turns(1), self.evaluation.sampling.max_tokens
        questions, longest, room = self.questions[name], 0, self.base.context
        for number, turn in enumerate(turns, start=1):
            lengths, answers = self.dialogue.lengths(turn.prompt, number, questions)
            if name == "train" and turn.prompt in self.algorithm.learns:
                ids = [question.id for question in questions]
                self.longest_prompt = max(self.longest_prompt, *zip(lengths, ids, strict=True))
            for question, length in zip(questions, lengths, strict=True):
                needed = length + (answers + 1) * max_tokens
                if needed > room:
                    raise UserError(
                        f"data.{name}, question '{question.id}': its {turn.prompt} prompt and the answers "
                        f"can need {needed} tokens, and the model takes {room}; shorten the question or the "
                        "prompts, or lower max_tokens."
                    )
                # Broken UTF-8 that a model writes is decoded to a replacement character of three bytes, so
                # an answer that is tokenised again in a prompt can be that much longer than it was sampled.
                longest = max(longest, needed + 2 * answers * max_tokens)
        return min(longest, room)
