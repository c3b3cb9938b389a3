"""SCoRe: its gradients against REINFORCE by enumeration, its hold on M_0 against exact divergences."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import answer, contents, corrected, curves, demo_fit
from safetensors.torch import load_file
from test_batches import gradients, model
from test_training_runs import STRATEGIES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from callbacks.curves import tag
from stasc.errors import UserError
from stasc.score import SCoRe
from stasc.training import loss
from stasc.training.batches import CorrectionBatches
from stasc.training.lora import LoRA
from stasc.training.loss import NegativeLogLikelihood, Reference
from stasc.training.module import CosineWithWarmup
from stasc.trajectory import Answer, Example, Question, Records, Trajectory

# ---------------------------------------------------------------------- advantages

HERE, THERE = Question("here", "?"), Question("there", "?")


def updates(*rewards: tuple[float, float], question: Question = HERE) -> list[Trajectory]:
    """Trajectories of one initial answer and one correction each, to a question each."""
    return [
        corrected(replace(question, id=f"{i}"), answer("a", r1), answer("b", r2))
        for i, (r1, r2) in enumerate(rewards)
    ]


def learnt(system: SCoRe, n: int, trajectories: Sequence[Trajectory]) -> dict[int, list[tuple[float, float]]]:
    """Weight and kl of the examples of each turn, in order."""
    found = {1: [], 2: []}
    for example in system.select(n, trajectories):
        assert example.prompt == {1: "initial", 2: "correction"}[example.turn]
        found[example.turn].append((example.weight, example.kl))
    return found


def stages(**options: float) -> SCoRe:
    """One iteration in each stage."""
    return SCoRe(**{"stage_one": 1, "stage_two": 1, "updates_per_iteration": 1, "questions": 2, **options})


def test_in_stage_one_corrections_earn_and_first_answers_are_held():
    found = learnt(stages(), 1, updates((1, 0), (0, 1)))
    assert found[1] == [(0, pytest.approx(0.11 / 2))] * 2
    assert found[2] == [(-0.5, 0.005), (0.5, 0.005)]


def test_in_stage_two_both_turns_earn_and_improvement_has_a_bonus():
    found = learnt(stages(), 2, updates((1, 0), (0, 1)))
    assert found[1] == [(0.5, 0.005), (-0.5, 0.005)]
    assert found[2] == [(-21 / 2, 0.005), (21 / 2, 0.005)]  # earned -10 and 11


def test_a_first_answer_can_earn_what_its_corrections_earn():
    one, two = (learnt(stages(discount=1), n, updates((1, 0), (0, 1)))[1] for n in (1, 2))
    assert [weight for weight, _ in one] == [-0.5, 0.5]
    assert [weight for weight, _ in two] == [-10, 10]  # 1 - 10 and 0 + 11, less each other


def test_several_answers_to_a_question_are_compared_with_each_other():
    chains = {HERE: [(0, 0), (0, 1), (1, 1), (1, 1)], THERE: [(0, 0)] * 4}
    trajectories = [
        corrected(question, answer("a", r1, number=i // 2), answer("b", r2, number=i % 2))
        for question, rewards in chains.items()
        for i, (r1, r2) in enumerate(rewards)
    ]
    found = learnt(stages(n_init=2, n_corr=2, alpha=0, beta1=0, beta2=0), 2, trajectories)
    assert [weight for weight, _ in found[1]] == [-0.25, 0.25]  # one of each pair of chains, of 4
    assert [weight for weight, _ in found[2]] == pytest.approx([-1 / 8, 1 / 24, 1 / 24, 1 / 24])


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_nothing_is_learnt_where_all_earn_the_same(reward):
    trajectories = updates(*[(reward, reward)] * 7)
    for n in (1, 2):
        assert not list(stages(beta1=0, beta2=0, questions=7).select(n, trajectories))
        assert {example.weight for example in stages(questions=7).select(n, trajectories)} == {0.0}


def test_stages_are_so_many_iterations_and_each_begins_with_an_optimizer():
    system = SCoRe(stage_one=4, stage_two=6, updates_per_iteration=2)
    assert (system.iterations, system.epochs) == (5, 2)
    assert [n for n in range(1, 6) if system.new_optimizer(n)] == [1, 3]
    assert not SCoRe(beta1=0, beta2=0).stays_near_m0
    assert not SCoRe(stage_one=0, beta1=0, beta2=1).stays_near_m0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stage_one": 5, "updates_per_iteration": 2}, "algorithm.stage_one is 5, which is no multiple of"),
        ({"questions": 1}, "algorithm.questions is 1: it must be 2 or more"),
        ({"alpha": -1}, "algorithm.alpha is -1: it must be 0 or more"),
        ({"beta2": math.inf}, "algorithm.beta2 is inf: it must be 0 or more, and finite"),
        ({"discount": 2}, r"algorithm.discount is 2: it must lie in \[0, 1\]"),
        ({"n_corr": 0}, "algorithm.n_corr is 0: it must be 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        SCoRe(**options)


# ---------------------------------------------------------------------- the objective, by enumeration

STOP, CORRECT = 0, 1
"""A token that ends an answer, and one that asks for a correction."""
VOCABULARY = 4
ANSWERS = [(STOP,), *itertools.product(range(1, VOCABULARY), range(VOCABULARY))]
"""All that a model can answer with two tokens at most."""
ASKED, OTHER = Question("2", "?"), Question("3", "?")


def tiny(seed: int) -> PreTrainedModel:
    """A model of a few tokens whose distributions are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=1, initializer_range=0.5, **sizes, **ids)
    return AutoModelForCausalLM.from_config(config).double()


def prompt(question: Question, *answers: tuple[int, ...]) -> list[int]:
    return [int(question.id), *itertools.chain(*((*tokens, CORRECT) for tokens in answers))]


def render(example: Example) -> tuple[list[int], list[int]]:
    *before, target = (a.token_ids for a in example.trajectory.answers[: example.turn])
    return prompt(example.trajectory.question, *before), list(target)


def scores(of: PreTrainedModel, asked: list[int], tokens: tuple[int, ...]) -> Tensor:
    """Log-probabilities of all tokens at each token of an answer, of shape [tokens, vocabulary]."""
    logits = of(input_ids=torch.tensor([[*asked, *tokens]])).logits[0, -len(tokens) - 1 : -1]
    return logits.log_softmax(-1)


def probability(of: PreTrainedModel, asked: list[int], tokens: tuple[int, ...]) -> Tensor:
    return scores(of, asked, tokens)[range(len(tokens)), tokens].sum().exp()


def divergence(of: PreTrainedModel, m0: PreTrainedModel, asked: list[int], tokens: tuple[int, ...]) -> Tensor:
    """KL(of || m0) of the next token, summed over the tokens of an answer."""
    ours, theirs = scores(of, asked, tokens), scores(m0, asked, tokens).detach()
    return (ours.exp() * (ours - theirs)).sum()


def reward(tokens: tuple[int, ...]) -> float:
    return (7 * sum(tokens) + 3 * len(tokens)) % 5 / 4


def drawn(question: Question, *answers: tuple[int, ...]) -> Trajectory:
    return corrected(question, *(answer("", reward(tokens), token_ids=tokens) for tokens in answers))


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 2])
def test_the_gradient_is_that_of_the_objective_by_enumeration(n, discount, prefix_sharing):
    system, of, m0 = stages(alpha=3, beta1=0.2, beta2=0.5, discount=discount), tiny(0), tiny(1)
    first_stage = n == 1

    # The expected gradient of an update: all that one question can be answered, beside one trajectory.
    other, examples = drawn(OTHER, (2, 1), (STOP,)), []
    for y1, y2 in itertools.product(ANSWERS, ANSWERS):
        p1, p2 = probability(of, prompt(ASKED), y1), probability(of, prompt(ASKED, y1), y2)
        share = float(p1 * p2)
        examples += [
            replace(example, weight=example.weight * share, kl=example.kl * share)
            for example in system.select(n, [drawn(ASKED, y1, y2), other])
            if example.trajectory.question == ASKED
        ]
    (batch,) = CorrectionBatches(examples, render, len(examples), seed=0, prefix_sharing=prefix_sharing)
    found = gradients(of, NegativeLogLikelihood(of)(batch, Reference(NegativeLogLikelihood(m0))))

    # The objective, with the distribution over initial answers fixed where only later tokens learn.
    objective = torch.zeros((), dtype=torch.double)
    for y1 in ANSWERS:
        p1, asked = probability(of, prompt(ASKED), y1), prompt(ASKED, y1)
        earned = torch.zeros((), dtype=torch.double)
        for y2 in ANSWERS:
            p2, r1, r2 = probability(of, asked, y2), reward(y1), reward(y2)
            earned += p2 * (r2 if first_stage else r2 + 3 * (r2 - r1))
            objective -= 0.2 * p1.detach() * p2.detach() * divergence(of, m0, asked, y2)
        itself = 0.0 if first_stage else reward(y1)
        objective += p1 * (itself + discount * earned.detach()) + p1.detach() * earned
        held = 0.7 if first_stage else 0.2
        objective -= held * p1.detach() * divergence(of, m0, prompt(ASKED), y1)
    expected = gradients(of, -objective / 2)  # a mean over the answers of two trajectories
    assert max(value.abs().max() for value in expected.values()) > 0.01
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_the_penalty_is_the_exact_divergence_of_distributions_over_answers():
    of, m0, trajectories = tiny(0), tiny(1), [drawn(ASKED, tokens) for tokens in ANSWERS]
    shares = [probability(of, prompt(ASKED), tokens).item() for tokens in ANSWERS]
    assert sum(shares) == pytest.approx(1)
    examples = [t.learn(weight=0.0, kl=share) for t, share in zip(trajectories, shares, strict=True)]
    (batch,) = CorrectionBatches(examples, render, len(examples), seed=0)
    summed = NegativeLogLikelihood(of)
    found = summed(batch, Reference(NegativeLogLikelihood(m0)))
    theirs = [probability(m0, prompt(ASKED), tokens).item() for tokens in ANSWERS]
    exact = sum(p * math.log(p / q) for p, q in zip(shares, theirs, strict=True))
    assert exact > 0.1
    assert found.item() == pytest.approx(exact, rel=1e-6)
    assert summed.penalty.item() == pytest.approx(exact, rel=1e-6)


# ---------------------------------------------------------------------- the loss of larger models

UPDATE = [
    Example(
        corrected(
            Question(f"{i % 3}", "?"),
            *(Answer("initial", 0, "", tuple(range(3 + i % 2, 9 + turn + i)), True, 0.0) for turn in (0, 1)),
        ),
        turn=1 + i % 2,
        prompt="",
        weight=(-1) ** i * i / 8,
        kl=(i % 4) / 16,
    )
    for i in range(12)
]
"""Examples of either sign, some of which share prompts; their factors are the same in float32."""


def by_number(example: Example) -> tuple[list[int], list[int]]:
    *before, target = (a.token_ids for a in example.trajectory.answers[: example.turn])
    return [40 + int(example.trajectory.question.id), *itertools.chain(*before)], list(target)


def by_the_book(of: PreTrainedModel, m0: PreTrainedModel, temperature: float = 1.0) -> Tensor:
    """The loss of the update by all logits, one example at a time."""
    summed = torch.zeros((), dtype=torch.double)
    for example in UPDATE:
        asked, target = by_number(example)
        ids = torch.tensor([[*asked, *target]])
        ours, theirs = (
            (m(input_ids=ids).logits[0, len(asked) - 1 : -1] / temperature).log_softmax(-1) for m in (of, m0)
        )
        likelihood = ours[range(len(target)), target].sum()
        held = (ours.exp() * (ours - theirs.detach())).sum()
        summed = summed - example.weight * likelihood + example.kl * held
    return summed


def batches(**options: object) -> Iterator[tuple[CorrectionBatches, int]]:
    for rank in range(options.get("ranks", 1)):
        yield from CorrectionBatches(UPDATE, by_number, len(UPDATE), seed=0, rank=rank, **options)


@pytest.mark.parametrize("config", ["qwen2", "gemma2"])  # a plain head, and one that caps its logits
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_the_same_however_an_update_is_divided(config, temperature, monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS", 300)  # a chunk of six targets
    of, m0 = model(config).double(), model(config, initializer_range=0.3).double()
    expected = gradients(of, by_the_book(of, m0, temperature))
    summed = NegativeLogLikelihood(of, temperature=temperature)
    reference = Reference(NegativeLogLikelihood(m0, temperature=temperature))
    for options in (
        {"ranks": 1},
        {"ranks": 2, "accumulate": 2},
        {"ranks": 3, "token_budget": 40},
        {"ranks": 2, "prefix_sharing": False},
    ):
        if config == "gemma2":
            options["prefix_sharing"] = False
        parts = [summed(batch, reference) for batch in batches(**options)]
        found = gradients(of, torch.stack(parts).sum())
        for name, value in expected.items():
            assert (found[name] - value).norm() < 1e-5 * value.norm()  # norms are computed in float32


def test_adapters_that_are_off_are_m0():
    of, m0, lora = model("qwen2"), model("qwen2"), LoRA(r=4, dropout=0.5, target_modules="all-linear")
    lora.add_to(of)
    (batch,) = batches()
    summed = NegativeLogLikelihood(of)
    off, copy = Reference(summed, lora), Reference(NegativeLogLikelihood(m0.eval()))
    for found, expected in zip(off(batch), copy(batch), strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        for name, parameter in of.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    torch.testing.assert_close(off(batch)[0], copy(batch)[0])
    assert of.training
    of.eval()
    by_off, by_copy = gradients(of, summed(batch, off)), gradients(of, summed(batch, copy))
    assert by_off.keys() == by_copy.keys()
    for name, value in by_copy.items():
        assert "lora_" in name
        torch.testing.assert_close(by_off[name], value)
    assert (summed._hidden_states(batch) - off(batch)[0]).abs().max() > 0.01


# ---------------------------------------------------------------------- whole runs

UPDATES = 8
"""Four in each stage; an iteration has two."""
OF_EIGHT = (
    *("--config", "configs/baselines/score.yaml", "--algorithm.questions", 8),
    *("--algorithm.stage_one", 4, "--algorithm.stage_two", 4, "--algorithm.updates_per_iteration", 2),
    *("--algorithm.n_init", 1, "--algorithm.n_corr", 2, "--model.learning_rate", 1e-3),
    *("--data.evaluation.test_every", 4),
)


def score_fit(run: Path, *options: object) -> tuple[object, ...]:
    """A small run; the sizes of the questions are those of the demo."""
    arguments = demo_fit(run, train=20, test=4, iterations=0)
    return (*arguments[: arguments.index("--algorithm.iterations")], *OF_EIGHT, *options)


@pytest.fixture(scope="module")
def alone(stasc, tmp_path_factory) -> Path:
    """On one process, undisturbed."""
    run = tmp_path_factory.mktemp("alone")
    done = stasc(*score_fit(run))
    assert done.returncode == 0, done.stderr
    assert "iteration 2: updates: 2 in " in done.stdout
    return run


def weights(run: Path, n: int) -> dict[str, Tensor]:
    return load_file(run / f"iteration-{n:02d}/model/model.safetensors")


@pytest.mark.slow
def test_every_update_samples_from_the_weights_before_it(alone, cache):
    (m0,) = (path for path in cache.glob("demo-*") if path.is_dir())
    names = [f"iteration-{n:02d}" for n in range(1, 5)]
    metrics = [json.loads((alone / name / "training.json").read_text()) for name in names]
    assert [of_n["training"]["steps"] for of_n in metrics] == [2] * 4
    asked = [[t.question.id for t in Records(alone / name / "trajectories.jsonl")] for name in names]
    assert [len(ids) for ids in asked] == [2 * 8 * 2] * 4
    passes = [id for ids in asked for id in dict.fromkeys(ids)]
    assert len(set(passes[:16])) == 16, "of 20 questions two updates of 8 ask different ones"
    points = curves(alone)
    rate = [value for _, value in points[tag("step/learning_rate")]]
    assert rate == pytest.approx([1e-3 * CosineWithWarmup(4, 0.03)(step) for step in range(4)] * 2)
    assert len(points[tag("step/kl_penalty")]) == len(points[tag("step/seconds_sampling")]) == UPDATES
    assert len(points[tag("step/seconds_handing_over")]) == UPDATES / 2
    penalties = [value for _, value in points[tag("step/kl_penalty")]]
    assert penalties[0] == pytest.approx(0, abs=1e-9)
    assert min(penalties[1:4]) > 1e-6
    before = load_file(m0 / "model.safetensors")
    for n in range(1, 5):
        after = weights(alone, n)
        assert any((after[name] - before[name]).abs().max() > 0 for name in before)
        before = after
    assert not (alone / "handover").exists()


@pytest.mark.slow
def test_killed_in_the_midst_of_an_iteration_it_draws_and_learns_the_same(stasc, alone, tmp_path):
    kill = {"class_path": "users_own.Kill", "init_args": {"hook": "on_train_epoch_end"}}
    for epochs_done in (3, 5, 7):  # the first in the midst of stage I, the others of stage II
        kill["init_args"]["epochs_done"] = epochs_done
        killed = stasc(*score_fit(tmp_path), "--trainer.callbacks", json.dumps([kill]))
        assert killed.returncode == -9, killed.stderr
        assert (tmp_path / "handover").exists()
    again = stasc(*score_fit(tmp_path))
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path) == contents(alone)
    points, expected = curves(tmp_path), curves(alone)
    seconds = {name for name in expected if "seconds" in name}
    assert {name: points[name] for name in points.keys() - seconds} == {
        name: expected[name] for name in expected.keys() - seconds
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(stasc, alone, tmp_path, strategy):
    done = stasc(*score_fit(tmp_path, *STRATEGIES[strategy], "--trainer.accumulate_grad_batches", 2))
    assert done.returncode == 0, done.stderr
    for stage in ("trajectories", "dataset"):
        name = f"iteration-01/{stage}.jsonl"
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()
    for n in (1, 4):
        found, expected = weights(tmp_path, n), weights(alone, n)
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-4


@pytest.mark.slow
def test_adapters_learn_under_fsdp_and_after_a_kill(stasc, tmp_path):
    lora = ("--model.lora.r", 4, *STRATEGIES["fsdp"][:6])
    kill = {"class_path": "users_own.Kill", "init_args": {"hook": "on_train_epoch_end", "epochs_done": 7}}
    killed = stasc(*score_fit(tmp_path, *lora), "--trainer.callbacks", json.dumps([kill]))
    assert killed.returncode != 0
    assert not (tmp_path / "iteration-04").exists()
    again = stasc(*score_fit(tmp_path, *lora))
    assert again.returncode == 0, again.stderr
    before, after = weights(tmp_path, 3), weights(tmp_path, 4)
    assert 0 < max(float((after[name] - before[name]).abs().max()) for name in before) < 0.1


@pytest.mark.slow
def test_no_update_where_all_earn_the_same_and_nothing_holds(stasc, cache, tmp_path):
    off = ("--algorithm.beta1", 0, "--algorithm.beta2", 0)
    done = stasc(
        *score_fit(tmp_path, *off, "--data.reward", "users_own.PaysSometimes", "--data.reward.iteration", 99)
    )
    assert done.returncode == 0, done.stderr
    assert "iteration 1: D_1 is empty, so M_1 is M_0" in done.stdout
    (m0,) = (path for path in cache.glob("demo-*") if path.is_dir())
    expected = load_file(m0 / "model.safetensors")
    for n in (1, 4):
        found = weights(tmp_path, n)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_vllm_takes_the_weights_from_memory_and_so_does_the_engine_that_replaces_it(stasc, tmp_path):
    options = ("--sampler", "VLLMSampler", "--sampler.kv_cache_gib", 0.2, "--algorithm.stage_two", 0)
    watch = ("--trainer.callbacks+=users_own.WatchesEngine", "--trainer.default_root_dir", tmp_path)
    four = ("--algorithm.updates_per_iteration", 4)
    done = stasc(*score_fit(tmp_path, *options, *four, *watch))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "links").read_text().splitlines()
    assert lines == ["0 None", *(f"{update} /memfd:weights (deleted)" for update in (1, 2, 3))]


@pytest.mark.slow
def test_an_update_that_teaches_nothing_changes_nothing_and_the_next_one_learns(stasc, tmp_path):
    off = ("--algorithm.beta1", 0, "--algorithm.beta2", 0, "--algorithm.stage_two", 0)
    pays = ("--data.reward", "users_own.PaysInIteration", "--data.reward.iteration", 2)
    # M_0 is tested on 4 questions after the first update, which asks 16 with a correction each.
    calls = ("--data.reward.calls_per_iteration", 16 * 2 + 4 * 2)
    done = stasc(
        *score_fit(tmp_path, *off, *pays, *calls, "--algorithm.questions", 16, "--algorithm.n_corr", 1)
    )
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads((tmp_path / f"iteration-{n:02d}/training.json").read_text())["training"]["steps"]
        for n in (1, 2)
    ]
    assert steps == [1, 0]
