"""Sources of questions: a JSONL file, the Hugging Face hub, or the built-in demo task."""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data import demo
from stasc.errors import UserError
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
        from datasets import load_dataset  # slow: it imports pandas and more

        try:
            rows = load_dataset(self.path, self.name, split=self.split)
        except Exception as error:  # the hub client raises many unrelated types
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
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
            if not all(isinstance(r, str | int | float) and not isinstance(r, bool) for r in references):
                raise UserError(
                    f"{location}: '{self.references}' must be a string, a number, or a list of them."
                )
            references = [str(reference) for reference in references if str(reference).strip()]
            if with_references and not references:
                raise UserError(f"{location}: '{self.references}' is empty, so no answer could be right.")
        question_id = str(column(self.id, "id")) if self.id else str(number)
        return Question(question_id, text, tuple(references), row)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            location = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{location}: this is not UTF-8 text.") from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{location}: this is not JSON ({error.msg}, column {error.colno})."
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{location}: this is not a JSON object with named columns.")
            yield location, row


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
