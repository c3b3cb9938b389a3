"""Where the answer stands in a completion."""

import pytest

from stasc.answers import AfterMarker, InTag, LastLine, LastNumber, WholeCompletion, after_marker
from stasc.errors import UserError

MARKER = "Final Answer:"


def test_the_whole_completion_is_the_answer():
    assert WholeCompletion().find(" Because.\nParis \n") == "Because.\nParis"


def test_after_a_marker():
    assert AfterMarker(MARKER).find("x FINAL ANSWER: y Final Answer: z") == "y Final Answer: z"
    assert AfterMarker(MARKER).find("no marker") == ""
    assert after_marker("what (a+b)? c", "(A+B)?") == " c"  # not a pattern


def test_after_marker_is_right_after_letters_whose_lower_case_is_longer():
    assert after_marker("İİİ Final Answer: Paris", MARKER) == " Paris"


@pytest.mark.parametrize("marker", ["", " "])
def test_a_blank_marker_is_refused(marker):
    with pytest.raises(UserError, match=r"data.answer.marker is blank"):
        AfterMarker(marker)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>4</answer> no, <answer> 5\n</answer>.", "5"),
        ("<answer>4", ""),
        ("4</answer>", ""),
        ("<answer>4</answer><answer>5", "4"),
        ("none", ""),
    ],
)
def test_in_the_last_pair_of_tags(completion, answer):
    assert InTag().find(completion) == answer
    assert InTag("final").find(completion.replace("answer>", "final>")) == answer


@pytest.mark.parametrize("tag", ["", "<answer>", "a b"])
def test_a_tag_that_is_no_word_is_refused(tag):
    with pytest.raises(UserError, match=r"data.answer.tag is"):
        InTag(tag)


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("1,250 apples.", "1250"),
        ("$1,234,567.89!", "1234567.89"),
        ("7 and 1,2345", "2345"),
        ("1, 2,3", "3"),
        ("2-3", "3"),
        ("(4)-3", "3"),
        ("it is -5.", "-5"),
        ("x=-7", "-7"),
        ("\N{MINUS SIGN}5", "-5"),
        ("- 5", "5"),  # an item of a list
        ("6/8 = 3/4", "3/4"),
        ("-.5", "-.5"),
        ("3.50 dollars", "3.50"),
        ("a5b", "5"),
        ("none", ""),
        ("", ""),
    ],
)
def test_the_last_number(completion, number):
    assert LastNumber().find(completion) == number


def test_the_last_line():
    assert LastLine().find("Because.\n Paris \n\n") == "Paris"
    assert LastLine().find("\n") == ""
