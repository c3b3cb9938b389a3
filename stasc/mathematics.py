"""The reward of mathematical answers, which compares values, and a limit on the time that it takes."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from stasc.errors import UserError
from stasc.reward import Reward


class MathAnswer(Reward):
    r"""1 if the answer has the value of a reference, else 0, as the package math-verify compares them.

    Numbers, fractions, percentages, formulas, sets and intervals are equal in whatever form they are written,
    in LaTeX or not, and units are ignored. Of an answer or a reference counts what follows the last ``####``
    (as in GSM8K's solutions), else what the last ``\boxed{...}`` holds (as in MATH's), else all of it.

    An answer that takes more than a few seconds, such as ``9**9**9**9``, scores 0; there is no such limit
    outside the main thread.
    """

    _SECONDS = 5

    def score(self, answer: str, references: Sequence[str]) -> float:
        """1.0 or 0.0.

        Raises:
            UserError: math-verify is not installed.
        """
        verify = _math_verify().verify
        answer = _bare(answer)
        if not answer:
            return 0.0
        golds = [_bare(reference) for reference in references]
        if any(_plain(answer) == _plain(gold) != "" for gold in golds):
            return 1.0
        try:
            with time_limit(self._SECONDS):
                value = _value(answer)
                return float(any(verify(_value(gold), value, timeout_seconds=None) for gold in golds))
        except TimeoutError:
            return 0.0


def _bare(text: str) -> str:
    """The answer without the solution that it ends."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    _, boxed, inside = text.rpartition("\\boxed{")
    depth = 1
    for position, char in enumerate(inside if boxed else ""):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return inside[:position].strip()
    return text.strip()


def _plain(text: str) -> str:
    r"""A text such as ``\text{(E)}`` or ``$Monday$.`` for comparison as such."""
    return re.sub(r"\\text(?:bf|rm)?\{([^{}]*)\}|[\s$]|\.$", r"\1", text.strip()).casefold()


def _value(text: str) -> list[Any]:
    """What math-verify reads, empty if that is nothing.

    It looks for LaTeX between dollar signs and for numbers elsewhere, so a bare formula gets dollar signs:
    without them ``(3, 4)`` would be read as 4. In words it would be a product of letters with them.
    """
    parse = _math_verify().parse
    text = text.replace(r"\$", "").strip("*")  # an amount of money; bold type
    formula = "$" + text.replace("**", "^") + "$"
    words = re.sub(
        r"\\(?:text|mbox|mathrm)\{[^{}]*\}|\\[A-Za-z]+|(?:\b|\d)(?:and|or|pi|sqrt|exp|log|ln|sin|cos|tan)\b",
        "",
        text,
    )
    marked = re.search(r"\$|\\[(\[]", text)
    if marked or len(text) > 500:  # formulas are shorter, and a long one takes very long to read
        texts = [text]
    else:
        texts = [text, formula] if re.search(r"[^\W\d_]{2}", words) else [formula, text]
    values = (parse(text, parsing_timeout=None) for text in texts)
    return next(filter(None, values), [])


def _math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError as error:
        raise UserError(
            "stasc.mathematics.MathAnswer needs the package math-verify, which is not installed: run "
            './setup.sh, or pip install "stasc[examples]".'
        ) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no limit of its own
    return math_verify


class _OutOfTime(BaseException):
    """Not an Exception, which the libraries that are interrupted would catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what is inside after so many seconds; only the main thread can be interrupted.

    Raises:
        TimeoutError: The time was up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(f"it took more than {seconds} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
