"""The statistics of a report: intervals over seeds, paired tests over questions, and a correlation.

All random draws have a fixed seed, so that the same runs give the same numbers. scipy.stats has tests like
these; they were timed 20 times slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 20_000
"""Random sign flips of a test, and resamples of a bootstrap."""

FEWEST_SEEDS = 3
"""With two seeds a t interval goes 12.7 standard errors to each side, and says next to nothing."""

FEWEST_RUNS = 4
"""With fewer runs a bootstrap over runs says nothing."""

_TIE = 1e-9  # Sums of the same rewards in another order are the same.


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval, which takes three of them; None where it is unknown."""

    mean: float | None
    low: float | None = None
    high: float | None = None


def over_seeds(values: Sequence[float | None]) -> Estimate:
    """Mean and t interval of one value per seed; unknown if one of them is."""
    if None in values:
        return Estimate(None)
    mean, n = fmean(values), len(values)
    if n < FEWEST_SEEDS:
        return Estimate(mean)
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def standard_error(per_question: Sequence[float]) -> float | None:
    """Of the mean of one value per question; None for a single question."""
    return stdev(per_question) / math.sqrt(len(per_question)) if len(per_question) > 1 else None


class Paired(NamedTuple):
    """A mean difference between two systems over the same questions.

    ``difference_low`` and ``difference_high`` are a 95 % percentile bootstrap interval over questions. ``p``
    is two-sided, from random flips of the differences' signs; for rewards of 0 and 1 that is McNemar's test.
    """

    difference: float
    difference_low: float
    difference_high: float
    p: float
    questions: int


def paired_test(differences: Sequence[float]) -> Paired:
    """Test whether differences, one for each question, have a mean of zero."""
    random = np.random.default_rng(0)
    values, counts = np.unique(np.round(differences, 12), return_counts=True)
    n = counts.sum()
    # As many draws of a question as of its value: resampling counts is resampling questions.
    means = random.multinomial(n, counts / n, size=RESAMPLES) @ values / n
    low, high = np.quantile(means, [0.025, 0.975])

    sizes, repeats = np.unique(np.abs(np.round(differences, 12)), return_counts=True)
    observed = abs(float(values @ counts))
    # Of c differences of one size, a binomial number keeps its sign.
    sums = (2 * random.binomial(repeats, 0.5, size=(RESAMPLES, len(sizes))) - repeats) @ sizes
    as_far = int(np.count_nonzero(np.abs(sums) >= observed - _TIE))
    p = (as_far + 1) / (RESAMPLES + 1)
    return Paired(fmean(differences), float(low), float(high), p, int(n))


def verdict(model: str, delta: float, p: float, repeated: float | None) -> str:
    """One sentence on whether a model corrects itself.

    Args:
        model: What it is called.
        delta: r(Y2) - r(Y1), the mean over test questions.
        p: Of the paired test of that difference.
        repeated: Share of the corrections that repeat the answer before, if there are corrections.
    """
    word = ("better" if delta > 0 else "worse") if p < 0.05 else "not better"
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    share = "" if repeated is None else f"; {repeated:.0%} repeat them"
    return f"{model}: corrections are {word} than first answers: {delta:+.3f}, {shown}{share}."


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of the p values of several tests; the order is kept."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


class Correlation(NamedTuple):
    """Pearson's r of ``points`` pairs from ``runs`` runs.

    ``r_low`` and ``r_high`` are a 95 % percentile bootstrap interval that draws whole runs, because the
    iterations of a run are not independent; None with fewer than ``FEWEST_RUNS``.
    """

    runs: int
    points: int
    r: float
    r_low: float | None
    r_high: float | None


def correlation(runs: Sequence[Sequence[tuple[float, float]]]) -> Correlation | None:
    """The correlation of the pairs of all runs together; None where it is not defined."""
    runs = [pairs for pairs in runs if pairs]
    pairs = np.array([pair for pairs in runs for pair in pairs], dtype=float).reshape(-1, 2)
    if len(pairs) <= 2 or not pairs.std(axis=0).all():
        return None
    standardized = iter((pairs - pairs.mean(axis=0)) / pairs.std(axis=0))
    # Six sums of each run give r of any selection of runs.
    sums = np.array([_sums(np.array([next(standardized) for _ in pairs])) for pairs in runs])
    r = float(_pearson(sums.sum(axis=0)))
    if len(runs) < FEWEST_RUNS:
        return Correlation(len(runs), len(pairs), r, None, None)
    random = np.random.default_rng(0)
    drawn = random.multinomial(len(runs), [1 / len(runs)] * len(runs), size=RESAMPLES)
    low, high = np.nanquantile(_pearson(drawn @ sums), [0.025, 0.975])
    return Correlation(len(runs), len(pairs), r, float(low), float(high))


def _sums(pairs: np.ndarray) -> list[float]:
    x, y = pairs.T
    return [len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]


def _pearson(sums: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (n * xx - x * x) * (n * yy - y * y)
    with np.errstate(invalid="ignore", divide="ignore"):  # a selection whose points are all the same
        return np.where(spread > _TIE, (n * xy - x * y) / np.sqrt(spread), math.nan)
