"""A model that a run made, in use: it answers questions and corrects its answers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch

from stasc.algorithm import Turn
from stasc.errors import UserError
from stasc.manual import Manual
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue
from stasc.rollout import Rollout
from stasc.sampling import Sampler, TransformersSampler
from stasc.trajectory import Question, Trajectory


class SelfCorrector:
    """Answers questions and corrects its answers, as M_n did in the evaluation of its run.

    For example:

        corrector = SelfCorrector.from_pretrained("runs/quickstart/iteration-05/model")
        trajectory = corrector.ask("What are the last letters of Jacob, Tim and Ruth?")
        print(trajectory.after(1).text, "->", trajectory.after(2).text)

    Args:
        folder: The model.
        manual: How it is asked.
        sampler: The engine.
        seed: What all draws follow from.
        context: Tokens that a prompt and its answer can take together, if the model takes as many.
    """

    def __init__(
        self, folder: ModelFolder, manual: Manual, sampler: Sampler, seed: int = 42, context: int = 8192
    ) -> None:
        self.manual = manual
        self.sampler = sampler
        tokenizer, generation_config = folder.tokenizer(), folder.generation_config()
        dialogue = Dialogue(tokenizer, manual.prompts, generation_config, manual.template)
        context = min(context, folder.context)
        self._rollout = Rollout(sampler, dialogue, None, None, seed, context)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        log = Path(tempfile.mkdtemp(prefix="stasc-")) / "engine.log"
        sampler.start(folder.path, device=device, context=context, log=log)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, sampler: Sampler | None = None, seed: int = 42, context: int = 8192
    ) -> SelfCorrector:
        """A model with the prompts and the sampling that its folder names.

        Args:
            model: Its folder, or its id on the Hugging Face hub.
            sampler: The engine: by default ``TransformersSampler()``; for many questions ``VLLMSampler()``.
            seed: What all draws follow from.
            context: Tokens that a prompt and its answer can take together, if the model takes as many.

        Raises:
            UserError: There is no such model, or its folder does not say how it is asked.
        """
        folder = ModelFolder.locate(str(model))
        return cls(folder, Manual.read(folder.path), sampler or TransformersSampler(), seed, context)

    @overload
    def ask(self, questions: str, rounds: int | None = None) -> Trajectory: ...

    @overload
    def ask(self, questions: Sequence[str], rounds: int | None = None) -> list[Trajectory]: ...

    def ask(self, questions: str | Sequence[str], rounds: int | None = None) -> Trajectory | list[Trajectory]:
        """Answer a question, or many at a time, and correct the answers.

        The same questions in the same order get the same answers.

        Args:
            questions: One question, or a list of them.
            rounds: Corrections one after another; by default as many as in the evaluation of the run.

        Returns:
            The trajectory of the question, or those of the questions in their order: ``after(1).text`` is the
            initial answer, ``after(2).text`` its correction. Their rewards are NaN.

        Raises:
            UserError: ``rounds`` is below 0, or a question is too long for the model.
        """
        if isinstance(questions, str):
            return self.ask([questions], rounds)[0]
        trajectories = [
            Trajectory(Question(str(number), text)) for number, text in enumerate(questions, start=1)
        ]
        for number, prompt in enumerate(self._prompts(rounds), start=1):
            # A draw's seed follows from the name of its stage, so a third turn needs one that differs.
            stage = "ask" if number <= 2 else f"ask, round {number - 1}"
            trajectories = self._rollout.ask(trajectories, Turn(prompt), self.manual.sampling, stage)
        return trajectories

    def close(self) -> None:
        """End the engine, which else ends with the program."""
        self.sampler.close()

    def _prompts(self, rounds: int | None) -> list[str]:
        """The prompts of all turns; the last is sent again where more are asked for than the manual has."""
        turns = self.manual.turns
        if rounds is None:
            return turns
        if rounds < 0:
            raise UserError(f"rounds is {rounds}: it must be 0 or more.")
        return [*turns[: rounds + 1], *turns[-1:] * (rounds + 1 - len(turns))]
