"""Whether an engine samples from the trainer's weights: both give log-probabilities of a few sequences."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
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

    def check(self, sampler: Sampler, model: Path) -> None:
        """Compare a sampler that was to load ``model`` with the trainer.

        Raises:
            UserError: The trainer's log-probabilities are not finite, or the sampler's differ from them by
                more than rounding explains, so it holds other weights.
        """
        if not all(map(math.isfinite, itertools.chain(*self.log_probabilities))):
            raise UserError(
                f"training diverged: {model} gives no finite probabilities. Lower model.learning_rate or set "
                "trainer.gradient_clip_val, in a new run_dir."
            )
        found = sampler.log_probabilities(self.sequences)
        pairs = [zip(f, e, strict=True) for f, e in zip(found, self.log_probabilities, strict=True)]
        off = fmean(abs(f - e) for pair in pairs for f, e in pair)
        # Half precision rounds by more than a few small training steps change: there a probe finds the
        # weights of another model, but those of the iteration before only if training changed much. Names and
        # shapes of the tensors are checked besides.
        allowed = 1e-3 if ModelFolder(model).dtype == "float32" else 0.1
        if not off <= allowed:  # nan is not allowed either
            raise UserError(
                f"the sampling engine does not hold {model}: its log-probabilities are {off:.2g} off the "
                f"trainer's, and {allowed:g} is allowed; all finished stages are kept, start again."
            )
