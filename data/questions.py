"""Questions from a JSONL file, from the Hugging Face hub, or of the embedded demo task."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data import demo
from stasc.errors import UserError
from stasc.trajectory import Question


class QuestionSource(ABC):
    """Gives questions. A source of your own is a subclass, named by its class path in the config."""

    @abstractmethod
    def load(self, *, with_references: bool = True) -> list[Question]:
        """All questions, with distinct ids, always in the same order.

        Args:
            with_references: Whether every question must have references; ``predict`` needs none.

        Raises:
            UserError: A row is not what it should be; names the file and line.
        """


class QuestionFile(QuestionSource):
    """Rows of a JSONL file, or of a data set on the Hugging Face hub (or in a folder laid out like one).

    Args:
        path: A ``.jsonl`` file with one object per line, or a hub id such as ``user/name``.
        question: Column of the question's text.
        references: Column of the accepted answers: a list of strings, or one string.
        id: Column of an id; without it, rows are numbered from 1.
        split: Split of a hub data set, slices such as ``train[:500]`` included.
    """

    def __init__(
        self,
        path: str,
        question: str = "question",
        references: str = "references",
        id: str | None = None,
        split: str = "train",
    ) -> None:
        self.path = path
        self.question = question
        self.references = references
        self.id = id
        self.split = split

    def load(self, *, with_references: bool = True) -> list[Question]:
        """See ``QuestionSource.load``."""
        questions: dict[str, Question] = {}
        for number, (place, row) in enumerate(self._rows(), start=1):
            question = self._question(place, number, row, with_references)
            if question.id in questions:
                raise UserError(f"{place}: the id '{question.id}' is taken already; ids must be distinct.")
            questions[question.id] = question
        if not questions:
            raise UserError(f"{self.path} has no questions.")
        return list(questions.values())

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        path = Path(self.path).expanduser()
        if path.is_file():
            yield from _jsonl_rows(path)
        elif path.suffix in (".jsonl", ".json") or (self.path.count("/") > 1 and not path.is_dir()):
            raise UserError(f"{self.path} is not a file: data needs a JSONL file or a hub id.")
        else:
            yield from self._hub_rows()

    def _hub_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from datasets import load_dataset  # imports pandas and more, which a JSONL file does not need

        try:
            rows = load_dataset(self.path, split=self.split)
        except Exception as error:  # the hub client raises a dozen unrelated types
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"'{self.path}' is not a file here, and the Hugging Face hub did not give its split "
                f"'{self.split}' ({reason})."
            ) from error
        for number, row in enumerate(rows, start=1):
            yield f"{self.path} [{self.split}], row {number}", row

    def _question(self, place: str, number: int, row: dict[str, Any], with_references: bool) -> Question:
        def column(name: str, option: str) -> Any:
            if name not in row:
                raise UserError(
                    f"{place}: there is no column '{name}' (there are: {', '.join(row)}); "
                    f"name it with `{option}`."
                )
            return row[name]

        text = column(self.question, "question")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: '{self.question}' must be a text that is not empty.")
        references: Any = []
        if with_references or self.references in row:
            references = column(self.references, "references")
            references = [references] if isinstance(references, str) else references
            if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
                raise UserError(f"{place}: '{self.references}' must be a string or a list of strings.")
            references = [reference for reference in references if reference.strip()]
            if with_references and not references:
                raise UserError(f"{place}: '{self.references}' is empty, so no answer could be right.")
        identity = str(column(self.id, "id")) if self.id else str(number)
        return Question(identity, text, tuple(references))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: this is not UTF-8 text.") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: this is not JSON ({error.msg}, column {error.colno}).") from error
            if not isinstance(row, dict):
                raise UserError(f"{place}: this is not a JSON object with named columns.")
            yield place, row


class DemoQuestions(QuestionSource):
    """Questions of the embedded demo task (``data/demo.py``).

    Args:
        split: The two splits share no combination of names.
        size: Number of questions.
        seed: Which ones.
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
