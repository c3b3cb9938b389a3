"""Whether an engine samples from the weights that the trainer has: both are asked about a few sequences."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoConfig

from stasc.errors import UserError
from stasc.run import write_lines
from stasc.sampling import Sampler

SEQUENCES = 4
"""Sequences asked about."""
TOKENS = 128
"""Of each sequence at most."""


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
        """The probe that ``write`` wrote."""
        return cls(**json.loads(path.read_text()))

    def check(self, sampler: Sampler, model: Path) -> None:
        """Ask a sampler that was to load ``model``.

        Raises:
            UserError: It disagrees by more than rounding explains, so it holds other weights; or these are of
                no use.
        """
        if not all(map(math.isfinite, itertools.chain(*self.log_probabilities))):
            raise UserError(
                f"training diverged: {model} gives no finite probabilities. Lower model.learning_rate or set "
                "trainer.gradient_clip_val, in a new run_dir."
            )
        found = sampler.log_probabilities(self.sequences)
        pairs = [zip(f, e, strict=True) for f, e in zip(found, self.log_probabilities, strict=True)]
        off = fmean(abs(f - e) for pair in pairs for f, e in pair)
        # Half precision rounds more than a few cautious steps of training change: there a probe finds wrong
        # weights, but older ones only if training went far. Their names and shapes are checked besides.
        allowed = 1e-3 if AutoConfig.from_pretrained(model).dtype in (None, torch.float32) else 0.1
        if not off <= allowed:  # nan is not allowed either
            raise UserError(
                f"the sampling engine does not hold {model}: its log-probabilities are {off:.2g} off the "
                f"trainer's, and {allowed:g} is allowed; all finished stages are kept, start again."
            )
