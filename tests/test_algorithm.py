"""The choices of every system, the filters against their definitions, and the records' files."""

import itertools
import random

import pytest

from stasc.algorithm import Reflexion, SelfRefine, STaR, STaSC
from stasc.errors import UserError
from stasc.filtering import improves, stays_right
from stasc.trajectory import (
    Completion,
    InitialAnswer,
    Question,
    Records,
    Trajectory,
    from_json,
    read_records,
    to_json,
)

QUESTION = Question("q1", "Où est “Paris”?\n", ("France", "la France"))
SAID = Completion("Final Answer: Fränce\n", (5, 6, 7), True)


def trajectory(r1: float, r2: float) -> Trajectory:
    return Trajectory(QUESTION, 0, 0, SAID, SAID, r1, r2)


def kept(algorithm, trajectories) -> list[tuple[float, float]]:
    return [(t.r1, t.r2) for t in algorithm.select(trajectories)]


@pytest.mark.parametrize("letters", list(itertools.product("EF", "IN", "EF")))
def test_letters_are_initialisation_filter_and_finetuning(letters):
    algorithm = STaSC("".join(letters))
    assert [algorithm.initial_model(n) for n in (1, 2, 5)] == ([0, 1, 4] if letters[0] == "E" else [0, 0, 0])
    assert bool(kept(algorithm, [trajectory(1, 1)])) == (letters[1] == "N")
    assert [algorithm.base_model(n) for n in (1, 2, 5)] == ([0, 1, 4] if letters[2] == "E" else [0, 0, 0])


@pytest.mark.parametrize(("size", "least"), [("iterations", 0), ("n_init", 1), ("n_corr", 0), ("epochs", 1)])
def test_sizes_have_a_least_value(size, least):
    with pytest.raises(UserError, match=rf"algorithm\.{size} is {least - 1}: it must be {least} or more"):
        STaSC(**{size: least - 1})


def test_stasc_without_corrections_is_refused():
    with pytest.raises(UserError, match=r"algorithm\.n_corr is 0: without corrections"):
        STaSC(n_corr=0)


def test_iterations_are_counted_from_the_epochs_done():
    algorithm = STaSC(iterations=3, epochs=2)
    assert [algorithm.iteration(done) for done in range(8)] == [1, 1, 2, 2, 3, 3, 3, 3]


def test_improving_keeps_strict_gains_and_non_decreasing_also_what_stays_right():
    rewards = [(r1, r2) for r1 in (0.0, 0.5, 1.0) for r2 in (0.0, 0.5, 1.0)]
    trajectories = [trajectory(r1, r2) for r1, r2 in rewards]
    assert kept(STaSC("EIE"), trajectories) == [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0)]
    assert kept(STaSC("ENE"), trajectories) == [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]
    low = kept(STaSC("ENE", threshold=0.5), trajectories)
    assert low == [(0.0, 0.5), (0.0, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    assert kept(STaSC("ENE", only_equal=True), trajectories) == [(1.0, 1.0)]
    assert not any(improves(t) and stays_right(t, 0.0) for t in trajectories)


@pytest.mark.parametrize("variant", ["EIF", "ENF"])
def test_as_released_the_retained_set_is_that_of_the_releases_rule(variant):
    rng = random.Random(0)
    said = {j: Completion(f"first {j}", (j,), True) for j in range(3)}
    trajectories = [
        Trajectory(Question(f"{q}", "?", ("a",)), j, k, said[j], Completion(f"{j}.{k}", (9,), True), r1, r2)
        for q in range(40)
        for j in range(3)
        for r1 in [float(rng.random() < 0.5)]
        for k in range(2)
        for r2 in [float(rng.random() < 0.5)]
    ]
    expected = set()  # every initial answer with every correction; D+ or, for Non-decreasing, D= alone
    for q in range(40):
        own = [t for t in trajectories if t.question.id == f"{q}"]
        for first, second in itertools.product(own, own):
            good = first.r1 < second.r2 if variant == "EIF" else first.r1 == second.r2 == 1
            if good:
                expected.add((f"{q}", first.initial.text, second.correction.text))
    found = list(STaSC(variant, pair_all=True, only_equal=True).select(trajectories))
    pairs = [(t.question.id, t.initial.text, t.correction.text) for t in found]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected
    assert len({(t.question.id, t.j, t.k) for t in found}) == len(found)
    assert len(expected) > len(list(STaSC(variant, only_equal=True).select(trajectories)))


def test_star_keeps_what_ends_right_and_always_starts_from_m0():
    algorithm = STaR(n_corr=0)
    trajectories = [trajectory(r1, r2) for r1 in (0, 1) for r2 in (0, 1)]
    assert kept(algorithm, trajectories) == [(0, 1), (1, 1)]
    assert [(algorithm.initial_model(n), algorithm.base_model(n)) for n in (1, 4)] == [(0, 0), (3, 0)]
    assert algorithm.prompts == ("initial", "correction")
    assert STaR(n_corr=1).prompts == ("initial", "correction", "rationalization")


def test_only_the_oracle_asks_the_reward_before_it_goes_on():
    right, wrong = (InitialAnswer(QUESTION, 0, SAID, r) for r in (1.0, 0.0))
    assert [SelfRefine().asks_again(a) for a in (right, wrong)] == [True, True]
    assert [Reflexion().asks_again(a) for a in (right, wrong)] == [False, True]
    assert (SelfRefine().iterations, Reflexion(rounds=5).rounds) == (0, 5)


def test_records_come_back_from_their_files(tmp_path):
    records = [trajectory(0.0, 1.0), InitialAnswer(QUESTION, 3, SAID, 0.25), trajectory(1.0, 0.5)]
    assert [from_json(to_json(record)) for record in records] == records
    path = tmp_path / "records.jsonl"
    path.write_text("".join(to_json(record) + "\n" for record in records), encoding="utf-8")
    assert read_records(path) == records
    found = Records(path)
    assert (len(found), found[2], found[0], found[-1]) == (3, records[2], records[0], records[2])
    with pytest.raises(IndexError):
        found[3]
