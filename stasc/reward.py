"""Rewards: how well an answer agrees with the reference answers, and their means over many answers.

The paper's reward and primary metric is in-accuracy (section 3, "Evaluation"): 1 if the answer contains a
reference answer, else 0. Exact match and token F1 stand beside it.

A reward of your own is a subclass of `Reward`, named by its class path in YAML:

    reward:
      class_path: my_package.SameLength
      init_args: {marker: "Final Answer:"}
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from stasc.errors import UserError

# An article stands alone between white space and introduces a word. That is asked of the text while it still
# has its punctuation: in "y-n-a", "U.S.A.", "A) Paris" and "vitamin A." the same letters are no article, and
# dropping them would make "y-n-z" contain "y-n-a" and "vitamin C" contain "vitamin A".
_ARTICLE = r"(?<!\S)((?:[^\w\s]|_)*)(?:an?|the)(?=\s+(?:[^\w\s]|_)*\w)"
_ARTICLES = re.compile(_ARTICLE, re.IGNORECASE)
_SMALL_ARTICLES = re.compile(_ARTICLE)  # a capital "A" may be a name: "Vitamin A is ..."

# Common letters that Unicode does not decompose, and what it does not take for punctuation.
_PLAIN = {
    "ø": "o",
    "ł": "l",
    "đ": "d",
    "æ": "ae",
    "œ": "oe",
    "\N{LATIN SMALL LETTER DOTLESS I}": "i",
    "\N{MINUS SIGN}": " ",
    "\N{MODIFIER LETTER APOSTROPHE}": " ",
    "\N{MODIFIER LETTER TURNED COMMA}": " ",
}


def normalize(text: str) -> list[str]:
    """The words of a text, made comparable.

    Accents, typographic variants, case and punctuation (ASCII symbols included) do not count, nor do the
    articles a, an, the. A token is a run of letters, digits and marks, or one other symbol such as "€".
    So "5" is not "15" and "Paris" not "Parisian", while "1,000" is the two tokens "1" and "000".
    """
    return next(_readings(text))


def _readings(text: str) -> Iterator[list[str]]:
    """The words of a text without articles, without those that are written small, and with all of them."""
    text = str.translate(text, _UNACCENTED)  # a TypeError for what is no string
    yield _words(_ARTICLES.sub(r"\1", text))
    yield _words(_SMALL_ARTICLES.sub(r"\1", text))
    yield _words(text)


def _words(text: str) -> list[str]:
    return text.casefold().translate(_SPACED).split()


@lru_cache(maxsize=4096)
def _reference_readings(reference: str) -> tuple[list[str], ...]:
    """Those of a reference, kept because every completion of its question is compared with it."""
    return tuple(_readings(reference))


def _unaccented(char: str) -> str:
    # 10² must not become 102, nor 2½ become 21/2.
    if unicodedata.decomposition(char).startswith(("<super>", "<fraction>")):
        return char
    # Only the marks of Latin, Greek and Cyrillic are accents: in Hindi, say, a mark is a vowel.
    # Invisible characters (Cf), such as a soft hyphen, go as well.
    return "".join(
        part
        for part in unicodedata.normalize("NFKD", char)
        if not "\u0300" <= part <= "\u036f" and unicodedata.category(part) != "Cf"
    )


def _spaced(char: str) -> str:
    if char in _PLAIN:
        return _PLAIN[char]
    kind = unicodedata.category(char)[0]
    if kind in "LNM":
        return char
    return f" {char} " if kind == "S" and not char.isascii() else " "


class _Characters(dict[int, str]):
    """A table for `str.translate`, which learns what becomes of a character when it first occurs."""

    def __init__(self, replace: Callable[[str], str]) -> None:
        self._replace = replace

    def __missing__(self, code: int) -> str:
        self[code] = self._replace(chr(code))
        return self[code]


_UNACCENTED = _Characters(_unaccented)
_SPACED = _Characters(_spaced)


def in_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the words of some reference occur in the prediction, in one piece and in order, else 0.0.

    This is the paper's reward (section 3). Without references, and for a reference without any word
    (such as "?!"), it is 0.0.
    """
    # Whether a word is an article can be unclear, so they agree if they do in any one of three readings.
    # A lone "a" is left out of the literal one: nearly every prediction has that word somewhere.
    readings = map(_reference_readings, _checked(references))
    for least, said, *wanted in zip((1, 1, 2), _readings(prediction), *readings, strict=True):
        text = f" {' '.join(said)} "
        if any(f" {' '.join(words)} " in text for words in wanted if len(words) >= least):
            return 1.0
    return 0.0


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction has the very words of some reference, else 0.0, also without references."""
    said = normalize(prediction)
    return float(bool(said) and any(said == normalize(reference) for reference in _checked(references)))


def f1(prediction: str, references: Sequence[str]) -> float:
    """The harmonic mean of word precision and recall, for the best of the references; 0.0 without any."""
    said = Counter(normalize(prediction))
    return max((_f1(said, Counter(normalize(reference))) for reference in _checked(references)), default=0.0)


def _f1(said: Counter[str], wanted: Counter[str]) -> float:
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def _checked(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str):  # would be taken as a list of letters, and nearly always match
        raise TypeError(f"references must be a list of strings, not the string {references!r}")
    return references


def after_marker(text: str, marker: str) -> str:
    """What follows the first occurrence of ``marker``, in any case; "" where it does not occur."""
    match = re.search(re.escape(marker), text, re.IGNORECASE)
    return text[match.end() :] if match else ""


class Reward(ABC):
    """r(y): agreement of one answer with the reference answers of its question, in [0, 1].

    A subclass implements `score` and can then be named in YAML by its class path. Arguments that it
    declares in ``__init__`` become its ``init_args``; to keep ``marker``, pass it on to this class.

    Args:
        marker: Score only what follows its first occurrence, in any case ("Final Answer:"); an answer
            without it scores like an empty one. None scores the whole completion, as the paper does.

    Raises:
        UserError: The marker is blank.
    """

    def __init__(self, marker: str | None = None) -> None:
        if marker is not None and not marker.strip():
            raise UserError("The reward's marker is blank: give a text, or null to score whole completions.")
        self.marker = marker

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        """The reward of a completion."""
        if self.marker is not None:
            prediction = after_marker(prediction, self.marker)
        return self.score(prediction, references)

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """The reward, in [0, 1], of what the marker has left of a completion."""


class InAccuracy(Reward):
    """Whether the answer contains a reference; see `in_accuracy`. The paper's reward."""

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """1.0 or 0.0."""
        return in_accuracy(prediction, references)


class ExactMatch(Reward):
    """Whether the answer is a reference; see `exact_match`. Useful only with a marker."""

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """1.0 or 0.0."""
        return exact_match(prediction, references)


class F1(Reward):
    """How many words the answer shares with a reference; see `f1`. Useful only with a marker."""

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Between 0.0 and 1.0."""
        return f1(prediction, references)


class MeanReward(Metric):
    """The mean reward of answers, each counted once however they are spread over processes.

    Args:
        reward: Scores one answer.
        **kwargs: Those of `torchmetrics.Metric`, such as ``sync_on_compute``.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, reward: Reward, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reward = reward
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add answers, each with the references of its question; ValueError where the lengths differ."""
        pairs = zip(predictions, references, strict=True)
        self.total += sum(self.reward(prediction, accepted) for prediction, accepted in pairs)
        self.count += len(predictions)

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; NaN without answers, for 0 would read as "all wrong"."""
        return self.total / self.count


class SelfCorrection(Metric):
    """What corrections did to initial answers, counted over pairs (y1, y2) with rewards (r1, r2).

    The means are the paper's r(Y1) and r(Y2) (section 3); the four counts tell what lies between them.

    Args:
        threshold: An answer is right when its reward is at least this.
        **kwargs: Those of `torchmetrics.Metric`, such as ``sync_on_compute``.
    """

    full_state_update = False
    totals: Tensor
    outcomes: Tensor

    def __init__(self, threshold: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        # Row: was the initial answer right; column: is the correction.
        self.add_state("outcomes", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, r1: Sequence[float], r2: Sequence[float]) -> None:
        """Add pairs of rewards; ValueError where the lengths differ."""
        rewards = torch.tensor([r1, r2], dtype=torch.float64, device=self.device)
        was_right, is_right = (rewards >= self.threshold).long()
        self.totals += rewards.sum(dim=1)
        self.outcomes += torch.bincount(2 * was_right + is_right, minlength=4).view(2, 2)

    def compute(self) -> dict[str, Tensor]:
        """Scalars: the means ``r1`` and ``r2`` (float64, NaN without pairs) and five int64 counts.

        The counts are ``wrong_to_right``, ``right_to_wrong``, ``right_to_right``, ``wrong_to_wrong``
        and their sum ``count``.
        """
        count = self.outcomes.sum()
        r1, r2 = self.totals / count
        (wrong_to_wrong, wrong_to_right), (right_to_wrong, right_to_right) = self.outcomes
        return {
            "r1": r1,
            "r2": r2,
            "wrong_to_right": wrong_to_right,
            "right_to_wrong": right_to_wrong,
            "right_to_right": right_to_right,
            "wrong_to_wrong": wrong_to_wrong,
            "count": count,
        }
