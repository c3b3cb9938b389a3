"""The metrics of an evaluation, on trajectories whose metrics are known by hand."""

import math

import pytest
from conftest import answer, corrected

from stasc.answers import AfterMarker, WholeCompletion
from stasc.metrics import (
    correction_metrics,
    dataset_sizes,
    evaluation_metrics,
    reward_metrics,
    sample_metrics,
    sampled,
    standard_errors,
    why_empty,
)
from stasc.trajectory import Question, Trajectory

MARKER = "Final Answer:"
QUESTION = Question("q", "?", ("x",))


def sample(question: str, j: int, first: tuple[str, float], second: tuple[str, float]) -> Trajectory:
    texts = [f"Because.\n{MARKER} {text}" for text, _ in (first, second)]
    chain = (answer(text, reward, j) for text, (_, reward) in zip(texts, (first, second), strict=True))
    return corrected(Question(question, "?", ("x",)), *chain)


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
    found = reward_metrics(SAMPLES, 1.0)
    assert (found["r1"], found["r2"]) == pytest.approx((3 / 6, 1 / 6))
    transitions = {"wrong_to_right": 1, "right_to_wrong": 3, "right_to_right": 0, "wrong_to_wrong": 2}
    assert found == found | transitions | {"count": 6}
    sizes = dataset_sizes([trajectory.learn() for trajectory in SAMPLES])
    assert sizes == {"size": 6, "improving": 1, "non_decreasing": 5}


def test_what_was_sampled_counts_each_draw_once():
    # First answers of 1 and 2 tokens and an end, each with a correction of 3 tokens, which was cut, and of 4.
    first = [answer(number=j, token_ids=range(1 + j)) for j in (0, 1)]
    second = [answer(number=0, token_ids=range(3), finished=False), answer(number=1, token_ids=range(4))]
    asked = [corrected(QUESTION, a, b) for a in first for b in second]
    assert sampled(asked) == {"answers": 6, "tokens": (2 + 3) + 2 * (3 + 5)}
    assert sampled(t.upto(1) for t in asked[::2]) == {"answers": 2, "tokens": 2 + 3}
    # The first answers were sampled for an earlier iteration.
    assert sampled(asked, first=2) == {"answers": 4, "tokens": 2 * (3 + 5)}
    # The question is asked once more, in another on-policy update.
    assert sampled([*asked, *asked]) == {"answers": 12, "tokens": 2 * (5 + 16)}
    assert sampled([asked[0], corrected(Question("other", "?"), first[1], second[1])])["answers"] == 4
    assert sampled([]) == {"answers": 0, "tokens": 0}


def test_an_answer_that_was_not_asked_again_stands_in_later_turns():
    once = SAMPLES[2].upto(1)
    assert reward_metrics([once], 1.0)["r2"] == 1
    found = evaluation_metrics([[once, SAMPLES[3]]] * 3, None, 1.0, WholeCompletion(), MARKER)
    assert found["rounds"] == {"r1": 0.5, "r2": 1.0, "r3": 1.0, "r4": 1.0}


def test_standard_errors_are_over_questions_and_not_over_samples():
    # Means of the questions: 2/3 and 1/3, then 0 and 1/3; with two of them the error is half their distance.
    found = standard_errors(SAMPLES)
    assert (found["r1_se"], found["r2_se"]) == pytest.approx((1 / 6, 1 / 6))
    single = standard_errors(SAMPLES[::3])  # one sample each: rewards 0, 0 and 0, 1
    assert (single["r1_se"], single["r2_se"]) == pytest.approx((0, math.sqrt(0.5) / math.sqrt(2)))
    assert standard_errors(SAMPLES[:3]) == {}


def test_delta_is_the_gain_of_the_same_question_and_its_error_is_over_questions():
    found = correction_metrics(SAMPLES)
    assert found["delta"] == pytest.approx(1 / 6 - 3 / 6)
    # Means of the questions: 0 - 2/3 and 1/3 - 1/3.
    assert found["delta_se"] == pytest.approx(1 / 3)
    assert found["delta_p"] == 1.0  # of two questions, one of which does not differ
    many = [sample(f"{i}", 0, ("y", 0), ("x", 1)) for i in range(12)]
    assert correction_metrics(many)["delta_p"] < 0.01
    assert "delta_se" not in correction_metrics(SAMPLES[:3])


def test_corrections_that_repeat_are_told_from_those_that_edit():
    def pair(first: str, second: str) -> Trajectory:
        return corrected(QUESTION, answer(first), answer(second))

    found = correction_metrics([pair("a b  c", "a b c"), pair("a b c d", "a b x d"), pair("a", "b")])
    assert found["repeated"] == pytest.approx(1 / 3)
    assert found["edited"] == pytest.approx((0.25 + 1) / 2)
    assert "edited" not in correction_metrics([pair("a", "a")])
    assert "repeated" not in correction_metrics([pair("a", "b").upto(1)])


def test_an_empty_dataset_is_explained_in_counts():
    two = [corrected(QUESTION, answer("x", 1.0, j), answer("x", 1.0, k)) for j in range(2) for k in range(2)]
    assert why_empty([*two, sample("b", 0, ("y", 0), ("x", 1))], 1.0) == (
        "2 of 3 initial answers were right, 1 of 5 corrections changed their answer, 1 improved it"
    )


def test_pass_at_k_and_the_majority_vote():
    found = sample_metrics(SAMPLES, 1.0, WholeCompletion(), MARKER)
    assert found["k"] == 3
    assert (found["pass_r1"], found["pass_r2"]) == (1.0, 0.5)
    # "the X." and "x" are one answer; among equals in b's second turn the first drawn, "x", is taken.
    assert (found["majority_r1"], found["majority_r2"]) == (0.5, 0.5)


def test_the_majority_vote_looks_behind_the_marker_that_it_is_given():
    samples = [
        corrected(Question("a", "?"), answer(f"{i} -> {text}", reward, i), answer())
        for i, (text, reward) in enumerate([("x", 1.0), ("y", 0.0), ("y", 0.0)])
    ]
    whole = WholeCompletion()
    assert sample_metrics(samples, 1.0, whole, "->")["majority_r1"] == 0.0
    for no_marker in (None, "=>"):  # whole completions differ, and the first is taken
        assert sample_metrics(samples, 1.0, whole, no_marker)["majority_r1"] == 1.0
        # What data.answer finds is voted on, too.
        assert sample_metrics(samples, 1.0, AfterMarker("->"), no_marker)["majority_r1"] == 0.0
