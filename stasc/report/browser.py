"""The trajectories that the page shows: a sample of bounded size, with references marked in answers."""

from __future__ import annotations

import hashlib
import heapq
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stasc.report.runs import TRANSITIONS, RunResult, trajectories
from stasc.run import Run
from stasc.trajectory import Trajectory


class Stratum(NamedTuple):
    """What trajectories are sampled from: one of ``TRANSITIONS`` of one split of one iteration of one run."""

    run: int
    iteration: int
    split: str
    transition: int


def embed(runs: Sequence[RunResult], names: Sequence[str], at_most: int) -> dict[str, Any]:
    """What the page needs, as JSON: ``at_most`` trajectories of each stratum, and how many there are.

    Which ones is drawn by question and number of the draw alone, so that a question that is shown for one
    iteration tends to be shown for the others too. A text is a list of pieces, of which every second one is
    a reference.
    """
    questions: dict[Any, int] = {}
    strata, shown = [], []
    for index, run in enumerate(runs):
        marker = run.options.get("data.reward.init_args.marker")
        for stratum, (count, kept) in _sample(index, run, at_most).items():
            for t in kept:
                references = t.question.references
                shown.append(
                    [
                        len(strata),
                        questions.setdefault(t.question, len(questions)),
                        *(t.j, t.k, t.r1, t.r2),
                        pieces(t.initial.text, references, marker),
                        pieces(t.correction.text, references, marker),
                        *(t.initial.finished, t.correction.finished),
                    ]
                )
            strata.append([*stratum, count])
    return {
        "runs": list(names),
        "transitions": TRANSITIONS,
        "questions": [[question.id, question.text, question.references] for question in questions],
        "strata": strata,
        "trajectories": shown,
    }


def _sample(index: int, run: RunResult, at_most: int) -> dict[Stratum, tuple[int, list[Trajectory]]]:
    counts: dict[Stratum, int] = defaultdict(int)
    kept: dict[Stratum, list[tuple[bytes, int, Trajectory]]] = defaultdict(list)
    for n in range(run.last + 1):
        for split, path in _files(run, n):
            for number, t in enumerate(trajectories(path)):
                before, after = ("right" if r >= run.threshold else "wrong" for r in (t.r1, t.r2))
                stratum = Stratum(index, n, split, TRANSITIONS.index(f"{before}_to_{after}"))
                counts[stratum] += 1
                drawn = hashlib.sha256(f"{t.question.id} {t.j} {t.k}".encode(errors="replace")).digest()
                own = kept[stratum]
                own.append((drawn, number, t))
                if len(own) > 2 * at_most:  # the rest need not be held in memory
                    kept[stratum] = heapq.nsmallest(at_most, own)
    return {
        stratum: (counts[stratum], [t for *_, t in heapq.nsmallest(at_most, kept[stratum])])
        for stratum in sorted(counts)
    }


def _files(run: RunResult, n: int) -> Iterator[tuple[str, Path]]:
    box = Run(run.folder).iteration(n)
    yield "test", box.test
    for path in sorted(box.folder.glob("test-*.jsonl")):
        yield path.stem.replace("-", ", ", 1).replace("-", " "), path
    if n > 0:
        yield "train", box.trajectories


# ---------------------------------------------------------------- references in answers

_WORD = re.compile(r"(?:[^\W_]|[\u0300-\u036f])+")
_ARTICLES = ("a", "an", "the")


class _Word(NamedTuple):
    plain: str
    start: int
    end: int


def pieces(text: str, references: Sequence[str], marker: str | None = None) -> list[str]:
    """A text cut so that every second piece is a reference answer; joined, they are the text.

    Words agree as they do for rewards, by and large: case, accents, punctuation and leading articles do not
    count. Where a reward has a ``marker``, only what follows it is looked at.
    """
    begin = 0
    if marker:
        found = re.search(re.escape(marker), text, re.IGNORECASE)
        begin = found.end() if found else len(text)
    words = [word for word in _words(text) if word.start >= begin]
    spans = sorted({span for reference in references for span in _spans(words, _words(reference))})
    cut, at = [], 0
    for start, end in spans:
        if start >= at:
            cut += [text[at:start], text[start:end]]
            at = end
    return [*cut, text[at:]]


def _spans(words: Sequence[_Word], wanted: Sequence[_Word]) -> list[tuple[int, int]]:
    literal = _occurrences(words, wanted)
    return literal or _occurrences(_without_articles(words), _without_articles(wanted))


def _occurrences(words: Sequence[_Word], wanted: Sequence[_Word]) -> list[tuple[int, int]]:
    said, looked_for = [word.plain for word in words], [word.plain for word in wanted]
    size = len(looked_for)
    return [
        (words[at].start, words[at + size - 1].end)
        for at in range(len(said) - size + 1)
        if size and said[at : at + size] == looked_for
    ]


def _words(text: str) -> list[_Word]:
    return [_Word(_plain(match[0]), match.start(), match.end()) for match in _WORD.finditer(text)]


def _plain(word: str) -> str:
    decomposed = unicodedata.normalize("NFKD", word)
    return "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()


def _without_articles(words: Sequence[_Word]) -> list[_Word]:
    """An article stands before another word: what ends in "vitamin A" ends in no article."""
    return [word for word in words if word.plain not in _ARTICLES or word == words[-1]]
