"""From questions and answers to token ids: the prompts, and which tokens end a turn.

A training example is the very prompt a correction was sampled from, followed by the very tokens that were
sampled. Nothing here knows a particular chat template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from stasc.errors import UserError
from stasc.trajectory import Completion, InitialAnswer, Trajectory


@dataclass(frozen=True)
class Message:
    """One chat message; ``content`` may hold the placeholders of its prompt, such as ``{question}``."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Prompts:
    """The prompts of the method (appendix A of the paper), demonstrations included.

    Args:
        initial: Messages that ask for an initial answer; ``{question}`` stands for the question.
        correction: Messages that ask for a correction; ``{initial_answer}`` stands for what may be wrong.
        rationalization: Messages that ask for an answer whose end is known, which only STaR does;
            ``{reference}`` stands for the hint.
    """

    initial: list[Message]
    correction: list[Message]
    rationalization: list[Message] | None = None

    def __post_init__(self) -> None:
        for prompt, placeholders in (
            ("initial", ["{question}"]),
            ("correction", ["{question}", "{initial_answer}"]),
            ("rationalization", ["{question}", "{reference}"]),
        ):
            messages = getattr(self, prompt)
            if messages is None:
                continue
            text = "".join(message.content for message in messages)
            for placeholder in placeholders:
                if placeholder not in text:
                    raise UserError(f"data.prompts.{prompt} has no {placeholder}: put it into a message.")


class Dialogue:
    """Renders the prompts with a tokenizer's chat template.

    A system message is folded into the first user message where the template refuses or drops it.

    Args:
        tokenizer: With a chat template.
        prompts: The messages.
        generation_config: Of the same model; its end-of-sequence ids stop a completion too.

    Raises:
        UserError: The tokenizer has no chat template, or no way to end a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in {tokenizer.name_or_path} has no chat template: "
                "use an instruction-tuned model, or add chat_template.jinja to the folder."
            )
        self.tokenizer = tokenizer
        self.prompts = prompts
        self._keeps_system = self._template_keeps_system()
        self.end_of_turn = self._find_end_of_turn()
        config_stops = generation_config.eos_token_id if generation_config else None
        config_stops = [config_stops] if isinstance(config_stops, int) else config_stops or []
        stops = {self.end_of_turn, tokenizer.eos_token_id, *config_stops} - {None}
        self.stop_ids: tuple[int, ...] = tuple(sorted(stops))

    def initial_prompt(self, question: str) -> list[int]:
        """Token ids that ask for an initial answer to ``question``."""
        return self.initial_prompts([question])[0]

    def initial_prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """The same for many questions, in much less time than one after another."""
        return self._render(self.prompts.initial, [{"question": question} for question in questions])

    def correction_prompt(self, question: str, initial_answer: str) -> list[int]:
        """Token ids that ask for a correction of ``initial_answer``."""
        return self._render(self.prompts.correction, [_to_correct(question, initial_answer)])[0]

    def correction_prompts(self, answers: Sequence[InitialAnswer]) -> list[list[int]]:
        """The same for many initial answers."""
        values = [_to_correct(answer.question.text, answer.initial.text) for answer in answers]
        return self._render(self.prompts.correction, values)

    def rationalization_prompts(self, answers: Sequence[InitialAnswer]) -> list[list[int]]:
        """Token ids that ask for another answer to the same questions, with the first reference as a hint."""
        return self._render(
            self.prompts.rationalization,
            [{"question": a.question.text, "reference": a.question.references[0]} for a in answers],
        )

    def training_example(self, trajectory: Trajectory) -> tuple[list[int], list[int]]:
        """The correction prompt's ids, which carry no loss, and the correction's, which do."""
        prompt = self.correction_prompt(trajectory.question.text, trajectory.initial.text)
        return prompt, self.target(trajectory.correction)

    def target(self, completion: Completion) -> list[int]:
        """What a completion teaches: its ids and the end-of-turn token.

        One that was cut at the token limit has no such token: the model is taught what it said, not to stop
        there.
        """
        said = list(completion.token_ids)
        return [*said, self.end_of_turn] if completion.finished else said

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """The text of a completion."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _render(self, messages: list[Message], values: Sequence[Mapping[str, str]]) -> list[list[int]]:
        if not values:
            return []
        conversations = [[_fill(message, of_one) for message in messages] for of_one in values]
        if not self._keeps_system:
            conversations = [_fold_system(filled) for filled in conversations]
        try:
            return self.tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the messages of data.prompts "
                f"({error}): change their roles or order."
            ) from error

    def _template_keeps_system(self) -> bool:
        probe = [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "x"}]
        try:
            return "SYSTEM-PROBE" in self.tokenizer.apply_chat_template(probe, tokenize=False)
        except TemplateError:
            return False

    def _find_end_of_turn(self) -> int:
        """The first special token after an assistant's words in the template, else the tokenizer's eos."""
        probe = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ANSWER-PROBE"}]
        _, _, rest = self.tokenizer.apply_chat_template(probe, tokenize=False).rpartition("ANSWER-PROBE")
        for token_id in self.tokenizer.encode(rest, add_special_tokens=False):
            added = self.tokenizer.added_tokens_decoder.get(token_id)
            if added is not None and added.special:
                return token_id
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {self.tokenizer.name_or_path} has no token that ends a turn: "
                "set its eos_token."
            )
        return self.tokenizer.eos_token_id


def _fill(message: Message, values: Mapping[str, str]) -> dict[str, str]:
    # One pass, so that a question which itself contains "{initial_answer}" stays as it is.
    content = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), message.content)
    return {"role": message.role, "content": content}


def _to_correct(question: str, initial_answer: str) -> dict[str, str]:
    return {"question": question, "initial_answer": initial_answer.strip()}


def _fold_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    first = next(i for i, message in enumerate(others) if message["role"] == "user")
    others[first] = {"role": "user", "content": "\n\n".join([*system, others[first]["content"]])}
    return others
