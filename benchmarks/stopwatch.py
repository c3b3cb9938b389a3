"""What benchmarks/iteration.py puts into a run of the program: a callback and a sampler that take times."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from stasc.sampling import Draw, Request, Sampling, VLLMSampler

START, ENGINE = "start of the program", "waiting for the engine"
SAMPLING, STEPS = "sampling", "optimiser steps"
RECORDS, AROUND = "prompts, rewards, files, evaluation", "batches, logging, optimiser set-up"
NOTING = "journal and progress bar, while the engine samples on"
EXPORT, SWAP = "M_n and checkpoint to disk", "swap of weights"
STOP = "end of the engine"


class Laps:
    """Seconds of wall-clock by what they were spent on; at every moment it is exactly one thing."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.moments: dict[str, float] = {}
        """When something happened for the first time."""
        self._current = START
        self._since = time.time()

    def switch(self, to: str) -> str:
        """From now on it is ``to``; gives what it was until now."""
        now, before = time.time(), self._current
        self.seconds[before] += now - self._since
        self._since, self._current = now, to
        return before

    def note(self, moment: str) -> None:
        """It happens; only the first time is kept."""
        self.moments.setdefault(moment, time.time())


laps = Laps()


class Stopwatch(Callback):
    """Takes the time of what training consists of.

    Lightning calls it before the program's own callbacks: at the start of an epoch the evaluation of M_{n-1}
    follows, at its end the export of M_n and the checkpoint.

    Args:
        output: JSON file for all times.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)

    def on_train_epoch_start(self, *_: Any) -> None:
        """D_n is there, and the program evaluates M_{n-1}."""
        laps.switch(RECORDS)
        laps.note("evaluation of M_0")

    def on_train_batch_start(self, *_: Any) -> None:
        """A step begins; its batch is there."""
        laps.switch(STEPS)

    def on_train_batch_end(self, *_: Any) -> None:
        """A step ends, before progress bar and loggers hear of it."""
        laps.switch(AROUND)
        laps.counts["steps"] += 1

    def on_train_epoch_end(self, *_: Any) -> None:
        """The program writes M_n and a checkpoint."""
        laps.switch(EXPORT)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Write all down."""
        laps.switch(RECORDS)
        laps.note("end")
        times = {"seconds": laps.seconds, "counts": laps.counts, "moments": laps.moments}
        self.output.write_text(json.dumps(times))


class TimedSampler(VLLMSampler):
    """``VLLMSampler`` that takes its own time.

    Waiting for draws and what is done with each as it comes are told apart; the engine is at work in both.
    """

    def load(self, model: Path) -> None:
        """See ``Sampler``."""
        laps.switch(SWAP)
        super().load(model)
        laps.switch(RECORDS)

    def wait(self) -> None:
        """See ``Sampler``."""
        before = laps.switch(ENGINE)
        super().wait()
        laps.switch(before)
        if "engine ready" not in laps.moments:
            laps.note("engine ready")

    def sample(
        self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Draw]]]:
        """See ``Sampler``."""
        return self._timed(super().sample(requests, sampling, stop_ids))

    def release(self) -> None:
        """See ``Sampler``; the program calls it right before it trains."""
        super().release()
        laps.switch(AROUND)
        laps.note("training")

    def close(self) -> None:
        """See ``Sampler``."""
        before = laps.switch(STOP)
        super().close()
        laps.switch(before)

    def _timed(self, draws: Iterator[tuple[int, list[Draw]]]) -> Iterator[tuple[int, list[Draw]]]:
        before = laps.switch(SAMPLING)
        for answer in draws:
            laps.switch(NOTING)
            laps.counts["completions"] += len(answer[1])
            yield answer
            laps.switch(SAMPLING)
        laps.switch(before)
