"""Questions, answers, trajectories and examples: the records of the algorithm and their JSONL files.

In the paper's notation (section 2.2.1) x is a question, y1 an initial answer, y2 a correction of it, and r(y)
the reward of an answer. A trajectory is a question with a chain of answers, each of which corrects the one
before; the paper's have two.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from stasc.errors import UserError

TRANSITIONS = ("wrong_to_right", "right_to_wrong", "right_to_right", "wrong_to_wrong")
"""What a correction can do to an initial answer."""


@dataclass(frozen=True)
class Question:
    """One input x, and what its reward knows of it.

    Attributes:
        id: Distinct from those of the other questions of its source.
        text: What the prompts ask.
        references: Reference answers; empty where no reward is computed (``predict``), or where it compares
            with none.
        entry: What else the source knows, such as the other columns of a row. It is for the reward, and not
            written into trajectories.
    """

    id: str
    text: str
    references: tuple[str, ...] = ()
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Answer:
    """What a model wrote in one turn, and its reward.

    Attributes:
        prompt: Name of the prompt that asked for it, such as ``initial`` or ``correction``.
        number: Which of the draws of its prompt this is, from 0.
        text: The answer as text.
        token_ids: The sampled ids, without the token that ended the turn.
        finished: Whether there was such a token; False where the answer was cut at the token limit.
        reward: r(y); NaN where nobody scores it.
    """

    prompt: str
    number: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    reward: float


@dataclass(frozen=True)
class Trajectory:
    """A question and a chain of answers y1, y2, ..., each of which corrects the one before.

    A chain may be shorter than others of its system where an answer was not asked to be corrected; that
    answer then stands. A trajectory without answers is a question that has not been asked yet.
    """

    question: Question
    answers: tuple[Answer, ...] = ()

    @property
    def turn(self) -> int:
        """How many answers there are."""
        return len(self.answers)

    @property
    def path(self) -> tuple[int, ...]:
        """The numbers of its answers: (j, k) is correction k of initial answer j."""
        return tuple(answer.number for answer in self.answers)

    def after(self, turn: int) -> Answer:
        """The answer that stands after so many turns, counted from 1."""
        return self.answers[min(turn, self.turn) - 1]

    def reward(self, turn: int) -> float:
        """The reward of the answer that stands after so many turns."""
        return self.after(turn).reward

    @property
    def repeats(self) -> bool:
        """Whether the second answer has the same words as the first."""
        return self.after(1).text.split() == self.after(2).text.split()

    def upto(self, turn: int) -> Trajectory:
        """The first so many answers of the chain."""
        return Trajectory(self.question, self.answers[:turn])

    def learn(
        self, turn: int | None = None, prompt: str | None = None, weight: float = 1.0, kl: float = 0.0
    ) -> Example:
        """One of the answers as a training example.

        Args:
            turn: Which answer is learnt, counted from 1; by default the last.
            prompt: The prompt that it is learnt for; by default the one that asked for it.
            weight: Factor of the loss of each of its tokens; below 0 it is unlearnt.
            kl: Factor of what holds the model near M_0 at each of its tokens: the Kullback-Leibler divergence
                of its next token's distribution from M_0's. Its algorithm says ``stays_near_m0``.
        """
        turn = turn or self.turn
        return Example(self, turn, prompt or self.answers[turn - 1].prompt, float(weight), float(kl))


@dataclass(frozen=True)
class Example:
    """A member of D_n: a trajectory, and which of its answers is learnt, for which prompt, how strongly.

    The prompt is rendered with the answers before ``turn``. ``weight`` and ``kl`` are those of ``learn``.
    """

    trajectory: Trajectory
    turn: int
    prompt: str
    weight: float = 1.0
    kl: float = 0.0

    @property
    def answer(self) -> Answer:
        """The answer that is learnt."""
        return self.trajectory.answers[self.turn - 1]


def unanswered(questions: Sequence[Question]) -> list[Trajectory]:
    """Trajectories that have only their questions yet."""
    return [Trajectory(question) for question in questions]


Record = TypeVar("Record", Trajectory, Example)


def to_json(record: Trajectory | Example) -> str:
    """One line of JSONL; the same record always gives the same bytes."""
    fields: dict[str, Any] = {}
    if isinstance(record, Example):
        fields["learn"] = {"turn": record.turn, "prompt": record.prompt, "weight": record.weight}
        fields["learn"] |= {"kl": record.kl} if record.kl else {}
        record = record.trajectory
    question = {name: getattr(record.question, name) for name in ("id", "text", "references")}
    fields |= {"turn": record.turn, "question": question, "answers": record.answers}
    return json.dumps(fields, default=vars, ensure_ascii=False)


def from_json(line: str) -> Trajectory | Example:
    """The record that ``to_json`` wrote as ``line``; ValueError, KeyError or TypeError if it did not."""
    fields: dict[str, Any] = json.loads(line)
    question = fields["question"]
    trajectory = Trajectory(
        Question(question["id"], question["text"], tuple(question["references"])),
        tuple(Answer(**{**answer, "token_ids": tuple(answer["token_ids"])}) for answer in fields["answers"]),
    )
    for answer in trajectory.answers:
        if not isinstance(answer.text, str) or not math.isfinite(answer.reward):
            raise ValueError("an answer has no text, or no number as its reward")
    return Example(trajectory, **fields["learn"]) if "learn" in fields else trajectory


class Records(Sequence[Record], Generic[Record]):
    """The trajectories or examples of a file that this program wrote.

    Lines are parsed when they are asked for; only the offset of each (8 bytes) is held in memory.

    Args:
        path: The file.
        questions: By their ids, the questions that were asked, which know more than the file does.
        source: Where those come from, such as ``data.train``.

    Raises:
        UserError: When a line is read that is broken, or whose question is none of them.
    """

    def __init__(
        self, path: Path, questions: Mapping[str, Question] | None = None, source: str = "the questions"
    ) -> None:
        self.path = path
        self.questions = questions
        self.source = source
        self._offsets = array("q")
        offset = 0
        with path.open("rb") as lines:
            for line in lines:
                self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as lines:
            lines.seek(self._offsets[index])
            return self._parse(lines.readline(), range(len(self))[index] + 1)

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield self._parse(line, number)

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            record = from_json(line.decode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.path}, line {number}: this is no record that was written there: remove the file, and "
                "the same command makes it anew."
            ) from error
        if self.questions is None:
            return record
        trajectory = record.trajectory if isinstance(record, Example) else record
        question = self.questions.get(trajectory.question.id)
        if question != trajectory.question:
            raise UserError(
                f"{self.path} has answers to a question '{trajectory.question.id}' that {self.source} lacks, "
                "or has with another text or other references: change the questions back to what they were "
                "when the run started, or choose another --run_dir."
            )
        trajectory = replace(trajectory, question=question)
        return replace(record, trajectory=trajectory) if isinstance(record, Example) else trajectory
