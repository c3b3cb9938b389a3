"""What a run says while it lasts: sentences, a bar on a terminal, lines with times everywhere else.

It imports no large library, so that the program can speak before it has loaded those.
"""

from __future__ import annotations

import os
import sys
import time
from statistics import fmean
from types import TracebackType

from tqdm import tqdm

from stasc.texts import printable

LINE_EVERY = 600
"""Seconds after which a stage that has no bar says how far it is."""

_BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}"


def speaks() -> bool:
    """Whether this process speaks: with several processes it is the first one of all."""
    # Whatever started them, the first process has 0 in all that there are of these.
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def say(text: str, *, timed: bool = False) -> None:
    """Print lines on standard output, above a bar that is on the screen.

    Args:
        text: The lines.
        timed: Begin with the time of day.
    """
    if speaks():
        text = printable(f"{_clock()}  {text}" if timed else text, keep="\n")
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """A time span in words, such as ``3 min 12 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """A stage that is under way.

    On a terminal it is a bar on standard error that goes away at the end. Elsewhere it is a line on standard
    output every ten minutes. A stage of several leaves a line in either case.

    Args:
        title: What is done, such as ``iteration 1: corrections``.
        total: How many there are to do; None if it cannot be counted, and then there is nothing to expect.
        line: Leave a line.
    """

    def __init__(self, title: str, total: int | None = None, *, line: bool = True) -> None:
        self.title = title
        self.line = line
        self.total = total
        self.done = 0
        self._note = ""
        self._start = self._said = time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=title if total else f"{title}, since {_clock()}",
            bar_format=_BAR + "{postfix}" if total else "{desc}",
            disable=None if speaks() else True,  # with None tqdm shows a bar on terminals only
            leave=False,
            dynamic_ncols=True,
            smoothing=0,
        )

    @property
    def seconds(self) -> float:
        """How long it lasts already."""
        return time.monotonic() - self._start

    def update(self, done: int, note: str = "") -> None:
        """So many more are done.

        Args:
            done: How many.
            note: What else to show, such as a rate.
        """
        self.done += done
        self._note = f", {note}" if note else ""
        if self.total and self.done >= self.total / 20:  # what the first of many took says nothing
            self._bar.bar_format = _BAR + ", {remaining} left{postfix}"
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done)
        if self._bar.disable and time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            self._say(f"{self.done:,} of {self.total:,}")

    def close(self) -> None:
        """It is over, whether it was finished or not: remove the bar."""
        self._bar.close()

    def finish(self) -> None:
        """It is done: remove the bar, and leave a line."""
        self.close()
        if self.line and self.total and self.total > 1:  # of one, as in a chat, there is no progress to tell
            self._say(f"{self.done:,}")

    def _say(self, count: str) -> None:
        say(f"{self.title}: {count} in {duration(self.seconds)}{self._note}", timed=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()


class Clock:
    """Seconds of the phases that alternate in an iteration, in all and the last time."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._phase: str | None = None
        self._since = time.monotonic()

    def switch(self, phase: str | None) -> None:
        """Begin a phase; None: what follows is in no phase."""
        now = time.monotonic()
        if self._phase is not None:
            self.last[self._phase] = now - self._since
            self.total[self._phase] = self.total.get(self._phase, 0.0) + self.last[self._phase]
        self._phase, self._since = phase, now

    def shares(self) -> str:
        """The phases in words, such as ``sampling 61%, training 30%``; and all begins anew."""
        total = sum(self.total.values())
        words = ", ".join(f"{phase} {seconds / total:.0%}" for phase, seconds in self.total.items())
        self.total = {}
        return words


class Pace:
    """How long a run has taken since it was started, and how long it will from what iterations took.

    Args:
        iterations: N.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self._start = time.monotonic()
        self.begun = False
        """Whether one has begun since then."""
        self._since: float | None = None
        self._took: list[float] = []

    def begin(self, n: int, *, whole: bool) -> None:
        """Say that iteration n begins.

        Args:
            n: The iteration; the one before is over.
            whole: Whether nothing of it was done before the run was started; otherwise what it takes says
                nothing about the others.
        """
        now = time.monotonic()
        if self._since is not None:
            self._took.append(now - self._since)
        self.begun, self._since = True, now if whole else None
        line = f"iteration {n} of {self.iterations}"
        if n > 1 and self._took:
            left = fmean(self._took) * (self.iterations - n + 1)
            line += f"; {duration(self.seconds)} so far, about {duration(left)} left"
        say(line, timed=True)

    @property
    def seconds(self) -> float:
        """How long the start lasts already."""
        return time.monotonic() - self._start

    def end(self) -> None:
        """Say that all iterations are done."""
        took = duration(self.seconds)
        say(f"done: iteration {self.iterations} of {self.iterations}; this start took {took}", timed=True)


def _clock() -> str:
    return time.strftime("%H:%M:%S")
