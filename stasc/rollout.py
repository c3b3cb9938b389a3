"""Steps 1 and 2 of Algorithm 1: questions -> initial answers -> corrections, each with its reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stasc import processes
from stasc.algorithm import Turn
from stasc.answers import FinalAnswer
from stasc.errors import UserError
from stasc.progress import Progress
from stasc.prompting import Dialogue
from stasc.reward import Reward
from stasc.sampling import Draw, Request, Sampler, Sampling
from stasc.sampling.journal import Journal
from stasc.seeds import derived_seed
from stasc.trajectory import Answer, Question, Trajectory

Scored = tuple[Draw, str, float]
"""A draw, its text and its reward."""

_TITLES = {"initial": "initial answers", "correction": "corrections"}


class Rollout:
    """Samples the next answer of trajectories from the weights that the sampler holds.

    With several training processes each samples its share of the prompts and all get all of the results, so
    ``ask`` is a collective call.

    Args:
        sampler: Started, with weights loaded.
        dialogue: Renders the prompts.
        answer: Finds the answer in a completion.
        reward: Scores it, as it comes from the engine. Without one rewards are NaN, and no answer is looked
            for.
        seed: Of the run. Every draw follows from it, the stage, the prompt's name, the question and the
            numbers of the answers before.
        context: Tokens that a prompt and its answer can take together.
    """

    def __init__(
        self,
        sampler: Sampler,
        dialogue: Dialogue,
        answer: FinalAnswer | None,
        reward: Reward | None,
        seed: int,
        context: int,
    ) -> None:
        self.sampler = sampler
        self.dialogue = dialogue
        self.answer = answer
        self.reward = reward
        self.seed = seed
        self.context = context

    def ask(
        self,
        trajectories: Sequence[Trajectory],
        turn: Turn,
        sampling: Sampling,
        stage: str,
        journal: Callable[[str], Journal] | None = None,
        *,
        line: bool = True,
    ) -> list[Trajectory]:
        """Each trajectory with one more answer, ``turn.samples`` times, in the order of the trajectories.

        Trajectories that the turn does not ask come back once, as they are. Those of one question that lead
        to the same prompt share one request, and still get draws of their own.

        Args:
            trajectories: Questions, or what they have been answered so far.
            turn: The prompt, the number of draws, and who is asked.
            sampling: How they are drawn.
            stage: Name of the stage, from which the seeds follow.
            journal: Makes the journal of a stage, from which draws are read and to which they are written.
            line: Say at the end how long it took.
        """
        asked = [trajectory for trajectory in trajectories if turn.asks(trajectory)]
        groups: dict[tuple[str, tuple[int, ...]], list[Trajectory]] = {}
        for trajectory, prompt in zip(asked, self.dialogue.ask(turn.prompt, asked), strict=True):
            self._check_length(prompt, turn, trajectory.question, sampling, stage)
            groups.setdefault((trajectory.question.id, tuple(prompt)), []).append(trajectory)
        requests, questions = [], []
        for (_, prompt), group in groups.items():
            seed = derived_seed(self.seed, stage, turn.prompt, group[0].question.id, *group[0].path)
            requests.append(Request(prompt, turn.samples * len(group), seed))
            questions.append(group[0].question)
        title = f"{stage}: {_TITLES.get(turn.prompt, turn.prompt)}"
        scored = self._complete(requests, questions, sampling, title, journal and journal(title), line=line)
        answers: dict[tuple[str, tuple[int, ...]], list[Scored]] = {}
        for group, drawn in zip(groups.values(), scored, strict=True):
            for i, trajectory in enumerate(group):
                share = drawn[i * turn.samples : (i + 1) * turn.samples]
                answers[trajectory.question.id, trajectory.path] = share
        extended = []
        for trajectory in trajectories:
            drawn = answers.get((trajectory.question.id, trajectory.path))
            if drawn is None:
                extended.append(trajectory)
                continue
            for number, (draw, text, reward) in enumerate(drawn):
                answer = Answer(turn.prompt, number, text, draw.token_ids, draw.finished, reward)
                extended.append(Trajectory(trajectory.question, (*trajectory.answers, answer)))
        return extended

    def _check_length(
        self, prompt: list[int], turn: Turn, question: Question, sampling: Sampling, stage: str
    ) -> None:
        if len(prompt) + sampling.max_tokens > self.context:
            raise UserError(
                f"{stage}, question '{question.id}': with the answers in it the {turn.prompt} prompt is "
                f"{len(prompt)} tokens long, which leaves no room for max_tokens {sampling.max_tokens} in "
                f"{self.context}; lower max_tokens or shorten the prompts."
            )

    def _complete(
        self,
        requests: Sequence[Request],
        questions: Sequence[Question],
        sampling: Sampling,
        title: str,
        journal: Journal | None,
        *,
        line: bool,
    ) -> list[list[Scored]]:
        """The draws of every request, each with its text and its reward."""
        rank = processes.rank()
        known = processes.from_rank_zero(journal.read(requests) if journal and rank == 0 else {})
        # Completion i of a request follows from seed + i, so the missing ones are a request as well.
        missing = {
            i: Request(request.prompt_ids, request.n - done, request.seed + done)
            for i, request in enumerate(requests)
            if (done := len(known.get(i, ()))) < request.n
        }
        share = list(missing)[rank :: processes.count()]
        scored = {i: self._score(draws, questions[i]) for i, draws in known.items() if i not in missing}
        mine, tokens = {}, 0
        if share:
            with Progress("the engine gets ready"):
                self.sampler.wait()
        if processes.count() > 1:
            title += f", process 1 of {processes.count()}"
        with Progress(title, sum(missing[i].n for i in share), line=line) as progress:
            for at, draws in self.sampler.sample(
                [missing[i] for i in share], sampling, self.dialogue.stop_ids
            ):
                i = share[at]
                drawn = [*known.get(i, ()), *draws]
                mine[i] = self._score(drawn, questions[i])  # here, while the engine samples on
                if journal:
                    journal.add(requests[i], drawn)
                tokens += sum(len(draw.token_ids) for draw in draws)
                rate = f"{tokens / max(progress.seconds, 1e-9):,.0f} tokens/s"
                if self.sampler.prefix_hits is not None:
                    rate += f", {self.sampler.prefix_hits:.0%} cached"
                progress.update(len(draws), rate)
        for others in processes.from_all_ranks(mine):
            scored |= others
        return [scored[i] for i in range(len(requests))]

    def _score(self, draws: Sequence[Draw], question: Question) -> list[Scored]:
        scored = []
        for draw in draws:
            text = self.dialogue.decode(draw.token_ids)
            scored.append((draw, text, self._reward(text, question) if self.reward else math.nan))
        return scored

    def _reward(self, text: str, question: Question) -> float:
        try:
            answer = self.answer.find(text)
            if not isinstance(answer, str):
                name = type(self.answer).__name__
                raise UserError(f"{name}.find gave {answer!r} for a completion: it must give a text.")
            reward = self.reward.judge(answer, question)
        except Exception as error:
            error.add_note(f"on an answer to question '{question.id}'")
            raise
        if not isinstance(reward, int | float) or not 0 <= reward <= 1:  # nan is refused, too
            raise UserError(
                f"the reward {type(self.reward).__name__} gave {reward!r} for an answer to question "
                f"'{question.id}': it must give a number from 0 to 1."
            )
        return float(reward)
