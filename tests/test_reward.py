"""Rewards, compared with the paper's released grader, and the statistics of self-correction."""

import math
import pickle

import pytest
import torch
import torch.distributed as dist

from stasc.answers import AfterMarker
from stasc.reward import (
    F1,
    ExactMatch,
    InAccuracy,
    Reward,
    SelfCorrection,
    exact_match,
    f1,
    in_accuracy,
    normalize,
)
from stasc.trajectory import Question

MARKER = "Final Answer:"

# Scores of the paper's released grader: in-accuracy of the whole completion, in-accuracy of the text after
# the marker, exact match and F1 of the whole completion. Cases that it scores wrongly are tested below.
GRADER = {
    "case": ("the answer is PARIS", ["Paris"], 1, 0, 0, 0.5),
    "article_inside": ("lord of rings", ["The Lord of the Rings"], 1, 0, 1, 1),
    "digit_token": ("There are 5 of them", ["5"], 1, 0, 0, 0.3333),
    "thousands": ("1000 people", ["1,000"], 0, 0, 0, 0),
    "substring_word": ("Parisian cafe", ["Paris"], 0, 0, 0, 0),
    "acronym2": ("the U.S. president", ["U.S."], 1, 0, 0, 0.8),
    "hyphen2": ("Spiderman", ["Spider-Man"], 0, 0, 0, 0),
    "multi_ref_any": ("It is Big Ben", ["Elizabeth Tower", "Big Ben"], 1, 0, 0, 0.6667),
    "negated": ("It is not Paris but Lyon", ["Paris"], 1, 0, 0, 0.2857),
    "marker_ok": ("Step-by-step reasoning: x\nFinal Answer: Paris", ["Paris"], 1, 1, 0, 0.2222),
    "marker_missing": ("The answer is Paris", ["Paris"], 1, 0, 0, 0.5),
    "marker_bold": ("**Final Answer**: Paris", ["Paris"], 1, 0, 0, 0.5),
    "marker_space": ("Final Answer : Paris", ["Paris"], 1, 0, 0, 0.5),
    "crlf_many": ("a\r\n" * 20 + "Final Answer: 12", ["answer"], 1, 0, 0, 0.5),
    "empty_final": ("Final Answer:", ["Paris"], 0, 0, 0, 0),
    "tabs_newlines": ("New\nYork\tCity", ["new york city"], 1, 0, 1, 1),
    "underscore": ("foo_bar", ["foo bar"], 1, 0, 1, 1),
}


@pytest.mark.parametrize("case", GRADER)
def test_agrees_with_the_released_grader(case):
    prediction, references, *expected = GRADER[case]
    final = AfterMarker(MARKER).find(prediction)
    rewards = [InAccuracy(), InAccuracy(), ExactMatch(), F1()]
    answers = [prediction, final, prediction, prediction]
    found = [reward.score(answer, references) for reward, answer in zip(rewards, answers, strict=True)]
    assert found == pytest.approx(expected, abs=5e-5)


# Intended differences from the released grader.


def test_reference_A_which_the_grader_drops_as_an_article_and_then_always_matches():
    assert in_accuracy("vitamin C", ["A"]) == 0
    assert in_accuracy("This is a hard question.", ["A"]) == 0
    right = ["A", "A.", "(A) Paris", "vitamin A", "the answer is **A**.", "The answer is A because", "a"]
    assert [in_accuracy(prediction, ["A"]) for prediction in right] == [1] * len(right)
    assert exact_match("A", ["A"]) == f1("A", ["A"]) == 1


def test_reference_The_which_the_grader_always_matches():
    assert in_accuracy("It is the dog", ["The"]) == 0
    assert in_accuracy("anything", ["The"]) == 0


@pytest.mark.parametrize("reference", ["", "?!", " \n", "…", "\u200b"])
@pytest.mark.parametrize("prediction", ["anything", "", "?!"])
def test_references_without_words_which_the_grader_always_matches(prediction, reference):
    for reward in (in_accuracy, exact_match, f1):
        assert reward(prediction, [reference]) == 0
        assert reward("Paris", [reference, "Paris"]) == 1


def test_no_references_for_which_the_grader_raises_in_exact_match_and_f1():
    assert in_accuracy("Paris", []) == exact_match("Paris", []) == f1("Paris", []) == 0


def test_typographic_apostrophes_which_the_grader_takes_for_words():
    for apostrophe in "\u2018\u2019\u02bb\u02bc\u2032`\u00b4":
        assert normalize(f"Schindler{apostrophe}s List") == normalize("Schindler's List")


def test_missing_accents_which_the_grader_counts_as_a_difference():
    assert in_accuracy("It is Beyonce.", ["Beyoncé"]) == in_accuracy("It is Beyonce\u0301.", ["Beyonce"]) == 1
    assert normalize("Søren, Łódź, Œuvre") == ["soren", "lodz", "oeuvre"]


def test_a_prediction_of_None_raises():
    with pytest.raises(TypeError):
        in_accuracy(None, ["Paris"])


# Normalization.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("August\xa022,\xa01980", "August 22, 1980"),
        ("1914\u20131918", "1914-1918"),
        ("“Let it be”", '"Let it be"'),
        ("co\u00adoperate", "cooperate"),
        ("STRASSE", "Straße"),
        ("İstanbul", "istanbul"),
        ("\uff11\uff19\uff19\uff19", "1999"),  # full width
        ("ﬁlm", "film"),
        ("H₂O", "H2O"),
    ],
)
def test_typography_is_ignored(one, other):
    assert exact_match(one, [other]) == in_accuracy(one, [other]) == in_accuracy(other, [one]) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("10²", "102"), ("2½", "21/2"), ("कु", "के"), ("5", "15"), ("€5", "5€"), ("New York", "York New")],
)
def test_different_texts_do_not_match(one, other):
    assert in_accuracy(one, [other]) == in_accuracy(other, [one]) == 0


@pytest.mark.parametrize("other", ["y-n-z", "y-n", "y-n-an", "b-n-y"])
def test_letters_joined_by_hyphens_are_not_articles(other):
    # Dropping articles before punctuation, or any "a" after it, makes some of these equal.
    for wrapped in ("{}", "Final Answer: {}", "The answer is {}.", "{} is it"):
        assert in_accuracy(wrapped.format(other), ["y-n-a"]) == 0
        assert in_accuracy(wrapped.format("y-n-a"), ["y-n-a"]) == 1
    if other != "y-n":  # which "y-n-a" does contain
        assert in_accuracy("y-n-a", [other]) == 0
    assert exact_match("y-n-a", [other]) == 0
    assert f1("y-n-a", [other]) < 1


def test_letters_joined_by_other_dashes_are_not_articles():
    assert in_accuracy("y\u2013n\u2013z", ["y\u2013n\u2013a"]) == in_accuracy("a - n - z", ["b - n - z"]) == 0
    assert in_accuracy("y - n - a", ["y-n-a"]) == 1


@pytest.mark.parametrize(
    "prediction",
    [
        "It is The Lord of the Rings.",
        '"the Lord of the Rings"',
        "**The Lord of the Rings**",
        "the lord of a rings",
    ],
)
def test_articles_are_ignored(prediction):
    assert (
        in_accuracy(prediction, ["Lord of Rings"]) == in_accuracy(prediction, ["The Lord of the Rings"]) == 1
    )


@pytest.mark.parametrize(
    ("prediction", "reference", "reward"),
    [
        ("Vitamin A is essential", "vitamin a", 1),  # a name, though a word follows it
        ("Vitamin C is essential", "Vitamin A", 0),
        ("once upon a time", "Once Upon A Time", 1),
        ("rock a bye baby", "Rock-a-bye Baby", 1),
        ("the band The The is", "The The", 1),
        ("by A. A. Milne", "A.A. Milne", 1),
    ],
)
def test_words_that_may_or_may_not_be_articles(prediction, reference, reward):
    assert in_accuracy(prediction, [reference]) == reward


def test_f1_is_the_best_over_the_references_and_counts_repeats():
    assert f1("big big ben", ["Big Ben", "tower"]) == pytest.approx(0.8)
    assert f1("the cat", ["the dog"]) == 0


@pytest.mark.parametrize("reward", [in_accuracy, exact_match, f1])
def test_an_empty_prediction_scores_nothing(reward):
    assert reward("", ["Paris"]) == reward("?!", ["Paris"]) == 0


@pytest.mark.parametrize("reward", [in_accuracy, exact_match, f1])
def test_one_string_is_not_a_list_of_references(reward):
    with pytest.raises(TypeError, match="list of strings"):
        reward("a plan", "Paris")


# The classes.


class SameLength(Reward):
    def __init__(self, slack: int):
        self.slack = slack

    def score(self, answer, references):
        return float(any(abs(len(answer) - len(reference)) <= self.slack for reference in references))


class SaysTheName(Reward):
    def judge(self, answer, question):
        return float(question.entry["name"] in answer)


def test_a_reward_of_two_arguments():
    reward = SameLength(slack=1)
    assert [reward.judge("abc", Question("q", "?", (r,))) for r in ("xyz1", "xyz12")] == [1, 0]


def test_a_reward_that_sees_the_whole_question():
    assert SaysTheName().judge("I am Tim", Question("q", "?", entry={"name": "Tim"})) == 1
    with pytest.raises(NotImplementedError, match="SaysTheName"):
        SaysTheName().score("I am Tim", ["Tim"])


def test_a_reward_that_judges_nothing_is_refused():
    with pytest.raises(TypeError, match="Nothing must implement"):
        type("Nothing", (Reward,), {})


# The metrics.


def test_self_correction_counts_transitions():
    metric = SelfCorrection()
    metric.update([0, 1, 1], [1, 0, 1])
    metric.update((0.0, 0.0, 0.5), (0.0, 1.0, 0.75))
    result = {key: value.item() for key, value in metric.compute().items()}
    assert result == {
        "r1": 2.5 / 6,
        "r2": 3.75 / 6,
        "wrong_to_right": 2,
        "right_to_wrong": 1,
        "right_to_right": 1,
        "wrong_to_wrong": 2,
        "count": 6,
    }
    assert all(isinstance(result[key], int) for key in result if key not in ("r1", "r2"))


def test_self_correction_with_a_threshold():
    metric = SelfCorrection(threshold=0.5)
    metric.update([0.5, 0.4], [0.4, 0.5])
    result = metric.compute()
    assert (result["right_to_wrong"], result["wrong_to_right"]) == (1, 1)


def test_self_correction_without_pairs():
    metric = SelfCorrection()
    metric.update([], [])
    result = metric.compute()
    assert result["count"] == 0
    assert math.isnan(result["r1"])


def test_self_correction_refuses_lists_of_different_length():
    with pytest.raises(ValueError, match="length"):
        SelfCorrection().update([0.0, 1.0], [1.0])


def test_the_mean_is_exact_beyond_float32():
    metric = SelfCorrection()
    for _ in range(2):
        metric.update([0.1] * 50_000, [1.0] * 50_000)
    assert metric.compute()["r1"].item() == pytest.approx(0.1, abs=1e-12)


def test_the_metric_can_be_pickled():
    metric = SelfCorrection(sync_on_compute=False)
    metric.update([0.0], [1.0])
    assert pickle.loads(pickle.dumps(metric)).compute()["wrong_to_right"] == 1


def _check_on_one_of_two_processes(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metric = SelfCorrection()
    metric.update(*[([0, 1, 1], [1, 1, 1]), ([1], [0])][rank])
    # r1 and r2 are means over all pairs: the mean of the two processes' means would be 5/6 for r1.
    assert {name: value.item() for name, value in metric.compute().items()} == {
        "r1": 3 / 4,
        "r2": 3 / 4,
        "wrong_to_right": 1,
        "right_to_wrong": 1,
        "right_to_right": 2,
        "wrong_to_wrong": 0,
        "count": 4,
    }

    # Now one process has no pairs at all, and never calls update.
    metric.reset()
    if rank == 0:
        metric.update([0, 0, 1], [0, 1, 1])
    result = metric.compute()
    assert (result["count"], result["wrong_to_right"], result["r2"].item()) == (3, 1, 2 / 3)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
@pytest.mark.slow
def test_uneven_and_empty_shards_give_the_same_statistics(tmp_path):
    torch.multiprocessing.spawn(_check_on_one_of_two_processes, (str(tmp_path / "store"),), nprocs=2)
