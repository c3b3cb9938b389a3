"""The stages of Algorithm 1 without Lightning: what each is made of, and what is found before they begin."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from stasc.algorithm import SelfRefine, STaR, STaSC
from stasc.answers import WholeCompletion
from stasc.errors import UserError
from stasc.experiment import Evaluation, Experiment
from stasc.metrics import chosen
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message
from stasc.provenance import fingerprint
from stasc.reward import Reward
from stasc.run import Run, read_json, write_json
from stasc.sampling import Sampling, TransformersSampler
from stasc.sampling.probe import Probe
from stasc.score import SCoRe
from stasc.trajectory import Question

PROMPTS = {
    "initial": [Message("user", "{question}")],
    "correction": [Message("user", "{question}|{initial_answer}")],
    "rationalization": [Message("user", "{question}|{reference}")],
}
QUESTIONS = {
    name: [Question(f"{name}-{i}", f"{name} {i}?", ("a",)) for i in range(5)] for name in ("train", "test")
}
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=6)


class Parity(Reward):
    """Of the characters' codes, so that a random model is right half of the time."""

    def score(self, prediction, references) -> float:
        return float(sum(map(ord, prediction)) % 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelFolder:
    return ModelFolder.locate(str(tiny_model(tmp_path_factory.mktemp("model") / "m", context=256)))


@pytest.fixture
def make(model, tmp_path):
    """Makes an experiment; what is given replaces the defaults."""

    def experiment(algorithm, prompts=PROMPTS, started: bool = True, **others) -> Experiment:
        dialogue = Dialogue(model.tokenizer(), prompts)
        parts = {
            "algorithm": algorithm,
            "sampler": TransformersSampler(),
            "dialogue": dialogue,
            "training_dialogue": dialogue,
            "answer": WholeCompletion(),
            "reward": Parity(),
            "questions": QUESTIONS,
            "sampling": SAMPLING,
            "evaluation": Evaluation(SAMPLING),
            "base": model,
            "run": Run(tmp_path / "run"),
            "seed": 1,
        }
        made = Experiment(**(parts | others))
        if started:
            made.start(torch.device("cpu"), tmp_path / "log")
        return made

    return experiment


def test_an_iteration_is_steps_1_to_3_and_is_made_once(make):
    experiment = make(STaSC("ENE", n_init=2, n_corr=2))
    dataset = experiment.dataset(1)
    trajectories = list(experiment.trajectories(1))
    assert [t.path for t in trajectories] == [(j, k) for _ in range(5) for j in range(2) for k in range(2)]
    right = [t for t in trajectories if t.reward(2) == 1]
    assert [example.trajectory for example in dataset] == right
    assert 0 < len(right) < len(trajectories)
    files = experiment.run.iteration(1)
    assert {path.name for path in files.folder.iterdir()} == {
        *("initial.jsonl", "trajectories.jsonl", "dataset.jsonl", "lines.json")
    }
    experiment.sampler.sample = None  # what is done is read
    assert list(experiment.dataset(1)) == list(dataset)
    files.dataset.write_text("")  # as it would be if nothing had been selected
    with pytest.raises(
        UserError, match=rf"dataset\.jsonl has 0 lines, and {len(right)} were written: remove"
    ):
        experiment.dataset(1)
    files.dataset.write_text("{}\n" * len(right))
    with pytest.raises(UserError, match=r"dataset\.jsonl, line 1: this is no record"):
        list(experiment.dataset(1))


@pytest.mark.parametrize(("variant", "base"), [("EIE", 3), ("EIF", 0), ("FIE", 3)])
def test_step_4_starts_from_the_model_of_the_policy(make, variant, base):
    assert make(STaSC(variant), started=False).base_model(4) == base


def test_fixed_initialisation_reads_the_answers_of_m0_in_every_iteration(make):
    experiment = make(STaSC("FIF"))
    first = list(experiment.initial_answers(1))
    experiment.sampler.sample = None
    assert list(experiment.initial_answers(7)) == first


def test_evaluation_writes_its_metrics_and_every_round(make):
    experiment = make(SelfRefine(rounds=3), evaluation=Evaluation(SAMPLING, samples=2, greedy=True))
    metrics = experiment.evaluate(0)
    names = {"test.jsonl", "test-turn-3.jsonl", "test-turn-4.jsonl", "test-greedy.jsonl", "metrics.json"}
    assert {path.name for path in experiment.run.iteration(0).folder.iterdir()} == names | {"lines.json"}
    assert set(metrics) == {"iteration", "test", "samples", "rounds", "greedy", "measured"}
    questions = {"test": fingerprint(QUESTIONS["test"])}
    assert metrics["measured"] == {"model": "M_0", "config": "../config.yaml", "questions": questions}
    rounds, again = experiment.test()
    assert [len(trajectories) for trajectories in rounds] == [10, 10, 10]
    assert set(again) == set(metrics) - {"iteration"}


def test_validation_questions_choose_the_model_and_the_test_set_waits(make):
    validation = [Question(f"v{i}", f"validation {i}?", ("a",)) for i in range(20)]
    evaluation = Evaluation(SAMPLING, test_every=3)
    experiment = make(
        SelfRefine(rounds=3), evaluation=evaluation, questions={**QUESTIONS, "validation": validation}
    )
    metrics = experiment.evaluate(0)
    assert set(metrics["validation"]) == set(metrics["test"])
    assert metrics["validation"]["count"] == 20
    assert set(metrics) == {"iteration", "validation", "test", "rounds", "measured"}
    assert metrics["measured"]["questions"] == {
        "validation": fingerprint(validation),
        "test": fingerprint(QUESTIONS["test"]),
    }
    validated, found = experiment.validate()
    assert len(validated[0]) == 20
    assert set(found) == {"validation", "measured"}


def iterations_with_validation(*rewards: float) -> list[dict]:
    return [{"iteration": n, "validation": {"r2": reward}} for n, reward in enumerate(rewards)]


@pytest.mark.parametrize(("rewards", "best"), [((0.1, 0.4, 0.3), 1), ((0.4, 0.2, 0.4), 0), ((0.5,), 0)])
def test_the_first_of_the_best_on_validation_is_chosen(rewards, best):
    assert chosen(iterations_with_validation(*rewards)) == best


def test_the_chosen_model_is_tested_if_it_was_not(make):
    """M_1 and M_2 are M_0's folder again, as after two empty D_n, but M_1 is given the best validation."""
    experiment = make(
        STaSC("EIE", iterations=2),
        evaluation=Evaluation(SAMPLING, test_every=2),
        questions={**QUESTIONS, "validation": QUESTIONS["test"]},
    )
    experiment.model_folder = lambda n: experiment.base.path
    experiment.load = lambda n: None
    for n in (1, 2):
        write_json(
            experiment.run.iteration(n).training, {"train": {}, "dataset": {"size": 0}, "training": {}}
        )
    assert ["test" in experiment.evaluate(n) for n in range(3)] == [True, False, True]
    path = experiment.run.iteration(1).metrics
    before = read_json(path)
    write_json(path, {**before, "validation": before["validation"] | {"r2": 1.0}})
    assert experiment.choose() == 1
    after = read_json(path)
    assert after["test"]["count"] == 5
    assert set(after) == {*before, "test"}
    assert make(STaSC("EIE"), started=False).choose() is None


def test_an_engine_that_keeps_its_model_is_found_where_half_precision_rounds(make, model, tmp_path):
    """Its M_1 is only 0.01 off M_0, and so are the log-probabilities of an engine that still holds M_0."""
    shutil.copytree(model.path, tmp_path / "half")
    config = json.loads((tmp_path / "half/config.json").read_text())
    (tmp_path / "half/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    experiment = make(STaSC("EIE"), base=ModelFolder(tmp_path / "half"))
    shutil.copytree(tmp_path / "half", experiment.model_folder(1))
    sequences = [list(range(1, 100))]
    [scores] = experiment.sampler.log_probabilities(sequences)
    for n in (0, 1):
        probe = Probe(sequences, [[score + 0.01 * n for score in scores]])
        probe.write(experiment.run.iteration(n).probe)
    with pytest.raises(UserError, match=r"does not hold .*iteration-01/model but the model before it"):
        experiment.load(1)


def test_draws_of_m0_stay_for_other_runs_and_those_of_others_do_not(make, tmp_path):
    experiment = make(STaSC(n_init=2))
    experiment.dataset(1)
    draws = experiment.run.draws
    assert sorted(path.name for path in (draws / "M_0").iterdir()) == [
        "iteration-1-corrections.0.jsonl",
        "iteration-1-initial-answers.0.jsonl",
    ]
    assert not (draws / "under-way").exists()
    other = make(STaR(n_init=2), run=Run(tmp_path / "other"), reuse=tmp_path)
    other.sampler.sample = lambda requests, *_: iter(()) if not requests else pytest.fail("asked again")
    assert list(other.initial_answers(1)) == list(experiment.initial_answers(1))
    changed = make(STaSC(n_init=2), run=Run(tmp_path / "changed"), reuse=tmp_path, seed=2)
    assert list(changed.initial_answers(1)) != list(experiment.initial_answers(1))
    warmer = dataclasses.replace(SAMPLING, temperature=1.5)
    asked = make(STaSC(n_init=2), run=Run(tmp_path / "warmer"), reuse=tmp_path, sampling=warmer)
    assert list(asked.initial_answers(1)) != list(experiment.initial_answers(1))


# ---------------------------------------------------------------- found before an engine starts


def test_a_hint_that_is_too_long_is_found_and_named_before_anything_is_sampled(make):
    long = Question("q9", "short?", ("x" * 300,))
    questions = {**QUESTIONS, "train": [*QUESTIONS["train"], long]}
    with pytest.raises(UserError, match=r"data\.train, question 'q9': its rationalization prompt and the"):
        make(STaR(n_corr=1), questions=questions, started=False)
    make(STaR(n_corr=0), questions=questions, started=False)


def test_prompts_that_the_algorithm_asks_or_learns_must_be_there(make, model):
    without = {name: PROMPTS[name] for name in ("initial", "correction")}
    with pytest.raises(UserError, match=r"data\.prompts has no rationalization"):
        make(STaR(n_corr=1), without, started=False)
    training = Dialogue(model.tokenizer(), {"initial": PROMPTS["initial"]})
    with pytest.raises(UserError, match=r"data\.training_prompts has no correction"):
        make(STaSC(), training_dialogue=training, started=False)
    make(STaR(n_corr=1), training_dialogue=training, started=False)


def test_draws_that_would_all_be_the_same_are_refused(make):
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    with pytest.raises(UserError, match=r"data\.sampling\.temperature is 0"):
        make(STaSC(n_corr=2), sampling=greedy, started=False)
    with pytest.raises(UserError, match=r"data\.evaluation\.sampling\.temperature is 0"):
        Evaluation(greedy, samples=2)


def test_a_place_to_reuse_that_does_not_exist_is_named(make):
    with pytest.raises(UserError, match="nowhere, which is not a folder"):
        make(STaSC(), reuse=Path("nowhere"), started=False)


def test_models_go_that_nothing_needs_any_more(make):
    class BackToTheSecond(STaSC):
        def base_model(self, n: int) -> int:
            return 1 if n == 5 else n - 1

    def stay(best: int, keep: int, algorithm: type[STaSC] = STaSC, **questions) -> list[list[int]]:
        """The models that are there after M_3 is evaluated, and after M_5."""
        experiment = make(algorithm("EIE", iterations=5), started=False, keep_models=keep, **questions)
        shutil.rmtree(experiment.run.folder, ignore_errors=True)
        found = []
        for n in range(6):
            files = experiment.run.iteration(n)
            write_json(files.metrics, {"validation": {"r2": float(n == best)}})
            if n:
                files.model.mkdir(exist_ok=True)
                (files.model / "model.safetensors").touch()
            experiment.remove_models(n)
            left = [path.parent.name for path in sorted(experiment.run.folder.glob("iteration-*/model*"))]
            found.append([int(name[-2:]) for name in left])
        assert all(experiment.run.iteration(n).metrics.is_file() for n in range(6))
        return [found[3], found[5]]

    chosen = {"questions": QUESTIONS | {"validation": QUESTIONS["test"]}}
    assert stay(2, 1, **chosen) == [[2, 3], [2, 5]]
    assert stay(2, 1) == [[3], [5]]
    assert stay(0, 3, **chosen) == [[1, 2, 3], [3, 4, 5]]
    assert stay(0, 1, BackToTheSecond) == [[1, 3], [5]]
    with pytest.raises(UserError, match="keep_models is 0: it must be 1 or more"):
        stay(0, 0)


# ---------------------------------------------------------------------- on-policy


def score(**options: int) -> SCoRe:
    """Three updates of two questions in an iteration."""
    sizes = {"stage_one": 3, "stage_two": 3, "updates_per_iteration": 3, "questions": 2}
    return SCoRe(**(sizes | options))


def test_the_updates_of_an_iteration_are_one_file_in_its_end(make):
    experiment = make(score())
    examples = [experiment.updates.sample(1, number) for number in range(3)]
    files = experiment.run.iteration(1)
    assert not files.folder.exists()
    experiment.updates.write(1)
    assert list(experiment.dataset(1)) == [example for of_one in examples for example in of_one]
    asked = [t.question.id for t in experiment.trajectories(1)]
    assert len(asked) == 6
    assert len(set(asked[:4])) == 4, "of five questions, two updates of two ask different ones"
    assert experiment.training_metrics(1)["dataset"]["size"] == sum(map(len, examples))

    again = make(score(), run=Run(experiment.run.folder / "again"))
    assert [again.updates.sample(1, number) for number in range(3)] == examples
    longer = make(score(updates_per_iteration=1), run=Run(experiment.run.folder / "longer"))
    assert [longer.updates.sample(number + 1, number) for number in range(1)] == examples[:1]


@pytest.mark.parametrize(
    ("sampling", "questions", "sentence"),
    [
        ({"top_p": 0.9}, 2, r"set data\.sampling\.top_p to 1, and data\.sampling\.temperature to 1"),
        ({"temperature": 0.0}, 2, r"data\.sampling\.temperature to 1 or at least above 0"),
        ({}, 6, r"SCoRe asks 6 questions in an update, and data\.train has 5: lower algorithm\.questions"),
    ],
)
def test_what_cannot_be_on_policy_is_refused(make, sampling, questions, sentence):
    with pytest.raises(UserError, match=sentence):
        make(score(questions=questions), sampling=dataclasses.replace(SAMPLING, **sampling))


def test_on_policy_examples_are_learnt_for_the_prompts_that_were_sampled_with(make, model):
    others = Dialogue(model.tokenizer(), PROMPTS | {"initial": [Message("user", "Well, {question}")]})
    with pytest.raises(UserError, match=r"leave data\.training_prompts out"):
        make(score(), training_dialogue=others)


def test_a_hold_on_m0_is_announced(make):
    system = score()
    system.stays_near_m0 = False
    with pytest.raises(UserError, match=r"gave an example with kl: set SCoRe\.stays_near_m0 to True"):
        make(system).updates.sample(1, 0)
