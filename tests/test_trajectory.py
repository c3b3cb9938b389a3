"""Chains of answers, what is learnt of them, and their files."""

import json

import pytest
from conftest import answer, corrected

from stasc.trajectory import Question, Records, Trajectory, from_json, to_json

QUESTION = Question("q1", "Où est “Paris”?\n", ("France", "la France"))
CHAIN = corrected(
    QUESTION,
    answer("Fränce\n", 0.25, 3, token_ids=(5, 6, 7)),
    answer("no", 0.0, 1, finished=False),
    answer("\u2028", 1.0, 0),
)


def test_a_chain_has_turns_numbers_and_the_answer_that_stands():
    assert (CHAIN.turn, CHAIN.path) == (3, (3, 1, 0))
    assert [CHAIN.reward(turn) for turn in (1, 2, 3, 9)] == [0.25, 0.0, 1.0, 1.0]
    assert CHAIN.upto(1).path == (3,)
    assert Trajectory(QUESTION).turn == 0


def test_what_is_learnt_is_the_last_answer_for_its_own_prompt_unless_told_otherwise():
    plain, other = CHAIN.learn(), CHAIN.learn(turn=1, prompt="hint", weight=-2)
    assert (plain.turn, plain.prompt, plain.weight, plain.answer) == (3, "correction", 1.0, CHAIN.answers[2])
    assert (other.turn, other.prompt, other.weight, other.answer) == (1, "hint", -2.0, CHAIN.answers[0])


def test_records_come_back_from_their_files_and_say_which_turn_they_are(tmp_path):
    records = [CHAIN, CHAIN.upto(1), CHAIN.learn(turn=2, weight=0.5), Trajectory(QUESTION)]
    assert [from_json(to_json(record)) for record in records] == records
    assert [json.loads(to_json(record))["turn"] for record in records] == [3, 1, 3, 0]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(to_json(record) + "\n" for record in records), encoding="utf-8", newline="")
    found = Records(path)
    assert list(found) == records
    assert (len(found), found[2], found[0], found[-1]) == (4, records[2], records[0], records[-1])
    with pytest.raises(IndexError):
        found[4]
