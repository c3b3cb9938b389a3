"""From questions and answers to token ids: the prompts, and which tokens end a turn.

A training example is the prompt that an answer was sampled from, followed by the tokens that were sampled,
token for token. Nothing here knows a particular chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError, meta
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from stasc.errors import UserError
from stasc.trajectory import Answer, Example, Question, Trajectory


@dataclass(frozen=True)
class Message:
    """One chat message; ``content`` may hold the placeholders of its prompt, such as ``{question}``."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompts = Mapping[str, Sequence[Message]]
"""The messages of each prompt by its name: ``initial``, ``correction``, and whatever else a system asks."""

_NEEDED = {
    "initial": ("question",),
    "correction": ("question", "initial_answer"),
    "rationalization": ("question", "reference"),
}
"""Placeholders without which these prompts make no sense."""

_PLACEHOLDER = re.compile(r"\{\{(?P<literal>[A-Za-z_]\w*)\}\}|\{(?P<name>[A-Za-z_]\w*)\}")
"""A placeholder, or a word in doubled braces, which the model reads in single ones."""

_KNOWN = re.compile(r"question|reference|initial_answer|answer_[1-9]\d*")

TODAY = datetime(2024, 7, 26)
"""What chat templates are told is today: the day that Llama 3's assumes where it cannot ask."""


def check_prompts(prompts: Prompts, needed: Iterable[str], option: str) -> None:
    """Find prompts that are missing, or that leave out what they are about.

    Args:
        prompts: As the user gave them.
        needed: Names of the prompts that will be sent.
        option: What the user calls them, such as ``data.prompts``.

    Raises:
        UserError: A prompt is missing or has no messages, a placeholder is missing or unknown, or nobody is
            asked.
    """
    for name in needed:
        if not prompts.get(name):
            raise UserError(f"{option} has no {name}: the algorithm needs these messages.")
    for name, messages in prompts.items():
        found = set(_placeholders(messages))
        for number, message in enumerate(messages, start=1):
            if not message.content.strip():
                raise UserError(f"{option}.{name}: message {number} is empty: write it, or remove it.")
        if messages and messages[-1].role != "user":
            last = messages[-1].role
            raise UserError(f"{option}.{name} ends with a message of the {last}: let it end with the user's.")
        for placeholder in found:
            if not _KNOWN.fullmatch(placeholder):
                raise UserError(
                    f"{option}.{name} has {{{placeholder}}}, which stands for nothing: correct it, or write "
                    f"{{{{{placeholder}}}}} if the model shall read it in braces."
                )
        for placeholder in _NEEDED.get(name, ()):
            if placeholder not in found:
                raise UserError(f"{option}.{name} has no {{{placeholder}}}: put it into a message.")


def _placeholders(messages: Iterable[Message]) -> list[str]:
    found = (match["name"] for message in messages for match in _PLACEHOLDER.finditer(message.content))
    return [name for name in found if name]


class Dialogue:
    """Renders the prompts with a tokenizer's chat template.

    A system message is folded into the first user message where the template refuses or drops it. A template
    that asks which day it is (Llama 3's puts the date into the system message) is told ``TODAY``, so that the
    prompts of a run are the same on every day.

    Args:
        tokenizer: With a chat template.
        prompts: The messages.
        generation_config: Of the same model; its end-of-sequence ids stop a completion too.
        template: Options of the chat template, such as ``enable_thinking: false`` for Qwen3.

    Raises:
        UserError: The tokenizer has no chat template or no way to end a turn, or the template is broken,
            leaves out what messages say, or does not have an option.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generation_config: GenerationConfig | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in {tokenizer.name_or_path} has no chat template: "
                "use an instruction-tuned model, or add chat_template.jinja to the folder."
            )
        self.tokenizer = tokenizer
        self.prompts = prompts
        self._options = self._template_options(template or {})
        self._keeps_system = self._template_keeps_system()
        self.end_of_turn = self._find_end_of_turn()
        config_stops = generation_config.eos_token_id if generation_config else None
        config_stops = [config_stops] if isinstance(config_stops, int) else config_stops or []
        stops = {self.end_of_turn, tokenizer.eos_token_id, *config_stops} - {None}
        self.stop_ids: tuple[int, ...] = tuple(sorted(stops))

    def ask(self, prompt: str, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Token ids that ask for the next answer of each trajectory.

        ``{question}`` in a message stands for the question, ``{initial_answer}`` for the answer that is to be
        corrected (the last one), ``{answer_1}``, ``{answer_2}``, ... for each answer so far, and
        ``{reference}`` for the first reference. ``{{word}}`` is the word in single braces.

        Args:
            prompt: Name of the prompt.
            trajectories: Many at a time, which takes much less time than one after another.
        """
        return self.render(prompt, [_values(trajectory) for trajectory in trajectories])

    def render(self, prompt: str, values: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """Token ids of a prompt, once for each mapping of placeholders to texts."""
        if not values:
            return []
        messages = self.prompts[prompt]
        conversations = [[_fill(message, texts, prompt) for message in messages] for texts in values]
        if not self._keeps_system:
            conversations = [_fold_system(conversation) for conversation in conversations]
        rendering = {"add_generation_prompt": True, "return_dict": False}
        return self._apply(conversations, f"the messages of data.prompts.{prompt}", **rendering)

    def lengths(self, prompt: str, turn: int, questions: Sequence[Question]) -> tuple[list[int], int]:
        """What is known beforehand of the prompts of a turn.

        Args:
            prompt: Name of the prompt.
            turn: Number of the answer that it asks for, from 1.
            questions: The questions that are asked.

        Returns:
            The tokens of each question's prompt with empty answers in it, and how many answers it will hold.
        """
        unknown = (Answer("", 0, "", (), True, 0.0),) * (turn - 1)
        prompts = self.ask(prompt, [Trajectory(question, unknown) for question in questions])
        words = _placeholders(self.prompts[prompt])
        return list(map(len, prompts)), sum(word in _answer_values(turn) for word in words)

    def example(self, example: Example) -> tuple[list[int], list[int]]:
        """The prompt's ids, which carry no loss, and the answer's, which do."""
        (prompt,) = self.ask(example.prompt, [example.trajectory.upto(example.turn - 1)])
        return prompt, self.target(example.answer)

    def target(self, answer: Answer) -> list[int]:
        """What an answer teaches: its ids and the end-of-turn token.

        An answer that was cut at the token limit has no such token: the model learns its tokens, and not to
        stop there.
        """
        ids = list(answer.token_ids)
        return [*ids, self.end_of_turn] if answer.finished else ids

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _template_options(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What the template is rendered with beside the messages."""
        source = self.tokenizer.get_chat_template()
        try:
            environment = _compile_jinja_template(source).environment  # with the tags that transformers adds
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path}, line {error.lineno}: this is no Jinja "
                f"({error.message}): mend it, or take the model's own."
            ) from error
        # A template ignores what it does not use. These are all names that it may look up, and some more.
        names = meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals)
        for name in chosen:
            if name not in names - {"messages", "add_generation_prompt"}:
                raise UserError(
                    f"model.template has '{name}', which is no option of the chat template of "
                    f"{self.tokenizer.name_or_path}: remove it, or correct its name."
                )
        return {"strftime_now": TODAY.strftime, **chosen}

    def _template_keeps_system(self) -> bool:
        probe = [{"role": "system", "content": "SYSTEM-PROBE"}, {"role": "user", "content": "x"}]
        try:
            return "SYSTEM-PROBE" in self._apply(probe, "a system message", tokenize=False)
        except UserError:
            return False

    def _apply(self, messages: Any, what: str, **rendering: Any) -> Any:
        """Messages as the chat template renders them; ``what`` is what to call them."""
        template = f"the chat template of {self.tokenizer.name_or_path}"
        try:
            return self.tokenizer.apply_chat_template(messages, **rendering, **self._options)
        except TemplateError as error:
            raise UserError(f"{template} refuses {what} ({error}): change their roles or order.") from error
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            kind = type(error).__name__
            raise UserError(f"{template} fails on {what} ({kind}: {error}): mend the template.") from error

    def _find_end_of_turn(self) -> int:
        """The first special token after an assistant's words in the template, else the tokenizer's eos."""
        question, answer = (" ".join([word] * 40) for word in ("Question-probe", "Answer-probe"))
        probe = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = self._apply(probe, "a question and its answer", tokenize=False)
        for content in (question, answer):
            if content not in text:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} leaves out or changes what messages "
                    "say: mend it, or take the model's own."
                )
        _, _, rest = text.rpartition(answer)
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


def _fill(message: Message, values: Mapping[str, str], prompt: str) -> dict[str, str]:
    def text(match: re.Match[str]) -> str:
        if match["literal"]:
            return f"{{{match['literal']}}}"
        if match["name"] not in values:
            raise UserError(
                f"data.prompts.{prompt} has {{{match['name']}}}, which is not known where it is asked "
                f"(there are {', '.join(values)}): remove it, or ask it after another turn."
            )
        return values[match["name"]]

    # One pass, so that a question which itself contains "{initial_answer}" stays as it is.
    return {"role": message.role, "content": _PLACEHOLDER.sub(text, message.content)}


def _values(trajectory: Trajectory) -> dict[str, str]:
    question, texts = trajectory.question, [answer.text.strip() for answer in trajectory.answers]
    names = _answer_values(len(texts) + 1)
    values = {"question": question.text, **dict(zip(names, [*texts, *texts[-1:]], strict=True))}
    return values | {"reference": question.references[0]} if question.references else values


def _answer_values(turn: int) -> list[str]:
    """Names of the placeholders for the answers before a turn."""
    if turn == 1:
        return []
    return [*(f"answer_{number}" for number in range(1, turn)), "initial_answer"]


def _fold_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    first = next(i for i, message in enumerate(others) if message["role"] == "user")
    others[first] = {"role": "user", "content": "\n\n".join([*system, others[first]["content"]])}
    return others
