"""Rewards, which compare an answer with the reference answers, and statistics of self-correction.

The paper's reward and primary metric is in-accuracy (section 3, "Evaluation"): 1 if the answer contains a
reference answer, else 0. Exact match and token F1 are available too. To write another one, subclass `Reward`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from stasc.trajectory import TRANSITIONS, Question

# An article is surrounded by white space and followed by a word. It must be found before punctuation is
# removed: in "y-n-a", "U.S.A.", "A) Paris" and "vitamin A." the letter "a" is no article, and dropping it
# would make "y-n-z" contain "y-n-a" and "vitamin C" contain "vitamin A".
_ARTICLE = r"(?<!\S)((?:[^\w\s]|_)*)(?:an?|the)(?=\s+(?:[^\w\s]|_)*\w)"
_ARTICLES = re.compile(_ARTICLE, re.IGNORECASE)
_LOWERCASE_ARTICLES = re.compile(_ARTICLE)  # a capital "A" may be a name: "Vitamin A is ..."

# Common letters that Unicode does not decompose, and characters that it does not class as punctuation.
_REPLACEMENTS = {
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
    """Split a text into normalized words.

    Accents, typographic variants, case, punctuation (including ASCII symbols) and the articles a, an, the
    are ignored. A word is a run of letters, digits and marks, or one other symbol such as "€". So "5" differs
    from "15" and "Paris" from "Parisian", while "1,000" is the two words "1" and "000".
    """
    return next(_normalizations(text))


def _normalizations(text: str) -> Iterator[list[str]]:
    """The normalized words without articles, without lower-case articles, and with all articles."""
    # In one form of Unicode, which has marks in one order; raises TypeError if text is no string.
    text = unicodedata.normalize("NFC", text).translate(_ACCENTS)
    yield _words(_ARTICLES.sub(r"\1", text))
    yield _words(_LOWERCASE_ARTICLES.sub(r"\1", text))
    yield _words(text)


def _words(text: str) -> list[str]:
    return text.casefold().translate(_PUNCTUATION).split()


@lru_cache(maxsize=4096)
def _reference_normalizations(reference: str) -> tuple[list[str], ...]:
    """Cached, because every completion of a question is compared with the same references."""
    return tuple(_normalizations(reference))


def _strip_accents(char: str) -> str:
    # Keep 10² from becoming 102, and 2½ from becoming 21/2.
    if unicodedata.decomposition(char).startswith(("<super>", "<fraction>")):
        return char
    # Only the combining marks of Latin, Greek and Cyrillic are accents; in Hindi, for example, marks are
    # vowels. Invisible characters (category Cf), such as the soft hyphen, are removed too.
    return "".join(
        part
        for part in unicodedata.normalize("NFKD", char)
        if not "\u0300" <= part <= "\u036f" and unicodedata.category(part) != "Cf"
    )


def _replace_punctuation(char: str) -> str:
    if char in _REPLACEMENTS:
        return _REPLACEMENTS[char]
    category = unicodedata.category(char)[0]
    if category in "LNM":
        return char
    return f" {char} " if category == "S" and not char.isascii() else " "


class _TranslationTable(dict[int, str]):
    """A table for `str.translate` that computes the replacement of a character when it first occurs."""

    def __init__(self, replace: Callable[[str], str]) -> None:
        self._replace = replace

    def __missing__(self, code: int) -> str:
        self[code] = self._replace(chr(code))
        return self[code]


_ACCENTS = _TranslationTable(_strip_accents)
_PUNCTUATION = _TranslationTable(_replace_punctuation)


def in_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction contains the words of a reference, adjacent and in order, else 0.0.

    This is the paper's reward (section 3). It is 0.0 without references, and a reference without any word
    (such as "?!") never matches.
    """
    # Whether a word is an article can be unclear, so a match under any of the three normalizations counts.
    # The one with all articles skips one-word references: nearly every prediction contains the word "a".
    normalizations = map(_reference_normalizations, _check_references(references))
    for min_words, words, *all_reference_words in zip(
        (1, 1, 2), _normalizations(prediction), *normalizations, strict=True
    ):
        text = f" {' '.join(words)} "
        for reference_words in all_reference_words:
            if len(reference_words) >= min_words and f" {' '.join(reference_words)} " in text:
                return 1.0
    return 0.0


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction has exactly the words of a reference, else 0.0; 0.0 without references."""
    words = normalize(prediction)
    return float(
        bool(words) and any(words == normalize(reference) for reference in _check_references(references))
    )


def f1(prediction: str, references: Sequence[str]) -> float:
    """The harmonic mean of word precision and recall for the best reference; 0.0 without references."""
    words = Counter(normalize(prediction))
    scores = (_f1(words, Counter(normalize(reference))) for reference in _check_references(references))
    return max(scores, default=0.0)


def _f1(words: Counter[str], reference_words: Counter[str]) -> float:
    shared = (words & reference_words).total()
    return 2 * shared / (words.total() + reference_words.total()) if shared else 0.0


def _check_references(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str):  # would be read as a list of letters, and nearly always match
        raise TypeError(f"references must be a list of strings, not the string {references!r}")
    return references


class Reward:
    """r(y): a score in [0, 1] of an answer.

    A subclass implements `score`, which compares the answer with the reference answers. For example, in
    ``my_package.py``:

        class SameLength(Reward):
            def __init__(self, slack: int = 0) -> None:
                self.slack = slack

            def score(self, answer: str, references: Sequence[str]) -> float:
                lengths = [abs(len(answer) - len(reference)) for reference in references]
                return float(min(lengths, default=math.inf) <= self.slack)

    YAML names it by its class path; its ``__init__`` arguments are its ``init_args``:

        reward: {class_path: my_package.SameLength, init_args: {slack: 2}}

    A reward that must see more of the question, such as a verifier, implements `judge` instead. Both get the
    answer that ``data.answer`` finds in the completion (``stasc/answers.py``).

    Raises:
        TypeError: A subclass implements neither.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.judge is Reward.judge and cls.score is Reward.score:
            raise TypeError(
                f"{cls.__name__} must implement score(answer, references) or judge(answer, question)."
            )

    def judge(self, answer: str, question: Question) -> float:
        """The reward of an answer to a question."""
        return self.score(answer, question.references)

    def score(self, answer: str, references: Sequence[str]) -> float:
        """The reward of an answer, given the reference answers."""
        raise NotImplementedError(f"{type(self).__name__} judges answers by their questions.")


class InAccuracy(Reward):
    """1 if the answer contains a reference, else 0; see `in_accuracy`. The paper's reward."""

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1.0 or 0.0."""
        return in_accuracy(answer, references)


class ExactMatch(Reward):
    """1 if the answer equals a reference, else 0; see `exact_match`.

    Useful only where ``data.answer`` finds the bare answer.
    """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1.0 or 0.0."""
        return exact_match(answer, references)


class F1(Reward):
    """Overlap between the words of the answer and a reference; see `f1`.

    Useful only where ``data.answer`` finds the bare answer.
    """

    def score(self, answer: str, references: Sequence[str]) -> float:
        """Between 0.0 and 1.0."""
        return f1(answer, references)


class SelfCorrection(Metric):
    """Mean rewards and transitions over pairs of an initial answer and its correction.

    The means are the paper's r(Y1) and r(Y2) (section 3); the transitions count how right and wrong answers
    changed. Each pair counts once, however pairs are distributed over processes.

    Args:
        threshold: An answer is right if its reward is at least this.
        **kwargs: Arguments of `torchmetrics.Metric`, such as ``sync_on_compute``.
    """

    full_state_update = False
    totals: Tensor
    outcomes: Tensor

    def __init__(self, threshold: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        # Row: whether the initial answer is right; column: whether the correction is.
        self.add_state("outcomes", torch.zeros(2, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, r1: Sequence[float], r2: Sequence[float]) -> None:
        """Add pairs of rewards; raises ValueError if the lengths differ."""
        rewards = torch.tensor([r1, r2], dtype=torch.float64, device=self.device)
        right1, right2 = (rewards >= self.threshold).long()
        self.totals += rewards.sum(dim=1)
        self.outcomes += torch.bincount(2 * right1 + right2, minlength=4).view(2, 2)

    def compute(self) -> dict[str, Tensor]:
        """The means ``r1`` and ``r2`` (float64 scalars, NaN without pairs), and int64 counts.

        The counts are those of `TRANSITIONS` and their sum ``count``.
        """
        count = self.outcomes.sum()
        r1, r2 = self.totals / count
        (wrong_to_wrong, wrong_to_right), (right_to_wrong, right_to_right) = self.outcomes
        transitions = (wrong_to_right, right_to_wrong, right_to_right, wrong_to_wrong)
        return {"r1": r1, "r2": r2, **dict(zip(TRANSITIONS, transitions, strict=True)), "count": count}
