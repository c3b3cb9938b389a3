"""Steps 1 and 2 of Algorithm 1: questions -> initial answers -> corrections, each with its reward."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch.distributed as dist
from tqdm.auto import tqdm

from stasc.errors import UserError
from stasc.prompting import Dialogue
from stasc.reward import Reward
from stasc.sampling import Draw, Request, Sampler, Sampling
from stasc.trajectory import Completion, InitialAnswer, Question, Trajectory


class Rollout:
    """Samples both turns of a self-correction from whatever weights the sampler holds.

    With several training processes each samples its own share of the prompts and all get all of the
    results, so every method is a collective call.

    Args:
        sampler: Started, with weights loaded.
        dialogue: Renders the prompts.
        reward: Scores completions.
        seed: Of the run. Every draw follows from it, the stage, the question and the draw's number alone.
        context: Tokens that a prompt and its completion can take together.
    """

    def __init__(self, sampler: Sampler, dialogue: Dialogue, reward: Reward, seed: int, context: int) -> None:
        self.sampler = sampler
        self.dialogue = dialogue
        self.reward = reward
        self.seed = seed
        self.context = context

    def initial_answers(
        self, questions: Sequence[Question], n_init: int, sampling: Sampling, stage: str
    ) -> list[InitialAnswer]:
        """Step 1: ``n_init`` initial answers for each question, in the order of the questions."""
        requests = [
            Request(self.dialogue.initial_prompt(q.text), n_init, self._seed(stage, "initial", q.id))
            for q in questions
        ]
        return [
            InitialAnswer(question, j, initial, self.reward(initial.text, question.references))
            for question, completions in zip(
                questions, self._complete(requests, sampling, f"{stage}: initial answers"), strict=True
            )
            for j, initial in enumerate(completions)
        ]

    def corrections(
        self, answers: Sequence[InitialAnswer], n_corr: int, sampling: Sampling, stage: str
    ) -> list[Trajectory]:
        """Step 2: ``n_corr`` corrections for each initial answer, in the order of the answers."""
        requests = [
            Request(
                self.dialogue.correction_prompt(a.question.text, a.initial.text),
                n_corr,
                self._seed(stage, "correction", a.question.id, a.j),
            )
            for a in answers
        ]
        for answer, request in zip(answers, requests, strict=True):
            if len(request.prompt_ids) + sampling.max_tokens > self.context:
                raise UserError(
                    f"{stage}, question '{answer.question.id}': with its initial answer the correction "
                    f"prompt is {len(request.prompt_ids)} tokens long, which leaves no room for max_tokens "
                    f"{sampling.max_tokens} in {self.context}; lower max_tokens or shorten the prompts."
                )
        return [
            Trajectory(
                question=answer.question,
                j=answer.j,
                k=k,
                initial=answer.initial,
                correction=correction,
                r1=answer.r1,
                r2=self.reward(correction.text, answer.question.references),
            )
            for answer, completions in zip(
                answers, self._complete(requests, sampling, f"{stage}: corrections"), strict=True
            )
            for k, correction in enumerate(completions)
        ]

    def _seed(self, *path: str | int) -> int:
        """The seed of one request: 32 bits, all that torch's CPU generator takes in."""
        key = "/".join(map(str, (self.seed, *path))).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")

    def _complete(
        self, requests: Sequence[Request], sampling: Sampling, title: str
    ) -> list[list[Completion]]:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = requests[rank::ranks]
        draws: list[list[Draw]] = [[] for _ in share]
        tokens = 0
        total = sum(request.n for request in share)
        with tqdm(total=total, desc=title, unit=" completions", disable=rank > 0) as bar:
            for i, drawn in self.sampler.sample(share, sampling, self.dialogue.stop_ids):
                draws[i] = drawn
                tokens += sum(len(draw.token_ids) for draw in drawn)
                bar.update(len(drawn))
                elapsed = bar.format_dict["elapsed"]
                bar.set_postfix_str(f"{tokens / max(elapsed, 1e-9):,.0f} tokens/s", refresh=False)
        if ranks > 1:
            shares: list[list[list[Draw]]] = [[] for _ in range(ranks)]
            dist.all_gather_object(shares, draws)
            draws = [shares[i % ranks][i // ranks] for i in range(len(requests))]
        return [[Completion(self.dialogue.decode(d.token_ids), *d) for d in drawn] for drawn in draws]
