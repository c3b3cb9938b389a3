"""The figures of an evaluation, on trajectories whose figures are known by hand."""

import math

import pytest

from stasc.scoring import over_samples, scores, sizes, standard_errors
from stasc.trajectory import Completion, Question, Trajectory


def sample(question: str, j: int, first: tuple[str, float], second: tuple[str, float]) -> Trajectory:
    said = [Completion(f"Because.\nFinal Answer: {text}", (), True) for text, _ in (first, second)]
    return Trajectory(Question(question, "?", ("x",)), j, 0, *said, first[1], second[1])


# Two questions with three samples each. First turn: x wins in the first, y (wrong) in the second.
SAMPLES = [
    sample("a", 0, ("y", 0), ("y", 0)),
    sample("a", 1, ("the X.", 1), ("y", 0)),
    sample("a", 2, ("x", 1), ("z", 0)),
    sample("b", 0, ("y", 0), ("x", 1)),
    sample("b", 1, ("y", 0), ("z", 0)),
    sample("b", 2, ("x", 1), ("y", 0)),
]


def test_means_and_transitions_count_every_sample():
    found = scores(SAMPLES, 1.0)
    assert (found["r1"], found["r2"]) == pytest.approx((3 / 6, 1 / 6))
    transitions = {"wrong_to_right": 1, "right_to_wrong": 3, "right_to_right": 0, "wrong_to_wrong": 2}
    assert found == found | transitions | {"count": 6}
    assert sizes(SAMPLES) == {"size": 6, "improving": 1, "non_decreasing": 5}


def test_standard_errors_are_over_questions_and_not_over_samples():
    # Means of the questions: 2/3 and 1/3, then 0 and 1/3; with two of them the error is half their distance.
    found = standard_errors(SAMPLES)
    assert (found["r1_se"], found["r2_se"]) == pytest.approx((1 / 6, 1 / 6))
    single = standard_errors(SAMPLES[::3])  # one sample each: rewards 0, 0 and 0, 1
    assert (single["r1_se"], single["r2_se"]) == pytest.approx((0, math.sqrt(0.5) / math.sqrt(2)))
    assert standard_errors(SAMPLES[:3]) == {}


def test_pass_at_k_and_the_majority_vote():
    found = over_samples(SAMPLES, 1.0)
    assert found["k"] == 3
    assert (found["pass_r1"], found["pass_r2"]) == (1.0, 0.5)
    # "the X." and "x" are one answer; among equals in b's second turn the first drawn, "x", is taken.
    assert (found["majority_r1"], found["majority_r2"]) == (0.5, 0.5)
