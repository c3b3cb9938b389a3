"""Draws on disk, found again by the request that they answer.

A draw follows from the model, the sampler, the sampling options, the prompt and the seed, and from nothing
else. So whoever asks the same again can read the answer instead: a run that was killed, and another run that
asks the same of the same M_0 (in an ablation most of them do).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import BinaryIO

from stasc.disk import naming
from stasc.sampling.base import Draw, Request

_KEY_CHARACTERS = 32


class Journal:
    """The draws of one stage, written as they come, in one file for each process.

    A kill loses the requests that were being answered, not the stage.

    Args:
        folder: Where the journal lies.
        stage: Name of the stage, from which the file has its name.
        rank: This process, which writes a file of its own.
        source: What all draws of the stage follow from beside their requests, as text.
        others: Folders of journals to read besides, such as those of other runs.
    """

    def __init__(self, folder: Path, stage: str, rank: int, source: str, others: Iterable[Path] = ()) -> None:
        name = re.sub(r"\W+", "-", stage)
        self.path = folder / f"{name}.{rank}.jsonl"
        self.source = source
        self.others = list(others)
        self._file: BinaryIO | None = None

    def read(self, requests: Sequence[Request]) -> dict[int, list[Draw]]:
        """The draws found for those requests, at most as many as each asks for, by the request's index."""
        wanted = {self._key(request): i for i, request in enumerate(requests)}
        found: dict[int, list[Draw]] = {}
        for folder in (self.path.parent, *self.others):
            for path in sorted(folder.glob("*.jsonl")):
                for line in path.read_bytes().splitlines():
                    key = line[2 : 2 + _KEY_CHARACTERS].decode("ascii", errors="replace")
                    if key not in wanted:
                        continue
                    try:
                        _, drawn = json.loads(line)
                        draws = [Draw(tuple(map(index, ids)), bool(finished)) for ids, finished in drawn]
                    except (ValueError, TypeError):
                        continue  # the process was killed while it wrote this line: it is drawn again
                    i = wanted[key]
                    if len(draws) > len(found.get(i, ())):
                        found[i] = draws[: requests[i].n]
        return found

    def add(self, request: Request, draws: Sequence[Draw]) -> None:
        """Write the draws of a request."""
        with naming(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a+b", buffering=0)
                if self._file.tell() and self._end() != b"\n":
                    self._file.write(b"\n")  # after a line that a kill has cut
            self._file.write(f"{json.dumps([self._key(request), draws])}\n".encode())

    def _end(self) -> bytes:
        """The last byte of its file."""
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1)

    def _key(self, request: Request) -> str:
        """A digest of all that the draws of a request follow from; how many there are is not part of it."""
        what = json.dumps([self.source, list(request.prompt_ids), request.seed])
        return hashlib.blake2b(what.encode(), digest_size=_KEY_CHARACTERS // 2).hexdigest()
