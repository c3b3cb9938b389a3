"""Questions of reasoning-gym, a library of tasks that make questions without end, and its verifiers.

Most of its 106 tasks can be asked as they are; `UNSUITABLE` and `ORDERED_BY_HASH` name the others.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import itertools
import json
import math
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np

from data.questions import QuestionSource
from stasc.errors import UserError
from stasc.mathematics import time_limit
from stasc.reward import Reward
from stasc.trajectory import Question

Split = Literal["train", "validation", "test"]
Options = dict[str, Any]

UNSUITABLE = {
    "composite": "`tasks` and `weights` of data.ReasoningGym mix tasks already",
    "game_of_life_halting": "its verifier finds every answer right",
}
"""Tasks that are refused, and why."""

ORDERED_BY_HASH = (
    *("isomorphic_strings", "polynomial_multiplication", "ransom_note"),  # other questions
    *("knight_swap", "word_ladder"),  # other answers to the same questions
)
"""Tasks that differ from process to process: they go through sets of strings in the order of a hash."""

_CHUNK = 500  # Questions of one of the library's data sets; seeds of the next one go on where it ends.
_PATIENCE = 1000  # Draws in a row without a new question, after which no more are expected.

# These verifiers run the answer as Python code (`eval`, or `sympy.parse_expr`, which calls it), and a model
# can write anything. Only answers of these forms get there: they call nothing but functions of mathematics.
_LISTS = re.compile(r"""[\w\s\[\],.'"-]*""")
_FORMULAS = re.compile(
    r"(?:[\d\s+\-*/^().]|(?<![A-Za-z_])(?:[A-Za-z]|a?(?:sin|cos|tan)h?|exp|log|ln|sqrt|pi|Abs)(?![A-Za-z_]))*"
)
_RUN_AS_CODE = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _LISTS),
    **dict.fromkeys(("countdown", "puzzle24", "polynomial_multiplication"), _FORMULAS),
    **dict.fromkeys(("intermediate_integration", "simple_integration"), _FORMULAS),
}
_SECONDS = 5  # For one answer: "9**9**9" would take hours.


class ReasoningGym(QuestionSource):
    """Questions of one or more of reasoning-gym's tasks.

    Train, validation and test questions differ whatever their sizes, seeds and options are: the text of a
    question decides which of the three it belongs to (60, 20 and 20 %). Two questions never have the same
    text. The reward is `Verifier`.

    Args:
        tasks: Names of tasks, each with its options as the library names them, or null for its defaults.
        split: Which of the questions are taken.
        size: Number of questions.
        seed: Of the selection.
        weights: How often each task is asked, relative to the others; by default all equally often.

    Raises:
        UserError: The size or a weight makes no sense.
    """

    def __init__(
        self,
        tasks: dict[str, Options | None],
        split: Split,
        size: int = 500,
        seed: int = 0,
        weights: dict[str, float] | None = None,
    ) -> None:
        if not tasks:
            raise UserError("data.ReasoningGym has no tasks: name one, such as `tasks: {products: null}`.")
        if size < 1:
            raise UserError(f"data.ReasoningGym size is {size}: it must be 1 or more.")
        self.tasks = {task: options or {} for task, options in tasks.items()}
        self.split = split
        self.size = size
        self.seed = seed
        self.weights = dict.fromkeys(tasks, 1.0) if weights is None else weights
        if self.weights.keys() != self.tasks.keys():
            odd = sorted(self.weights.keys() ^ self.tasks.keys())[0]
            lack = "a weight, but is not among its tasks" if odd in self.weights else "no weight"
            raise UserError(
                f"data.ReasoningGym: '{odd}' has {lack}: give a weight to each of {', '.join(tasks)}."
            )
        for task, weight in self.weights.items():
            if not (0 < weight < math.inf):
                raise UserError(f"data.ReasoningGym: the weight of '{task}' is {weight}: it must be above 0.")

    def load(self, *, with_references: bool = True) -> list[Question]:
        """See ``QuestionSource.load``.

        A question has its task's answer as reference, or none where the task has no answer but only a
        verifier. Its entry is the task's own, with the keys ``task`` and ``options`` added.
        """
        for task, options in self.tasks.items():
            _check(task, options)
        entries = {task: self._entries(task) for task in self.tasks}
        rng = random.Random(f"mix {self.seed}")
        questions: dict[str, Question] = {}
        count: Counter[str] = Counter()
        for task in rng.choices(list(self.tasks), list(self.weights.values()), k=self.size):
            for entry in itertools.islice(entries[task], _PATIENCE):
                text = entry["question"].strip()
                if _split(text) == self.split and text not in questions:
                    break
            else:
                raise UserError(
                    f"reasoning-gym's task '{task}' has too few distinct questions: {count[task]} were found "
                    f"for '{self.split}', and more are asked for; lower size, or widen its options."
                )
            count[task] += 1
            answer = entry["answer"]
            references = (answer,) if isinstance(answer, str) and answer.strip() else ()
            entry |= {"task": task, "options": self.tasks[task]}
            questions[text] = Question(f"{task}-{count[task]}", text, references, entry)
        return list(questions.values())

    def _entries(self, task: str) -> Iterator[dict[str, Any]]:
        """What the task makes of one seed after the other, without end."""
        # A hash, so that two seeds of the user have no questions in common but by chance.
        first = int.from_bytes(hashlib.sha256(f"{task} {self.seed}".encode()).digest()[:4], "big") // 2
        for start in itertools.count(first, _CHUNK):
            with _aside(start):
                dataset = _dataset(task, self.tasks[task], start)
            for index in range(_CHUNK):
                try:
                    with _aside(start + index):
                        entry = dataset[index]
                except Exception as error:  # of any type, where options contradict each other
                    raise _refusal(task, error) from error
                yield entry


class Verifier(Reward):
    """The task's own verifier, for questions of `ReasoningGym`.

    It wants the bare answer, so ``data.answer`` should find that in the completion. Some verifiers give
    partial credit, a few even for any answer (0.01 of countdown, for example): ``algorithm.threshold`` says
    from which reward on an answer is right.

    An answer scores 0 without its verifier where it is empty, and where a verifier that runs answers as
    Python code would get other than a formula or a list. It scores 0 too where the verifier raises an error
    or takes too long: the questions are right (the task's own answer scores 1), so the answer has a form
    that it cannot read, such as words where prime_factorization expects numbers.
    """

    def judge(self, answer: str, question: Question) -> float:
        """The verifier's score, from 0.0 to 1.0.

        Raises:
            UserError: The question is not one of `ReasoningGym`.
        """
        if "task" not in question.entry:
            raise UserError(
                f"data.reasoning_gym.Verifier cannot judge question '{question.id}': it scores questions of "
                "data.ReasoningGym only; choose another data.reward."
            )
        task = question.entry["task"]
        if not answer.strip() or (task in _RUN_AS_CODE and not _RUN_AS_CODE[task].fullmatch(answer)):
            return 0.0
        dataset = _scoring_dataset(task, json.dumps(question.entry["options"]))
        try:
            with _aside(0), time_limit(_SECONDS):
                return float(dataset.score_answer(answer=answer, entry=question.entry))
        except Exception:  # whatever an unexpected form leads to
            return 0.0


def _split(text: str) -> Split:
    tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return "train" if tenth < 6 else "validation" if tenth < 8 else "test"


def _check(task: str, options: Options) -> None:
    """Raise UserError if the task cannot be asked, or not with these options."""
    datasets = _library().factory.DATASETS
    if task in UNSUITABLE:
        raise UserError(f"reasoning-gym's task '{task}' cannot be asked: {UNSUITABLE[task]}.")
    if task not in datasets:
        raise UserError(f"reasoning-gym has no task '{task}'{_meant(task, datasets)}.")
    if task in ORDERED_BY_HASH and sys.flags.hash_randomization:
        raise UserError(
            f"reasoning-gym's task '{task}' differs from process to process unless the environment variable "
            "PYTHONHASHSEED is 0: set it before the program starts, or choose another task."
        )
    names = {field.name for field in fields(datasets[task][1])} - {"seed", "size"}
    for option in options:
        if option in ("seed", "size"):
            raise UserError(f"set {option} of data.ReasoningGym itself, not in the options of '{task}'.")
        if option not in names:
            raise UserError(
                f"reasoning-gym's task '{task}' has no option '{option}'{_meant(option, names)}; "
                f"its options are {', '.join(sorted(names))}."
            )


def _meant(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, sorted(known))
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _dataset(task: str, options: Options, seed: int) -> Any:
    """One of the library's data sets, which makes the entries of a task and scores answers to them."""
    try:
        return _library().create_dataset(task, **options, seed=seed, size=_CHUNK)
    except Exception as error:  # AssertionError, TypeError, ValueError, ...
        raise _refusal(task, error) from error


def _refusal(task: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"reasoning-gym's task '{task}' cannot be asked with these options ({reason}).")


@lru_cache(maxsize=128)
def _scoring_dataset(task: str, options: str) -> Any:
    """Scores answers to all questions of a task with these options, which some verifiers look at."""
    with _aside(0):
        return _dataset(task, json.loads(options), 0)


@contextmanager
def _aside(seed: int) -> Iterator[None]:
    """The library prints, warns, and draws from the global random state here and there: nobody notices."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _library() -> ModuleType:
    try:
        with _aside(0):  # Python's compiler warns of the code of one of its dependencies
            import reasoning_gym
    except ImportError as error:
        raise UserError(
            "data.ReasoningGym needs the package reasoning-gym, which is not installed: run ./setup.sh, or "
            'pip install "stasc[examples]".'
        ) from error
    return reasoning_gym
