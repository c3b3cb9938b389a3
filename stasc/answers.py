"""Where the answer stands in a completion: what every reward scores, and what the majority vote compares."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from stasc.errors import UserError


class FinalAnswer(ABC):
    """Finds the answer in a completion; YAML names a way by its class path.

    For example:

        answer: {class_path: stasc.answers.AfterMarker, init_args: {marker: "Final Answer:"}}
    """

    @abstractmethod
    def find(self, completion: str) -> str:
        """The answer without surrounding white space; "" where there is none, which no reward finds right."""


class WholeCompletion(FinalAnswer):
    """All of it, as the paper scores it."""

    def find(self, completion: str) -> str:
        """See ``FinalAnswer.find``."""
        return completion.strip()


class AfterMarker(FinalAnswer):
    """What follows the first occurrence of a marker.

    Args:
        marker: Such as "Final Answer:"; in any case.

    Raises:
        UserError: The marker is blank.
    """

    def __init__(self, marker: str) -> None:
        if not marker.strip():
            raise UserError(
                "data.answer.marker is blank: give a text, or choose stasc.answers.WholeCompletion."
            )
        self.marker = marker

    def find(self, completion: str) -> str:
        """See ``FinalAnswer.find``."""
        return after_marker(completion, self.marker).strip()


class InTag(FinalAnswer):
    """What stands between the last pair of tags, as in ``<answer>42</answer>``.

    Args:
        tag: Name of the tag.

    Raises:
        UserError: The name is no word.
    """

    def __init__(self, tag: str = "answer") -> None:
        if not re.fullmatch(r"[\w-]+", tag):
            raise UserError(f"data.answer.tag is '{tag}': give the tag's name alone, such as answer.")
        self.tag = tag

    def find(self, completion: str) -> str:
        """See ``FinalAnswer.find``."""
        before, _, _ = completion.rpartition(f"</{self.tag}>")
        return before.rpartition(f"<{self.tag}>")[2].strip() if f"<{self.tag}>" in before else ""


class LastNumber(FinalAnswer):
    """The last number: an integer, a decimal, or a fraction such as 3/4.

    Commas between thousands are left out: "1,250 apples." has the answer "1250".
    """

    # A hyphen after a letter, digit or bracket joins or subtracts: the last number of "2-3" is 3.
    _NUMBER = re.compile(
        r"(?:(?<![\w)\]])[-\N{MINUS SIGN}])?"
        r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+|(?<!\d)(?=\.\d))(?:\.\d+)?(?:/\d+)?"
    )

    def find(self, completion: str) -> str:
        """See ``FinalAnswer.find``."""
        numbers = self._NUMBER.findall(completion)
        return numbers[-1].replace(",", "").replace("\N{MINUS SIGN}", "-") if numbers else ""


class LastLine(FinalAnswer):
    """The last line that is not blank."""

    def find(self, completion: str) -> str:
        """See ``FinalAnswer.find``."""
        return next((line.strip() for line in reversed(completion.splitlines()) if line.strip()), "")


def after_marker(text: str, marker: str) -> str:
    """The text after the first occurrence of ``marker``, ignoring case; "" if it does not occur."""
    match = re.search(re.escape(marker), text, re.IGNORECASE)
    return text[match.end() :] if match else ""
