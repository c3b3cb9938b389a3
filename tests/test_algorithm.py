"""The three choices of a variant, and the filter against its definition in the paper."""

import itertools

import pytest

from stasc.algorithm import Algorithm
from stasc.errors import UserError
from stasc.filtering import improves, select, stays_right
from stasc.trajectory import (
    Completion,
    InitialAnswer,
    Question,
    Trajectory,
    from_json,
    read_records,
    to_json,
)

QUESTION = Question("q1", "Où est “Paris”?\n", ("France", "la France"))
SAID = Completion("Final Answer: Fränce\n", (5, 6, 7), True)


def trajectory(r1: float, r2: float) -> Trajectory:
    return Trajectory(QUESTION, 0, 0, SAID, SAID, r1, r2)


@pytest.mark.parametrize("letters", list(itertools.product("EF", "IN", "EF")))
def test_letters_are_initialisation_filter_and_finetuning(letters):
    algorithm = Algorithm("".join(letters))
    assert algorithm.evolving_initialization == (letters[0] == "E")
    assert algorithm.improving_filter == (letters[1] == "I")
    assert algorithm.evolving_finetuning == (letters[2] == "E")


@pytest.mark.parametrize("size", ["iterations", "n_init", "n_corr", "epochs"])
def test_sizes_start_at_one(size):
    with pytest.raises(UserError, match=rf"algorithm\.{size} is 0: it must be 1 or more"):
        Algorithm(**{size: 0})


def test_iterations_are_counted_from_the_epochs_done():
    algorithm = Algorithm(iterations=3, epochs=2)
    assert [algorithm.iteration(done) for done in range(8)] == [1, 1, 2, 2, 3, 3, 3, 3]


def test_improving_keeps_strict_gains_and_non_decreasing_also_what_stays_right():
    rewards = [(r1, r2) for r1 in (0.0, 0.5, 1.0) for r2 in (0.0, 0.5, 1.0)]
    trajectories = [trajectory(r1, r2) for r1, r2 in rewards]
    improving = select(trajectories, Algorithm("EIE"))
    assert [(t.r1, t.r2) for t in improving] == [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0)]
    lenient = select(trajectories, Algorithm("ENE"))
    assert [(t.r1, t.r2) for t in lenient] == [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]
    low = select(trajectories, Algorithm("ENE", threshold=0.5))
    assert [(t.r1, t.r2) for t in low] == [(0.0, 0.5), (0.0, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    assert not any(improves(t) and stays_right(t, 0.0) for t in trajectories)


def test_records_come_back_from_their_files(tmp_path):
    records = [trajectory(0.0, 1.0), InitialAnswer(QUESTION, 3, SAID, 0.25)]
    assert [from_json(to_json(record)) for record in records] == records
    path = tmp_path / "records.jsonl"
    path.write_text("".join(to_json(record) + "\n" for record in records), encoding="utf-8")
    assert read_records(path) == records
