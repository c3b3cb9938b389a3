"""Sources of questions: a JSONL file, the Hugging Face hub, or the built-in demo task."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi

from data import demo
from stasc.errors import UserError, check_text
from stasc.model_folder import hub_is_away
from stasc.trajectory import Question


class QuestionSource(ABC):
    """A source of questions.

    A subclass implements `load`. For example, in ``my_package.py``:

        class Sums(QuestionSource):
            def __init__(self, size: int) -> None:
                self.size = size

            def load(self, *, with_references: bool = True) -> list[Question]:
                return [
                    Question(id=str(n), text=f"What is {n} + {n}?", references=(str(2 * n),))
                    for n in range(self.size)
                ]

    YAML names it by its class path; its ``__init__`` arguments are its ``init_args``:

        train:
          class_path: my_package.Sums
          init_args: {size: 500}
    """

    revision: str | None = None
    """The hub's commit that was loaded; None for what is not from the hub, and before it is loaded."""

    @abstractmethod
    def load(self, *, with_references: bool = True) -> list[Question]:
        """All questions, with distinct ids, in the same order on every call.

        Args:
            with_references: Whether every question must have references; ``predict`` does not need them.

        Raises:
            UserError: A question is invalid; the message names its file and line.
        """


class QuestionFile(QuestionSource):
    """Questions from a JSONL file, or from a data set on the Hugging Face hub or in a local folder.

    Args:
        path: A ``.jsonl`` file with one object per line, a hub id such as ``user/name``, or a folder with
            the files of a hub data set.
        question: Column with the text of the question. A dot leads into a column: ``answer.aliases``.
        references: Column with the accepted answers: a string or a number, or a list of them.
        id: Column with a unique id; by default rows are numbered from 1.
        split: Split of a hub data set, or slices such as ``train[:500]`` or ``train[:9]+train[90:99]``.
        name: Configuration of a hub data set that has several.
    """

    def __init__(
        self,
        path: str,
        question: str = "question",
        references: str = "references",
        id: str | None = None,
        split: str = "train",
        name: str | None = None,
    ) -> None:
        if not path.strip():
            raise UserError("the path of a QuestionFile is empty: name a JSONL file or a hub id.")
        self.path = path
        self.question = question
        self.references = references
        self.id = id
        self.split = split
        self.name = name

    def load(self, *, with_references: bool = True) -> list[Question]:
        """See ``QuestionSource.load``; the row is the question's entry."""
        questions: dict[str, Question] = {}
        for number, (location, row) in enumerate(self._rows(), start=1):
            question = self._question(location, number, row, with_references)
            if question.id in questions:
                raise UserError(f"{location}: the id '{question.id}' occurs twice; ids must be distinct.")
            questions[question.id] = question
        if not questions:
            raise UserError(f"{self.path} has no questions.")
        return list(questions.values())

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        path = Path(self.path).expanduser()
        if path.is_file():
            yield from _jsonl_rows(path)
        elif path.suffix in (".jsonl", ".json") or (self.path.count("/") > 1 and not path.is_dir()):
            raise UserError(f"{self.path} is not a file: give a JSONL file or a hub id.")
        else:
            yield from self._hub_rows()

    def _hub_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        away = None if Path(self.path).is_dir() else hub_is_away(HfApi().dataset_info, self.path)
        if away is not None:
            os.environ["HF_DATASETS_OFFLINE"] = "1"  # what is in its cache, and no retries; read on import
        from datasets import load_dataset  # slow: it imports pandas and more

        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it raises is told below
        try:
            rows = load_dataset(self.path, self.name, split=self.split)
        except Exception as error:  # the hub client raises many unrelated types
            reason = away or str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"'{self.path}' is not a file, and its split '{self.split}' could not be loaded from the "
                f"Hugging Face hub ({reason})."
            ) from error
        # Files of the hub have names such as hf://datasets/user/name@0123abcd/train.parquet.
        commits = (re.search(r"@([0-9a-f]{40})/", file) for file in rows.download_checksums or ())
        self.revision = next((found[1] for found in commits if found), None)
        for number, row in enumerate(rows, start=1):
            yield f"{self.path} [{self.split}], row {number}", row

    def _question(self, location: str, number: int, row: dict[str, Any], with_references: bool) -> Question:
        def column(name: str, option: str) -> Any:
            value: Any = row
            for part in [name] if name in row else name.split("."):
                if not isinstance(value, Mapping) or part not in value:
                    raise UserError(
                        f"{location}: there is no column '{name}' (columns: {', '.join(row)}); "
                        f"name it with `{option}`."
                    )
                value = value[part]
            return value

        text = column(self.question, "question")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{location}: '{self.question}' must be a non-empty string.")
        references: Any = []
        if with_references or self.references in row:
            references = column(self.references, "references")
            references = references if isinstance(references, list) else [references]
            if not all(map(_is_reference, references)):
                raise UserError(
                    f"{location}: '{self.references}' must be a string, a number, or a list of them."
                )
            references = [str(reference) for reference in references if str(reference).strip()]
            if with_references and not references:
                raise UserError(f"{location}: '{self.references}' is empty, so no answer could be right.")
        question_id = str(number)
        if self.id:
            question_id = column(self.id, "id")
            if not isinstance(question_id, str | int) or not str(question_id).strip():
                raise UserError(
                    f"{location}: '{self.id}' must be a text or a whole number that is not empty."
                )
            question_id = str(question_id)
        for name, words in (
            (self.question, text),
            (self.references, " ".join(references)),
            (self.id, question_id),
        ):
            check_text(words, f"{location}: '{name}'")
        return Question(question_id, text, tuple(references), row)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        location = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_distinct)
        except UnicodeDecodeError as error:
            raise UserError(f"{location}: this is not UTF-8 text.") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{location}: this is not JSON ({error.msg}, column {error.colno}).") from error
        except _KeyTwice as error:
            raise UserError(f"{location}: the column '{error}' is there twice: remove one.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: this is not JSON that can be read ({error}).") from error
        if not isinstance(row, dict):
            raise UserError(f"{location}: this is not a JSON object with named columns.")
        yield location, row


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): see to that, or name another.") from error


class _KeyTwice(Exception):
    """A JSON object has a key twice; this is the key."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwice(next(name for name in names if names.count(name) > 1))
    return found


def _is_reference(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


class DemoQuestions(QuestionSource):
    """Questions of the built-in demo task (``data/demo.py``).

    Args:
        split: The splits share no combination of names.
        size: Number of questions.
        seed: Seed of the selection.
    """

    def __init__(self, split: Literal["train", "test"], size: int = 500, seed: int = 0) -> None:
        if size < 1:
            raise UserError(f"DemoQuestions size is {size}: it must be 1 or more.")
        self.split: Literal["train", "test"] = split
        self.size = size
        self.seed = seed

    def load(self, *, with_references: bool = True) -> list[Question]:
        """See ``QuestionSource.load``."""
        return demo.questions(self.split, self.size, self.seed)


def load(source: QuestionSource, option: str, *, with_references: bool = True) -> list[Question]:
    """The questions of a source, whoever wrote it.

    Args:
        source: What ``option`` names.
        option: Such as ``data.train``.
        with_references: See ``QuestionSource.load``.

    Raises:
        UserError: There are none, one is no question, or two have one id.
    """
    name = f"{option}: {type(source).__name__}.load"
    if "with_references" not in inspect.signature(source.load).parameters:
        raise UserError(
            f"{name} has no argument with_references: write def load(self, *, with_references=True)."
        )
    questions = source.load(with_references=with_references)
    if not isinstance(questions, list | tuple) or not questions:
        gave = "no questions" if isinstance(questions, list | tuple) else f"a {type(questions).__name__}"
        raise UserError(f"{name} gave {gave}: it must return a list of stasc.trajectory.Question.")
    seen: set[str] = set()
    for number, question in enumerate(questions, start=1):
        place = f"{name}, question {number}"
        if not isinstance(question, Question):
            kind = type(question).__name__
            raise UserError(f"{place}: this is a {kind}, and must be a stasc.trajectory.Question.")
        texts = {"id": question.id, "text": question.text, "references": question.references}
        for field, value in texts.items():
            of_texts = isinstance(value, tuple) and all(isinstance(text, str) for text in value)
            if not (of_texts if field == "references" else isinstance(value, str) and value.strip()):
                kind = "a tuple of texts" if field == "references" else "a text that is not empty"
                raise UserError(f"{place}: its {field} must be {kind}, not {value!r}.")
            check_text(" ".join(value) if of_texts else value, f"{place}: its {field}")
        if question.id in seen:
            raise UserError(f"{place}: the id '{question.id}' was there before; ids must be distinct.")
        seen.add(question.id)
    return list(questions)


def hold_out(questions: Sequence[Question], share: float) -> tuple[list[Question], list[Question]]:
    """Two parts of a set of questions: those that are left, and the share that is held out.

    Which are held out follows from nothing but the questions' number and the share.

    Raises:
        UserError: One of the parts would be empty.
    """
    count = round(share * len(questions))
    if not 0 < count < len(questions):
        raise UserError(
            f"data.validation is {share}, which takes {count} of the {len(questions)} training questions: "
            "choose a share between 0 and 1 that leaves questions on both sides."
        )
    held = set(random.Random(0).sample(range(len(questions)), count))
    left, held_out = ([q for i, q in enumerate(questions) if (i in held) == part] for part in (False, True))
    return left, held_out
