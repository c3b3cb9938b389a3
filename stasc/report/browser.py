"""The trajectories that the page shows: a sample of bounded size, with references marked in answers."""

from __future__ import annotations

import hashlib
import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stasc.report.runs import RunResult, trajectories
from stasc.report.systems import System
from stasc.run import Run
from stasc.trajectory import TRANSITIONS, Trajectory


class Stratum(NamedTuple):
    """What is sampled from: one transition in one split of one iteration of one run."""

    run: int
    iteration: int
    split: str
    transition: int


def embed(systems: Sequence[System], at_most: int) -> dict[str, Any]:
    """What the page needs, as JSON: ``at_most`` trajectories of each stratum, and how many there are.

    First draws come first, in an order that follows from the question alone. So the first ``at_most``
    questions of a split are shown in every iteration of every run, whatever became of them. A text is a list
    of pieces, of which every second one is a reference.
    """
    questions: dict[Any, int] = {}
    strata, shown = [], []
    runs = {f"{system.name}, seed {run.record.seed}": run for system in systems for run in system.runs}
    for index, run in enumerate(runs.values()):
        marker = run.record.options.get("data.answer.init_args.marker")
        for stratum, (count, kept) in _sample(index, run, at_most).items():
            for trajectory in kept:
                question = trajectory.question
                answers = [
                    [
                        answer.number,
                        answer.reward,
                        answer.reward >= run.record.threshold,
                        answer.finished,
                        pieces(answer.text, question.references, marker),
                    ]
                    for answer in trajectory.answers
                ]
                shown.append([len(strata), questions.setdefault(question, len(questions)), answers])
            strata.append([*stratum, count])
    return {
        "runs": list(runs),
        "transitions": TRANSITIONS,
        "questions": [[question.id, question.text, question.references] for question in questions],
        "strata": strata,
        "trajectories": shown,
    }


def sampled(trajectories: dict[str, Any], at_most: int) -> str:
    """How many trajectories are on the page, of how many, and which."""
    shown = len(trajectories["trajectories"])
    total = sum(count for *_, count in trajectories["strata"])
    if shown == total:
        return f"All {total:,} trajectories of these runs are on this page."
    return (
        f"{shown:,} of the {total:,} trajectories of these runs are on this page: at most {at_most} for "
        f"each run, iteration, split and transition. {at_most} questions of each split, drawn with a fixed "
        "seed, are there with a first draw for every iteration of every run, to be followed."
    )


def _sample(index: int, run: RunResult, at_most: int) -> dict[Stratum, tuple[int, list[Trajectory]]]:
    """For each stratum of a run, its size and the trajectories that are shown of it."""
    counts: Counter[Stratum] = Counter()
    kept: dict[Stratum, list[tuple[Sequence[int], bytes, int, Trajectory]]] = defaultdict(list)
    for n in range(run.last + 1):
        for split, turn, path in _files(run, n):
            for number, trajectory in enumerate(trajectories(path)):
                rewards = trajectory.reward(turn - 1), trajectory.reward(turn)
                before, after = ("right" if r >= run.record.threshold else "wrong" for r in rewards)
                stratum = Stratum(index, n, split, TRANSITIONS.index(f"{before}_to_{after}"))
                counts[stratum] += 1
                order = hashlib.sha256(trajectory.question.id.encode(errors="replace")).digest()
                kept[stratum].append((trajectory.path, order, number, trajectory))
                if len(kept[stratum]) > 2 * at_most:  # the rest need not be held in memory
                    kept[stratum] = heapq.nsmallest(at_most, kept[stratum])
    return {
        stratum: (counts[stratum], [chosen for *_, chosen in heapq.nsmallest(at_most, kept[stratum])])
        for stratum in sorted(counts)
    }


def _files(run: RunResult, n: int) -> Iterator[tuple[str, int, Path]]:
    """The answers of iteration ``n``: name of the split, the turn they end with, and the file."""
    iteration = Run(run.folder).iteration(n)
    for name, path in (("test", iteration.test_answers(2)), ("validation", iteration.validation)):
        if path.is_file():
            yield name, 2, path
    for path in sorted(iteration.folder.glob("test-*.jsonl")):
        turn = re.fullmatch(r"test-turn-(\d+)", path.stem)
        yield path.stem.replace("-", ", ", 1).replace("-", " "), int(turn[1]) if turn else 2, path
    if n > 0:
        first, second = iteration.answers(1), iteration.answers(2)
        # A system with a single turn in training has initial answers alone.
        yield "train", 2, first if first.is_file() and not second.is_file() else second
        for path in sorted(iteration.folder.glob("turn-*.jsonl")):
            turn = path.stem.removeprefix("turn-")
            yield f"train, turn {turn}", int(turn), path


_LETTER = r"[^\W_]"
_ARTICLE = r"(?:an?|the)[\W_]+"


def pieces(text: str, references: Sequence[str], marker: str | None = None) -> list[str]:
    """A text cut so that every second piece is a reference answer; joined, they are the text.

    Words are compared much as rewards do: without case, accents, punctuation and leading articles. With a
    ``marker``, only the text after it is searched.
    """
    begin = 0
    if marker:
        found = re.search(re.escape(marker), text, re.IGNORECASE)
        begin = found.end() if found else len(text)
    plain = [_plain(char) if i >= begin else "" for i, char in enumerate(text)]
    # Where each character of the plain text is in the text.
    origin = [i for i, chars in enumerate(plain) for _ in chars] + [len(text)]
    spans = sorted(
        (origin[match.start()], origin[match.end()])
        for reference in references
        if (pattern := _pattern(reference))
        for match in re.finditer(pattern, "".join(plain))
    )
    parts, done = [], 0
    for start, end in spans:
        if start >= done:  # not within the span before
            parts += [text[done:start], text[start:end]]
            done = end
    return [*parts, text[done:]]


def _plain(text: str) -> str:
    """Without case and accents."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()


def _pattern(reference: str) -> str:
    """A regular expression for a reference in plain text; empty for one without words."""
    *words, last = re.findall(rf"{_LETTER}+", _plain(reference)) or [""]
    articles = [word for word in words if re.fullmatch("an?|the", word)]  # not the last: "vitamin A"
    first = rf"(?:{_ARTICLE})?" if articles and words[0] in articles else ""
    between = rf"[\W_]+(?:{_ARTICLE})*"
    kept = between.join([*(word for word in words if word not in articles), last])
    return last and rf"(?<!{_LETTER}){first}{kept}(?!{_LETTER})"
