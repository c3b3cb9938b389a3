"""Both turns of self-correction: who asks what, with which seeds, and what a restart finds."""

from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_model

from stasc.errors import UserError
from stasc.journal import Journal
from stasc.pretrained import load_tokenizer
from stasc.prompting import Dialogue, Message, Prompts
from stasc.reward import InAccuracy
from stasc.rollout import Rollout
from stasc.sampling import Draw, Request, Sampling, TransformersSampler
from stasc.trajectory import Completion, InitialAnswer, Question

PROMPTS = Prompts([Message("user", "{question}")], [Message("user", "{question}|{initial_answer}")])
QUESTIONS = [Question(f"q{i}", f"Why {i}?", ("a", "b", "c")) for i in range(6)]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)


class Listening(TransformersSampler):
    """Remembers what it was asked, and goes down after so many answers."""

    dies_after = 10**9

    def sample(self, requests, sampling, stop_ids) -> Iterator[tuple[int, list[Draw]]]:
        self.asked = list(requests)
        for answered, answer in enumerate(super().sample(requests, sampling, stop_ids)):
            if answered == self.dies_after:
                raise KeyboardInterrupt
            yield answer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def rollout(model, tmp_path):
    sampler = Listening(batch_size=4)
    sampler.start(model, device=torch.device("cpu"), context=256, log=tmp_path / "log")
    dialogue = Dialogue(load_tokenizer(model), PROMPTS)
    return Rollout(sampler, dialogue, InAccuracy(), seed=1, context=256, journals=tmp_path / "journals")


def test_records_are_in_order_and_scored(rollout):
    answers = rollout.initial_answers(QUESTIONS, 2, SAMPLING, "iteration 1")
    assert [(a.question.id, a.j) for a in answers] == [(f"q{i}", j) for i in range(6) for j in range(2)]
    trajectories = rollout.corrections(answers, 3, SAMPLING, "iteration 1")
    expected = [(a.question, a.j, k, a.initial, a.r1) for a in answers for k in range(3)]
    assert [(t.question, t.j, t.k, t.initial, t.r1) for t in trajectories] == expected
    reward = InAccuracy()
    assert all(t.r2 == reward(t.correction.text, t.question.references) for t in trajectories)


def test_draws_follow_from_seed_stage_question_and_number_alone(rollout):
    answers = rollout.initial_answers(QUESTIONS, 2, SAMPLING, "iteration 1")
    assert len({a.initial.token_ids for a in answers}) == len(answers), "all draws of all questions differ"
    backwards = rollout.initial_answers(QUESTIONS[::-1], 2, SAMPLING, "iteration 1")
    assert sorted(backwards, key=lambda a: (a.question.id, a.j)) == answers
    alone = rollout.initial_answers(QUESTIONS[3:4], 2, SAMPLING, "iteration 1")
    assert alone == answers[6:8]
    assert rollout.initial_answers(QUESTIONS[3:4], 2, SAMPLING, "iteration 2") != alone
    rollout.seed = 2
    assert rollout.initial_answers(QUESTIONS[3:4], 2, SAMPLING, "iteration 1") != alone


def test_initial_answers_that_say_the_same_ask_once(rollout):
    same = Completion("yes", (1, 2), True)
    answers = [InitialAnswer(QUESTIONS[0], j, same, 0.0) for j in range(2)]
    answers.insert(1, InitialAnswer(QUESTIONS[1], 0, same, 0.0))
    trajectories = rollout.corrections(answers, 3, SAMPLING, "iteration 1")
    assert [request.n for request in rollout.sampler.asked] == [6, 3]
    assert [(t.question.id, t.j, t.k) for t in trajectories] == [
        (a.question.id, a.j, k) for a in answers for k in range(3)
    ]
    assert len({t.correction.token_ids for t in trajectories}) == 9, "and still all draws differ"


def test_a_restart_asks_only_for_what_is_missing_and_ends_the_same(rollout, tmp_path):
    rollout.sampler.dies_after = 4
    with pytest.raises(KeyboardInterrupt):
        rollout.initial_answers(QUESTIONS, 2, SAMPLING, "iteration 1")
    (journal,) = (tmp_path / "journals").glob("iteration-1*")
    journal.write_bytes(journal.read_bytes()[:-7])  # the kill came while the last line was written
    rollout.sampler.dies_after = 10**9
    resumed = rollout.initial_answers(QUESTIONS, 2, SAMPLING, "iteration 1")
    assert len(rollout.sampler.asked) == len(QUESTIONS) - 3
    rollout.journals = None
    assert resumed == rollout.initial_answers(QUESTIONS, 2, SAMPLING, "iteration 1")


def test_a_restart_reads_the_journals_of_all_processes(tmp_path):
    requests = [Request((1, 2), 2, seed) for seed in (70, 80, 90)]
    draws = {rank: [Draw((rank, 5), True), Draw((), False)] for rank in range(3)}
    for rank, request in enumerate(requests):
        Journal(tmp_path, "M_0 on test: corrections", rank).add(rank, request, draws[rank])
    Journal(tmp_path, "M_1 on test: corrections", 0).add(1, requests[1], draws[0])
    assert Journal(tmp_path, "M_0 on test: corrections", 0).read(requests) == draws
    others = [requests[0], Request((1, 2), 2, 81)]
    assert Journal(tmp_path, "M_0 on test: corrections", 0).read(others) == {0: draws[0]}


def test_a_correction_prompt_that_grew_too_long_is_named(rollout):
    answer = InitialAnswer(QUESTIONS[2], 0, Completion("x" * 300, (), False), 0.0)
    with pytest.raises(UserError, match="question 'q2': with its initial answer the correction prompt is"):
        rollout.corrections([answer], 1, SAMPLING, "iteration 1")
