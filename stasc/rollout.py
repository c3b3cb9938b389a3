"""Steps 1 and 2 of Algorithm 1: questions -> initial answers -> corrections, each with its reward."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from tqdm.auto import tqdm

from stasc.errors import UserError
from stasc.journal import Journal
from stasc.prompting import Dialogue
from stasc.reward import Reward
from stasc.sampling import Draw, Request, Sampler, Sampling
from stasc.trajectory import Completion, InitialAnswer, Question, Trajectory

Scored = tuple[Completion, float]
"""A completion and its reward."""


class Rollout:
    """Samples both turns of a self-correction from whatever weights the sampler holds.

    With several training processes each samples its own share of the prompts and all get all of the
    results, so every method is a collective call.

    Args:
        sampler: Started, with weights loaded.
        dialogue: Renders the prompts.
        reward: Scores completions, as they come from the engine.
        seed: Of the run. Every draw follows from it, the stage, the question and the draw's number alone.
        context: Tokens that a prompt and its completion can take together.
        journals: Folder for the draws of a stage under way, where a restart finds them.
    """

    def __init__(
        self,
        sampler: Sampler,
        dialogue: Dialogue,
        reward: Reward,
        seed: int,
        context: int,
        journals: Path | None = None,
    ) -> None:
        self.sampler = sampler
        self.dialogue = dialogue
        self.reward = reward
        self.seed = seed
        self.context = context
        self.journals = journals

    def initial_answers(
        self, questions: Sequence[Question], n_init: int, sampling: Sampling, stage: str
    ) -> list[InitialAnswer]:
        """Step 1: ``n_init`` initial answers for each question, in the order of the questions."""
        prompts = self.dialogue.initial_prompts([question.text for question in questions])
        requests = [
            Request(prompt, n_init, self._seed(stage, "initial", question.id))
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        scored = self._complete(
            requests, [q.references for q in questions], sampling, f"{stage}: initial answers"
        )
        return [
            InitialAnswer(question, j, initial, r1)
            for question, answers in zip(questions, scored, strict=True)
            for j, (initial, r1) in enumerate(answers)
        ]

    def corrections(
        self,
        answers: Sequence[InitialAnswer],
        n_corr: int,
        sampling: Sampling,
        stage: str,
        *,
        asks: Callable[[InitialAnswer], bool] = lambda answer: True,
        prompts: Callable[[Sequence[InitialAnswer]], list[list[int]]] | None = None,
    ) -> list[Trajectory]:
        """Step 2: ``n_corr`` corrections for each initial answer, in the order of the answers.

        Args:
            answers: Initial answers.
            n_corr: Corrections of each.
            sampling: How they are drawn.
            stage: Part of what the draws follow from.
            asks: Whether an answer asks for corrections; one that does not stands as its own.
            prompts: Renders what is asked; by default the correction prompt.
        """
        asking = [answer for answer in answers if asks(answer)]
        rendered = (prompts or self.dialogue.correction_prompts)(asking)
        alike = self._alike(asking, rendered, sampling, stage)
        requests = [
            Request(prompt, n_corr * len(group), self._seed(stage, "correction", question_id, group[0].j))
            for (question_id, prompt), group in alike.items()
        ]
        references = [group[0].question.references for group in alike.values()]
        corrections: dict[tuple[str, int], list[Scored]] = {}
        drawn = self._complete(requests, references, sampling, f"{stage}: corrections")
        for group, scored in zip(alike.values(), drawn, strict=True):
            for at, answer in enumerate(group):
                own = scored[at * n_corr : (at + 1) * n_corr]
                corrections[answer.question.id, answer.j] = own
        return [
            Trajectory(answer.question, answer.j, k, answer.initial, correction, answer.r1, r2)
            for answer in answers
            for k, (correction, r2) in enumerate(
                corrections.get((answer.question.id, answer.j), [(answer.initial, answer.r1)])
            )
        ]

    def _alike(
        self,
        answers: Sequence[InitialAnswer],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        stage: str,
    ) -> dict[tuple[str, tuple[int, ...]], list[InitialAnswer]]:
        """Initial answers of one question that say the same share their prompt."""
        alike: dict[tuple[str, tuple[int, ...]], list[InitialAnswer]] = {}
        for answer, prompt in zip(answers, prompts, strict=True):
            if len(prompt) + sampling.max_tokens > self.context:
                raise UserError(
                    f"{stage}, question '{answer.question.id}': with its initial answer the correction "
                    f"prompt is {len(prompt)} tokens long, which leaves no room for max_tokens "
                    f"{sampling.max_tokens} in {self.context}; lower max_tokens or shorten the prompts."
                )
            alike.setdefault((answer.question.id, tuple(prompt)), []).append(answer)
        return alike

    def _seed(self, *path: str | int) -> int:
        """The seed of one request: 32 bits, all that torch's CPU generator takes in."""
        key = "/".join(map(str, (self.seed, *path))).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")

    def _complete(
        self, requests: Sequence[Request], references: Sequence[Sequence[str]], sampling: Sampling, title: str
    ) -> list[list[Scored]]:
        """The completions of every request, each with its reward by the references of its question."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        journal = Journal(self.journals, title, rank) if self.journals else None
        noted = _from_rank_zero(journal.read(requests)) if journal else {}
        completions = {i: self._score(drawn, references[i]) for i, drawn in noted.items()}
        share = [i for i in range(len(requests)) if i not in completions][rank::ranks]
        mine = [requests[i] for i in share]
        total = sum(request.n for request in mine)
        own, tokens = {}, 0
        with tqdm(total=total, desc=title, unit=" completions", disable=rank > 0) as bar:
            for at, drawn in self.sampler.sample(mine, sampling, self.dialogue.stop_ids):
                # Scored here, where the engine goes on meanwhile.
                own[share[at]] = self._score(drawn, references[share[at]])
                if journal:
                    journal.add(share[at], mine[at], drawn)
                tokens += sum(len(draw.token_ids) for draw in drawn)
                bar.update(len(drawn))
                said = f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s"
                if self.sampler.prefix_hits is not None:
                    said += f", {self.sampler.prefix_hits:.0%} of prompts cached"
                bar.set_postfix_str(said, refresh=False)
        for others in _from_all_ranks(own):
            completions |= others
        return [completions[i] for i in range(len(requests))]

    def _score(self, draws: list[Draw], references: Sequence[str]) -> list[Scored]:
        completions = [Completion(self.dialogue.decode(draw.token_ids), *draw) for draw in draws]
        return [(completion, self.reward(completion.text, references)) for completion in completions]


def _from_rank_zero(value: dict[int, list[Draw]]) -> dict[int, list[Draw]]:
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def _from_all_ranks(value: dict[int, list[Scored]]) -> list[dict[int, list[Scored]]]:
    if not dist.is_initialized():
        return [value]
    values: list[dict[int, list[Scored]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(values, value)
    return values
