"""The choices of every system, and the filters against their definitions."""

import itertools
import random
import re

import pytest
from conftest import ROOT, answer, corrected

from stasc.algorithm import VARIANTS, Reflexion, SelfRefine, STaR, STaSC
from stasc.errors import UserError
from stasc.filtering import improves, stays_right
from stasc.run import START, first_use
from stasc.trajectory import Question, Trajectory

QUESTION = Question("q1", "Where?", ("France",))
REWARDS = [(r1, r2) for r1 in (0.0, 0.5, 1.0) for r2 in (0.0, 0.5, 1.0)]


def trajectory(r1: float, r2: float) -> Trajectory:
    return corrected(QUESTION, answer("a", r1), answer("b", r2))


def kept(algorithm, trajectories) -> list[tuple[float, ...]]:
    return [tuple(a.reward for a in e.trajectory.answers) for e in algorithm.select(1, trajectories)]


def test_there_are_eight_variants_in_the_order_of_the_papers_table():
    assert VARIANTS == ("FIF", "FIE", "FNF", "FNE", "EIF", "EIE", "ENF", "ENE")


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


def test_turns_are_an_initial_answer_and_its_corrections():
    algorithm = STaSC(n_init=3, n_corr=5, rounds=2)
    assert [(turn.prompt, turn.samples) for turn in algorithm.turns] == [("initial", 3), ("correction", 5)]
    asked = [(turn.prompt, turn.samples) for turn in algorithm.test_turns(4)]
    assert asked == [("initial", 4), ("correction", 1), ("correction", 1)]
    assert algorithm.learns == {"correction"}


def test_improving_keeps_strict_gains_and_non_decreasing_also_what_stays_right():
    trajectories = [trajectory(r1, r2) for r1, r2 in REWARDS]
    assert kept(STaSC("EIE"), trajectories) == [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0)]
    assert kept(STaSC("ENE"), trajectories) == [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]
    low = kept(STaSC("ENE", threshold=0.5), trajectories)
    assert low == [(0.0, 0.5), (0.0, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    assert kept(STaSC("ENE", only_equal=True), trajectories) == [(1.0, 1.0)]
    assert not any(improves(t) and stays_right(t, 0.0) for t in trajectories)


def test_an_answer_that_was_not_corrected_is_no_correction_to_learn():
    assert kept(STaSC("ENE"), [Trajectory(QUESTION, (answer("a", 1.0),))]) == []


def test_what_is_learnt_is_the_correction_with_weight_one():
    (example,) = STaSC().select(1, [trajectory(0, 1)])
    assert (example.turn, example.prompt, example.weight) == (2, "correction", 1.0)


@pytest.mark.parametrize("variant", ["EIF", "ENF"])
def test_as_released_the_retained_set_is_that_of_the_releases_rule(variant):
    rng = random.Random(0)
    trajectories = [
        corrected(Question(f"{q}", "?", ("a",)), answer(f"first {j}", r1, j), answer(f"{j}.{k}", r2, k))
        for q in range(40)
        for j in range(3)
        for r1 in [float(rng.random() < 0.5)]
        for k in range(2)
        for r2 in [float(rng.random() < 0.5)]
    ]
    expected = set()  # every initial answer with every correction; D+ or, for Non-decreasing, D= alone
    for q in range(40):
        of_question = [t for t in trajectories if t.question.id == f"{q}"]
        for first, second in itertools.product(of_question, of_question):
            r1, r2 = first.reward(1), second.reward(2)
            if r1 < r2 if variant == "EIF" else r1 == r2 == 1:
                expected.add((f"{q}", first.after(1).text, second.after(2).text))
    found = [e.trajectory for e in STaSC(variant, pair_all=True, only_equal=True).select(1, trajectories)]
    pairs = [(t.question.id, t.after(1).text, t.after(2).text) for t in found]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected
    assert len({(t.question.id, t.path) for t in found}) == len(found)
    assert len(expected) > len(list(STaSC(variant, only_equal=True).select(1, trajectories)))


def test_star_keeps_what_ends_right_as_a_first_answer_and_always_starts_from_m0():
    algorithm = STaR(n_corr=2)
    alone = Trajectory(QUESTION, (answer("a", 1.0),))
    examples = list(algorithm.select(1, [*(trajectory(0, r2) for r2 in (0, 1)), alone]))
    assert [(e.trajectory.turn, e.turn, e.prompt) for e in examples] == [(2, 2, "initial"), (1, 1, "initial")]
    assert [(algorithm.initial_model(n), algorithm.base_model(n)) for n in (1, 4)] == [(0, 0), (3, 0)]
    hinted = algorithm.turns[1]
    assert (hinted.prompt, hinted.samples, hinted.asks(alone)) == ("rationalization", 2, False)
    assert hinted.asks(Trajectory(QUESTION, (answer("a", 0.0),)))
    assert [turn.prompt for turn in STaR(n_corr=0).turns] == ["initial"]
    assert algorithm.learns == {"initial"}


def test_only_the_oracle_asks_the_reward_before_it_goes_on():
    right, wrong = (Trajectory(QUESTION, (answer("a", r),)) for r in (1.0, 0.0))
    for system, asked in ((SelfRefine(), [True, True]), (Reflexion(), [False, True])):
        for turn in system.test_turns(1)[1:]:
            assert [turn.asks(t) for t in (right, wrong)] == asked
    assert (SelfRefine().iterations, len(Reflexion(rounds=5).test_turns(1))) == (0, 6)
    assert [system.uses_references for system in (STaSC(), SelfRefine(), Reflexion())] == [False, False, True]


def test_the_docs_own_system():
    page = (ROOT / "docs/own_system.md").read_text()
    code = re.search(r'```python title="third_look.py"\n(.*?)```', page, re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    system = scope["ThirdLook"](n_init=2)
    assert [turn.prompt for turn in system.turns] == ["initial", "correction", "third_look"]
    chain = [answer("a", 1.0), answer("b", 0.0), answer("c", 1.0)]
    trajectories = [corrected(QUESTION, *chain[:length]) for length in (2, 3)]
    assert [system.turns[2].asks(trajectory) for trajectory in trajectories] == [True, False]
    learnt = [(example.answer.text, example.weight) for example in system.select(1, trajectories)]
    assert learnt == [("c", 1.0), ("b", -0.2)]


def test_more_iterations_matter_after_those_that_are_done():
    for before, now in ((2, 5), (5, 2)):
        assert first_use(STaSC.first_uses, "iterations", before, now).files == ("iteration-03",)
    assert first_use(STaSC.first_uses, "iterations", 2, None) is START
    assert first_use(STaSC.first_uses, "n_init", 1, 2) is START
    assert first_use(STaSC.first_uses, "an option of a user's system", 1, 2) is START
