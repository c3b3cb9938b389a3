"""Whether an engine samples from the trainer's weights: both give log-probabilities of a few sequences."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from stasc.errors import UserError
from stasc.model_folder import ModelFolder
from stasc.run import WRITTEN_ANEW, read_json, write_lines
from stasc.sampling.base import Sampler

SEQUENCES = 4
"""Sequences in a probe."""
TOKENS = 128
"""Tokens of each at most."""

_CERTAIN = 6
"""Standard deviations of rounding that the distance to the middle must have."""

Scores = Sequence[Sequence[float]]
"""Log-probabilities of the tokens of some sequences."""


@dataclass(frozen=True)
class Probe:
    """Token sequences, and the log-probability of each token but the first in the trainer's model."""

    sequences: list[list[int]]
    log_probabilities: list[list[float]]

    def write(self, path: Path) -> None:
        """Write the probe of an M_n beside it."""
        write_lines(path, [json.dumps(dataclasses.asdict(self))])

    @classmethod
    def read(cls, path: Path) -> Probe:
        """The probe that ``write`` wrote.

        Raises:
            UserError: It is missing or damaged.
        """
        content = read_json(path, "sequences", "log_probabilities")
        try:
            probe = cls(content["sequences"], content["log_probabilities"])
            for ids, values in zip(probe.sequences, probe.log_probabilities, strict=True):
                if len(ids) != len(values) + 1 or not all(type(token) is int for token in ids):
                    raise ValueError("a sequence and its log-probabilities do not fit")
                sum(values)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): {WRITTEN_ANEW}.") from error
        return probe

    def check(self, sampler: Sampler, model: Path, before: Probe | None = None) -> None:
        """Compare a sampler that was to load ``model`` with the trainer.

        Args:
            sampler: Gives its own log-probabilities of the sequences.
            model: Folder of M_n.
            before: Probe of the model that the sampler held before, if there is one.

        Raises:
            UserError: The trainer's log-probabilities are not finite, or the sampler's differ from them by
                more than rounding explains or fit the model before, so it holds other weights.
        """
        if not all(map(math.isfinite, itertools.chain(*self.log_probabilities))):
            raise UserError(
                f"training diverged: {model} gives no finite probabilities. Lower model.learning_rate or set "
                "trainer.gradient_clip_val, in a new run_dir."
            )
        found = sampler.log_probabilities(self.sequences)
        off = fmean(abs(f - e) for f, e in _pairs(found, self.log_probabilities))
        allowed = 1e-3 if ModelFolder(model).dtype == "float32" else 0.1
        if not off <= allowed:  # nan is not allowed either
            raise UserError(
                f"the sampling engine does not hold {model}: its log-probabilities are {off:.2g} off the "
                f"trainer's, and {allowed:g} is allowed; all finished stages are kept, start again."
            )
        if before is not None and _is_still(found, before.log_probabilities, self.log_probabilities):
            raise UserError(
                f"the sampling engine does not hold {model} but the model before it: its log-probabilities "
                "are nearer to those of that one; all finished stages are kept, start again."
            )


def _is_still(found: Scores, before: Scores, now: Scores) -> bool:
    """Whether an engine has kept the old weights, even if half precision rounds by more than training moved.

    Training moved the log-probabilities of the tokens along one direction. An engine without rounding has
    gone none of that way or all of it, and rounding, which knows nothing of that direction, hardly moves it
    along. Where training moved so little that rounding alone might carry it over the middle, nothing can be
    told, and nothing is held against the engine.
    """
    moved = [n - b for n, b in _pairs(now, before)]
    gone = [f - b for f, b in _pairs(found, before)]
    length = math.hypot(*moved)
    if length == 0:
        return False
    share = sum(g * m for g, m in zip(gone, moved, strict=True)) / length**2
    rounding = math.hypot(*(g - share * m for g, m in zip(gone, moved, strict=True))) / math.sqrt(len(moved))
    return share < 0.5 and rounding * _CERTAIN < 0.5 * length


def _pairs(some: Scores, others: Scores) -> Iterator[tuple[float, float]]:
    """Log-probabilities of the same tokens in two models."""
    for one, other in zip(some, others, strict=True):
        yield from zip(one, other, strict=True)
