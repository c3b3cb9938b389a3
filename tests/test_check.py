"""``python -m stasc check``: the program rehearsed on few questions, and what follows for the whole run."""

import re
from types import SimpleNamespace

import pytest
from conftest import tiny_model

from callbacks.measurement import STEPS, Measurement, few, longest_example, longest_examples
from data import demo
from data.trajectories import Batches
from stasc.algorithm import STaR, STaSC
from stasc.answers import WholeCompletion
from stasc.errors import UserError
from stasc.experiment import Evaluation, Experiment
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message
from stasc.reward import InAccuracy
from stasc.run import Run
from stasc.sampling import Sampling, TransformersSampler
from stasc.score import SCoRe
from stasc.training.batches import CorrectionBatches
from stasc.trajectory import Question

PROMPTS = {
    "initial": [Message("user", "{question}")],
    "correction": [Message("user", "{question} Is it {initial_answer}?")],
    "rationalization": [Message("user", "{question}|{reference}")],
}
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=40)


@pytest.fixture
def experiment(tmp_path):
    """An experiment of a tiny model that starts no engine."""

    def make(algorithm) -> Experiment:
        base = ModelFolder.locate(str(tiny_model(tmp_path / "model")))
        dialogue = Dialogue(base.tokenizer(), PROMPTS)
        questions = [Question(f"{i}", f"What is {i}?", ("a",)) for i in range(4)]
        return Experiment(
            algorithm=algorithm,
            sampler=TransformersSampler(),
            dialogue=dialogue,
            training_dialogue=dialogue,
            answer=WholeCompletion(),
            reward=InAccuracy(),
            questions={"train": questions},
            sampling=SAMPLING,
            evaluation=Evaluation(SAMPLING),
            base=base,
            run=Run(tmp_path / "run"),
            seed=1,
        )

    return make


def cut(experiment: Experiment, batches: Batches, ranks: int = 1) -> tuple[list[int], list[int]]:
    """Tokens of the made-up examples, and of the micro-batches they make."""
    examples = longest_examples(experiment, batches, ranks)
    assert len(examples) == STEPS * batches.size
    render = experiment.training_dialogue.example
    options = {"token_budget": batches.token_budget, "prefix_sharing": batches.prefix_sharing}
    dataset = CorrectionBatches(examples, render, batches.size, seed=1, ranks=ranks, **options)
    lengths = [sum(map(len, render(example))) for example in examples]
    return lengths, [dataset[i].input_ids.numel() for i in range(len(dataset))]


def test_the_longest_examples_are_as_long_as_the_engine_reckons_with(experiment):
    made = experiment(STaSC("EIE"))
    assert longest_example(made) == (made.context, 2, "correction")
    lengths, sizes = cut(made, Batches(size=4))
    assert made.context - 3 < min(lengths) <= max(lengths) <= made.context  # " so" is three tokens here
    assert len(sizes) == STEPS  # all of a step fits into one micro-batch


def test_an_on_policy_system_is_not_rehearsed(experiment, tmp_path):
    made = experiment(SCoRe(stage_one=1, stage_two=0, updates_per_iteration=1, questions=2))
    trainer = SimpleNamespace(datamodule=SimpleNamespace(experiment=made))
    with pytest.raises(UserError, match="check does not rehearse on-policy systems, and SCoRe is one: start"):
        Measurement(str(tmp_path), 1).setup(trainer, None, "fit")


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_where_they_do_not_fit_they_fill_the_token_budget(experiment, prefix_sharing, ranks):
    made = experiment(STaSC("EIE"))
    budget = int(2.5 * made.context)
    batches = Batches(size=16, token_budget=budget, prefix_sharing=prefix_sharing)
    lengths, sizes = cut(made, batches, ranks)
    assert max(lengths) < made.context
    assert len(set(lengths)) <= 3
    assert 0.9 * budget < max(sizes) <= budget


def test_a_system_that_learns_first_answers_gets_the_longest_of_those(experiment):
    made = experiment(STaR())
    tokens, turn, prompt = longest_example(made)
    assert (turn, prompt) == (1, "initial")
    lengths, _ = cut(made, Batches(size=4))
    assert set(lengths) == {tokens}


def test_few_questions_have_the_longest_among_them():
    questions = [Question(str(i), "x" * length) for i, length in enumerate((1, 2, 9, 3))]
    assert [question.id for question in few(questions, 2)] == ["2", "0"]
    assert len(few(questions, 9)) == 4


def rehearsal(run, *options: object) -> tuple[object, ...]:
    return (
        *("check", "--config", "configs/quickstart.yaml", "--run_dir", run),
        *("--sampler", "TransformersSampler", "--data.batches.size", 4, *options),
    )


@pytest.mark.slow
def test_a_rehearsal_tells_what_the_whole_run_takes(stasc, tmp_path):
    process = stasc(*rehearsal(tmp_path / "run", "--data.validation", 0.2, "--data.evaluation.test_every", 2))
    assert process.returncode == 0, process.stdout + process.stderr
    report = process.stdout
    assert max(map(len, report.splitlines()[1:])) <= 100
    for phase in ("start: model and engine", "sample and score", "train on D_1", "new weights, probe"):
        assert re.search(rf"^\| {phase} +\| +\d+\.\d \| +0\.\d+ \|", report, re.MULTILINE), phase
    assert "start again, resume" in report
    # 400 questions x 2 answers x (1 + 2) turns x 5 iterations; M_0 to M_5 on 100 validation questions; M_0,
    # M_2, M_4, M_5 on 500 test questions: each with an answer and a correction.
    assert f"{400 * 2 * 3 * 5 + 6 * 100 * 2 + 4 * 500 * 2:,} completions" in report
    examples = int(re.search(r"D_1 has (\d+) examples of 64 trajectories", report)[1])
    assert f"{-(-examples * 25 // 4) * 5} or {5 * 400:,} steps" in report
    assert re.search(r"^- 0 of 16 draws differ", report, re.MULTILINE)
    assert not list(tmp_path.iterdir()), "the rehearsal left something"
    assert "check: start 2" in process.stderr


@pytest.mark.slow
def test_what_does_not_run_is_told_with_what_to_change(stasc, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("STASC_CACHE", str(cache))
    process = stasc(*rehearsal(tmp_path / "run", "--random_weights", "--data.batches.token_budget", 50))
    assert process.returncode == 1
    [sentence] = re.findall(r"\*\*It does not run\.\*\* (.*?)\n\n", process.stdout, re.DOTALL)
    assert "data.batches.token_budget is 50" in sentence
    [folder] = tmp_path.iterdir()
    assert str(folder) in process.stdout
    assert ModelFolder(folder / "model").tensor_shapes() == ModelFolder(demo.base_model()).tensor_shapes()
