"""Turns of self-correction: who is asked, with which seeds, and what a restart or another run finds."""

from collections.abc import Iterator

import pytest
import torch
from conftest import answer, corrected, tiny_model

from stasc.algorithm import Turn
from stasc.answers import LastNumber, WholeCompletion
from stasc.errors import UserError
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message
from stasc.reward import InAccuracy, Reward
from stasc.rollout import Rollout
from stasc.sampling import Draw, Request, Sampling, TransformersSampler
from stasc.sampling.journal import Journal
from stasc.trajectory import Question, Trajectory, to_json, unanswered

PROMPTS = {
    "initial": [Message("user", "{question}")],
    "correction": [Message("user", "{question}|{initial_answer}")],
}
QUESTIONS = unanswered([Question(f"q{i}", f"Why {i}?", ("a", "b", "c")) for i in range(6)])
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
INITIAL, CORRECTION = Turn("initial", 2), Turn("correction", 3)


class Listening(TransformersSampler):
    """Remembers what it was asked, and goes down after so many answers."""

    dies_after = 10**9

    def sample(self, requests, sampling, stop_ids) -> Iterator[tuple[int, list[Draw]]]:
        self.asked = list(requests)
        for answered, drawn in enumerate(super().sample(requests, sampling, stop_ids)):
            if answered == self.dies_after:
                raise KeyboardInterrupt
            yield drawn


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def rollout(model, tmp_path):
    sampler = Listening(batch_size=4)
    sampler.start(model, device=torch.device("cpu"), context=256, log=tmp_path / "log")
    dialogue = Dialogue(ModelFolder(model).tokenizer(), PROMPTS)
    return Rollout(sampler, dialogue, WholeCompletion(), InAccuracy(), seed=1, context=256)


def test_answers_are_in_order_and_scored(rollout):
    first = rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1")
    assert [(t.question.id, t.path) for t in first] == [(f"q{i}", (j,)) for i in range(6) for j in range(2)]
    second = rollout.ask(first, CORRECTION, SAMPLING, "iteration 1")
    assert [(t.upto(1), t.path[1]) for t in second] == [(t, k) for t in first for k in range(3)]
    reward = InAccuracy()
    for trajectory in second:
        for found, prompt in zip(trajectory.answers, ("initial", "correction"), strict=True):
            assert found.prompt == prompt
            assert found.reward == reward.judge(found.text, trajectory.question)


def test_draws_follow_from_seed_stage_question_and_numbers_alone(rollout):
    first = rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1")
    assert len({t.answers[0].token_ids for t in first}) == len(first), "all draws of all questions differ"
    backwards = rollout.ask(QUESTIONS[::-1], INITIAL, SAMPLING, "iteration 1")
    assert sorted(backwards, key=lambda t: (t.question.id, t.path)) == first
    alone = rollout.ask(QUESTIONS[3:4], INITIAL, SAMPLING, "iteration 1")
    assert alone == first[6:8]
    assert rollout.ask(QUESTIONS[3:4], INITIAL, SAMPLING, "iteration 2") != alone
    rollout.seed = 2
    assert rollout.ask(QUESTIONS[3:4], INITIAL, SAMPLING, "iteration 1") != alone


def test_chains_of_one_question_get_answers_of_their_own_in_every_turn(rollout):
    chains = [
        corrected(QUESTIONS[0].question, answer("yes", number=j), answer(f"no {k}", number=k))
        for j in range(2)
        for k in range(4)
    ]
    third = rollout.ask(chains, Turn("correction"), SAMPLING, "iteration 1, round 2")
    assert [t.upto(2) for t in third] == chains
    assert [t.path for t in third] == [(j, k, 0) for j in range(2) for k in range(4)]
    assert len({t.answers[2].token_ids for t in third}) == 8
    assert len({request.seed for request in rollout.sampler.asked}) == len(rollout.sampler.asked) == 4


def test_answers_that_are_the_same_ask_once(rollout):
    chains = [Trajectory(QUESTIONS[0].question, (answer("yes", number=j),)) for j in range(2)]
    chains.insert(1, Trajectory(QUESTIONS[1].question, (answer("yes"),)))
    second = rollout.ask(chains, CORRECTION, SAMPLING, "iteration 1")
    assert [request.n for request in rollout.sampler.asked] == [6, 3]
    assert [(t.question.id, t.path) for t in second] == [
        (t.question.id, (*t.path, k)) for t in chains for k in range(3)
    ]
    assert len({t.answers[1].token_ids for t in second}) == 9, "and still all draws differ"


def test_who_is_not_asked_stays_as_he_is(rollout):
    chains = [Trajectory(q.question, (answer("a", float(i % 2)),)) for i, q in enumerate(QUESTIONS)]
    turn = Turn("correction", 2, lambda trajectory: trajectory.reward(1) == 0)
    second = rollout.ask(chains, turn, SAMPLING, "iteration 1")
    assert [t for t in second if t.turn == 1] == chains[1::2]
    assert [t.path for t in second] == [(0, 0), (0, 1), (0,)] * 3


@pytest.mark.parametrize("value", [None, float("nan"), 1.5, -0.1, "1"])
def test_a_reward_that_is_no_number_from_0_to_1_is_named_at_the_first_answer(rollout, value):
    class Mine(InAccuracy):
        def score(self, prediction, references):
            return value

    rollout.reward = Mine()
    with pytest.raises(UserError, match=r"the reward Mine gave .* for an answer to question 'q\d'"):
        rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1")


def test_the_reward_gets_the_answer_that_was_found_and_the_whole_question(rollout):
    seen = []

    class Seen(Reward):
        def judge(self, answer, question):
            seen.append((answer, question.entry["row"]))
            return 1.0

    rollout.answer, rollout.reward = LastNumber(), Seen()
    asked = [Trajectory(Question("q", "2 + 2?", entry={"row": 7}))]
    [trajectory] = rollout.ask(asked, Turn("initial"), SAMPLING, "iteration 1")
    assert seen == [(LastNumber().find(trajectory.answers[0].text), 7)]
    assert "entry" not in to_json(trajectory)


# ---------------------------------------------------------------- draws on disk


def journals(folder, source="M_0", others=()):
    return lambda stage: Journal(folder, stage, 0, source, others)


def test_a_restart_asks_only_for_what_is_missing_and_ends_the_same(rollout, tmp_path):
    rollout.sampler.dies_after = 4
    with pytest.raises(KeyboardInterrupt):
        rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1", journals(tmp_path))
    (journal,) = tmp_path.glob("iteration-1*")
    journal.write_bytes(journal.read_bytes()[:-7])  # the kill came while the last line was written
    rollout.sampler.dies_after = 10**9
    resumed = rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1", journals(tmp_path))
    assert len(rollout.sampler.asked) == len(QUESTIONS) - 3
    assert resumed == rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1")


def test_another_run_takes_what_answers_its_requests_and_asks_for_the_rest(rollout, tmp_path):
    rollout.ask(QUESTIONS[:4], Turn("initial", 2), SAMPLING, "iteration 1", journals(tmp_path / "a"))
    more = Turn("initial", 5)
    taken = rollout.ask(
        QUESTIONS, more, SAMPLING, "iteration 1", journals(tmp_path / "b", others=[tmp_path / "a"])
    )
    assert [request.n for request in rollout.sampler.asked] == [3, 3, 3, 3, 5, 5]
    assert taken == rollout.ask(QUESTIONS, more, SAMPLING, "iteration 1")
    rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1", journals(tmp_path / "b"))
    assert rollout.sampler.asked == [], "fewer draws are the first of more"


@pytest.mark.parametrize("change", ["source", "stage", "seed", "question"])
def test_nothing_is_taken_where_a_draw_would_follow_from_something_else(rollout, tmp_path, change):
    rollout.ask(QUESTIONS, INITIAL, SAMPLING, "iteration 1", journals(tmp_path))
    rollout.seed += change == "seed"
    asked = unanswered([Question("q0", "Why?", ("a",))]) if change == "question" else QUESTIONS[:1]
    stage = "iteration 2" if change == "stage" else "iteration 1"
    source = "M_1" if change == "source" else "M_0"
    others = journals(tmp_path / "other", source, [tmp_path])
    rollout.ask(asked, INITIAL, SAMPLING, stage, others)
    assert len(rollout.sampler.asked) == 1


def test_the_journals_of_all_processes_are_read_and_the_longest_answer_counts(tmp_path):
    requests = [Request((1, 2), 2, seed) for seed in (70, 80, 90)]
    draws = [Draw((1, 5), True), Draw((), False)]
    for rank, request in enumerate(requests):
        Journal(tmp_path, "M_0 on test: corrections", rank, "M_0").add(request, draws)
    Journal(tmp_path, "M_0 on test: corrections", 7, "M_0").add(requests[1], draws[:1])
    found = Journal(tmp_path, "M_0 on test: corrections", 0, "M_0").read(requests)
    assert found == dict.fromkeys(range(3), draws)


def test_a_prompt_that_grew_too_long_is_named(rollout):
    long = Trajectory(QUESTIONS[2].question, (answer("x" * 300, finished=False),))
    with pytest.raises(UserError, match="question 'q2': with the answers in it the correction prompt is"):
        rollout.ask([long], CORRECTION, SAMPLING, "iteration 1")
