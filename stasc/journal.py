"""The draws of a stage under way, on disk as they come: a kill loses seconds, not the stage."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from stasc.sampling import Draw, Request


class Journal:
    """What a stage has drawn so far, in one file for each process.

    Args:
        folder: Where the journals of a run lie; there is only ever one stage under way.
        stage: Its name.
        rank: This process, which writes a file of its own and reads those of all.
    """

    def __init__(self, folder: Path, stage: str, rank: int) -> None:
        self.folder = folder
        self.stage = re.sub(r"\W+", "-", stage)
        self.own = folder / f"{self.stage}.{rank}.jsonl"
        self._file: BinaryIO | None = None

    def read(self, requests: Sequence[Request]) -> dict[int, list[Draw]]:
        """The draws of those requests that are finished, by their number."""
        draws = {}
        for path in sorted(self.folder.glob(f"{self.stage}.*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    number, seed, drawn = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a kill came in its midst, so it is drawn again
                if number < len(requests) and seed == requests[number].seed:
                    draws[number] = [Draw(tuple(ids), finished) for ids, finished in drawn]
        return draws

    def add(self, number: int, request: Request, draws: list[Draw]) -> None:
        """Note the finished request of that number."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.own.open("ab", buffering=0)
        self._file.write(f"{json.dumps([number, request.seed, draws])}\n".encode())
