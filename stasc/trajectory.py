"""The records of the algorithm and their JSONL files.

Notation of the paper (section 2.2.1): x is a question, y1 an initial answer, y2 a correction of y1,
r(y) the reward of an answer. A trajectory is (x, y1, y2) with both rewards.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar


@dataclass(frozen=True)
class Question:
    """One input x and the reference answers that its reward compares with.

    ``references`` is empty only where no reward is computed (``predict``).
    """

    id: str
    text: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What a model wrote in one turn.

    ``token_ids`` are the sampled ids without the token that ended the turn; ``finished`` says whether
    there was one: a completion that was cut at the token limit has ``finished=False``.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class InitialAnswer:
    """Initial answer y1 number ``j`` (from 0) of a question, with its reward r1."""

    question: Question
    j: int
    initial: Completion
    r1: float


@dataclass(frozen=True)
class Trajectory:
    """Correction y2 number ``k`` (from 0) of initial answer ``j`` of a question, with both rewards."""

    question: Question
    j: int
    k: int
    initial: Completion
    correction: Completion
    r1: float
    r2: float


def to_json(record: InitialAnswer | Trajectory) -> str:
    """One line of JSONL; the same record always gives the same bytes."""
    return json.dumps(record, default=vars, ensure_ascii=False)


def from_json(line: str) -> InitialAnswer | Trajectory:
    """The record that ``to_json`` wrote as ``line``."""
    fields: dict[str, Any] = json.loads(line)
    question = fields.pop("question")
    fields["question"] = Question(question["id"], question["text"], tuple(question["references"]))
    for turn in ("initial", "correction"):
        if turn in fields:
            said = fields[turn]
            fields[turn] = Completion(said["text"], tuple(said["token_ids"]), said["finished"])
    return Trajectory(**fields) if "correction" in fields else InitialAnswer(**fields)


Record = TypeVar("Record", InitialAnswer, Trajectory)


class Records(Sequence[Record], Generic[Record]):
    """The initial answers or trajectories of a file that this program wrote.

    They are read when they are asked for; in memory there is only where each line begins (8 bytes).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begins = array("q")
        at = 0
        with path.open("rb") as lines:
            for line in lines:
                self._begins.append(at)
                at += len(line)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as lines:
            lines.seek(self._begins[index])
            return from_json(lines.readline().decode())

    def __iter__(self) -> Iterator[Record]:
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                yield from_json(line)


def read_records(path: Path) -> list[Any]:
    """All records of a file at once."""
    return list(Records(path))
