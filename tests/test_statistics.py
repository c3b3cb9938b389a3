"""The report's statistics against exact ones and against scipy's."""

from itertools import product
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from stasc.statistics import (
    RESAMPLES,
    correlation,
    holm,
    over_seeds,
    paired_test,
    standard_error,
    verdict,
)


def test_the_mean_of_seeds_has_a_t_interval():
    found = over_seeds([0.25, 0.5, 0.375])
    by_scipy = stats.ttest_1samp([0.25, 0.5, 0.375], 0).confidence_interval(0.95)
    assert found == pytest.approx((0.375, by_scipy.low, by_scipy.high))
    assert over_seeds([0.25, 0.75]) == (0.5, None, None)
    assert over_seeds([0.5, None]) == (None, None, None)


def test_the_standard_error():
    assert standard_error([0.0, 1.0, 1.0]) == pytest.approx(stats.sem([0, 1, 1]))
    assert standard_error([1.0]) is None


@pytest.mark.parametrize(
    "differences",
    [
        [1.0] * 9 + [-1.0] * 2 + [0.0] * 40,
        [0.5, 0.25, -0.25, 1.0, 0.0, 0.75, -0.5, 0.25, 0.1, 0.2],
        [0.0] * 5,
        [1.0],
    ],
)
def test_the_paired_test_against_all_sign_flips(differences):
    found = paired_test(differences)
    moved = [d for d in differences if d]
    flips = [
        sum(sign * d for sign, d in zip(signs, moved, strict=True))
        for signs in product((1, -1), repeat=len(moved))
    ]
    exact = fmean(abs(total) >= abs(sum(moved)) - 1e-9 for total in flips)
    noise = 4 * (exact * (1 - exact) / RESAMPLES) ** 0.5 + 1 / RESAMPLES
    assert found.p == pytest.approx(exact, abs=noise)
    assert found.difference == pytest.approx(fmean(differences))
    assert found.questions == len(differences)
    assert found.difference_low <= found.difference <= found.difference_high


def test_for_rewards_of_0_and_1_it_is_mcnemars_test():
    differences = [1.0] * 30 + [-1.0] * 14 + [0.0] * 456
    found = paired_test(differences)
    exact = stats.binomtest(14, 44).pvalue
    assert found.p == pytest.approx(exact, abs=4 * (exact / RESAMPLES) ** 0.5)
    by_scipy = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=1
    ).confidence_interval
    ends = (found.difference_low, found.difference_high)
    assert ends == pytest.approx((by_scipy.low, by_scipy.high), abs=0.0015)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


def test_the_interval_of_a_correlation_draws_whole_runs():
    # Within each run the points are copies: an interval over points would be much too narrow.
    random = np.random.default_rng(3)
    centres = random.normal(size=(12, 2))
    single = correlation([[tuple(centre)] for centre in centres])
    copies = correlation([[tuple(centre)] * 50 for centre in centres])
    assert (single.runs, single.points, copies.runs, copies.points) == (12, 12, 12, 600)
    assert copies[2:] == pytest.approx(single[2:])
    assert copies.r == pytest.approx(np.corrcoef(centres.T)[0, 1])
    resampled = [np.corrcoef(centres[random.integers(12, size=12)].T)[0, 1] for _ in range(4000)]
    assert (single.r_low, single.r_high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.05)


def test_a_correlation_that_is_not_defined():
    assert correlation([[(1.0, 2.0)] * 5]) is None
    assert correlation([[(1.0, 2.0), (2.0, 1.0)]]) is None  # any two points are on a line
    assert correlation([]) is None


@pytest.mark.parametrize(
    ("delta", "p", "sentence"),
    [
        (0.004, 0.6, "M_4: corrections are not better than first answers: +0.004, p = 0.6; 49 % "),
        (0.1, 0.0001, "M_4: corrections are better than first answers: +0.100, p < 0.001; 49 % "),
        (-0.1, 0.01, "M_4: corrections are worse than first answers: -0.100, p = 0.01; 49 % "),
    ],
)
def test_one_sentence_answers_the_question_that_everybody_has(delta, p, sentence):
    found = verdict("M_4", delta, p, 0.49)
    assert verdict("M_4", delta, p, None) == f"{sentence.partition(';')[0]}."
    assert found == f"{sentence.replace(' %', '%')}repeat them."
