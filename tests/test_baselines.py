"""The systems that the paper builds on, the switches of its release, and evaluation beyond one draw."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, answer, corrected, curves, demo_fit, tiny_tokenizer

from data import demo
from stasc.algorithm import STaR
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message
from stasc.trajectory import Question, Records

pytestmark = pytest.mark.slow

SMALL = {"train": 40, "test": 30}


def run(stasc, folder: Path, *options: object, iterations: int | None = None, overlay: str = "") -> Path:
    arguments = demo_fit(folder, **SMALL, iterations=iterations or 1)
    if iterations is None:  # a system that is not trained has no such option
        arguments = arguments[:-2]
    overlays = ("--config", f"configs/baselines/{overlay}.yaml") if overlay else ()
    done = stasc(*arguments[:3], *overlays, *arguments[3:], *options)
    assert done.returncode == 0, done.stderr
    return folder


def metrics(folder: Path, n: int) -> dict:
    return json.loads((folder / f"iteration-{n:02d}/metrics.json").read_text())


def records(folder: Path, n: int, name: str) -> list:
    return list(Records(folder / f"iteration-{n:02d}/{name}.jsonl"))


# ---------------------------------------------------------------- STaR


def test_star_learns_right_first_answers_and_rationalises_wrong_ones(stasc, tmp_path):
    folder = run(stasc, tmp_path, iterations=2, overlay="star")
    for n in (1, 2):
        trajectories = records(folder, n, "trajectories")
        assert len(trajectories) == 2 * SMALL["train"]
        assert {t.turn for t in trajectories if t.reward(1) == 1} == {1}
        assert {t.answers[-1].prompt for t in trajectories if t.reward(1) < 1} == {"rationalization"}
        right = [t.learn(prompt="initial") for t in trajectories if t.reward(2) == 1]
        assert records(folder, n, "dataset") == right
        assert metrics(folder, n)["dataset"]["size"] == len(records(folder, n, "dataset"))


def test_star_without_rationalisation_learns_first_answers_alone(stasc, tmp_path):
    folder = run(stasc, tmp_path, "--algorithm.n_corr", 0, iterations=1, overlay="star")
    answers = records(folder, 1, "initial")
    assert records(folder, 1, "dataset") == [t.learn() for t in answers if t.reward(1) == 1]
    assert not (folder / "iteration-01/trajectories.jsonl").exists()


def test_stars_example_is_the_first_answer_to_the_plain_question():
    dialogue = Dialogue(tiny_tokenizer("qwen2"), {"initial": [Message("user", "{question}")]})
    wrong, right = (
        answer(text, reward, token_ids=dialogue.tokenizer.encode(text))
        for text, reward in (("b", 0), ("a", 1))
    )
    trajectory = corrected(Question("q", "which?", ("a",)), wrong, right)
    (example,) = STaR().select(1, [trajectory])
    prompt, target = dialogue.example(example)
    assert prompt == dialogue.ask("initial", [trajectory.upto(0)])[0]
    assert target == [*right.token_ids, dialogue.end_of_turn]


def test_star_needs_its_hint(refused, tmp_path):
    prompts = yaml.safe_load((ROOT / "configs/prompts/demo.yaml").read_text())
    del prompts["rationalization"]
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(prompts))
    star = ("--config", ROOT / "configs/baselines/star.yaml", "--data.prompts", tmp_path / "prompts.yaml")
    sentence = "stasc: data.prompts has no rationalization: the algorithm needs these messages.\n"
    assert refused(*star) == sentence


# ---------------------------------------------------------------- systems that are not trained


@pytest.fixture(scope="module")
def refined(stasc, tmp_path_factory) -> Path:
    """Three rounds for every answer, three answers for each question and a greedy one."""
    options = (
        *("--data.evaluation.samples", 3, "--data.evaluation.greedy", "true"),
        *("--data.evaluation.sampling.temperature", 1.0),
    )
    return run(stasc, tmp_path_factory.mktemp("refined"), *options, overlay="self_refine")


def test_self_refine_corrects_its_corrections_and_trains_nothing(refined):
    rounds = [records(refined, 0, name) for name in ("test", "test-turn-3", "test-turn-4")]
    for before, after in itertools.pairwise(rounds):
        assert [t.upto(before[0].turn) for t in after] == before
    assert [t.answers[2].text for t in rounds[2]] != [t.answers[3].text for t in rounds[2]]
    means = [sum(t.reward(t.turn) for t in after) / len(after) for after in rounds]
    found = metrics(refined, 0)
    assert found["rounds"] == pytest.approx(
        dict(zip(("r2", "r3", "r4"), means, strict=True)) | {"r1": found["test"]["r1"]}
    )
    assert [path.name for path in sorted(refined.glob("iteration-*"))] == ["iteration-00"]
    assert [step for step, _ in curves(refined)["rounds/r4"]] == [0]


def test_several_samples_of_a_question_are_counted_together_and_apart(refined):
    trajectories = records(refined, 0, "test")
    assert [t.path for t in trajectories] == [(j, 0) for j in range(3)] * SMALL["test"]
    assert len({t.after(1).text for t in trajectories[:3] + trajectories[3:6]}) > 2
    found = metrics(refined, 0)
    assert found["test"]["count"] == 3 * SMALL["test"]
    by_question = [trajectories[i : i + 3] for i in range(0, len(trajectories), 3)]
    assert found["samples"]["k"] == 3
    for turn in (1, 2):
        passed = sum(any(t.reward(turn) == 1 for t in group) for group in by_question) / SMALL["test"]
        assert found["samples"][f"pass_r{turn}"] == pytest.approx(passed)
        assert passed >= found["test"][f"r{turn}"]
    greedy = records(refined, 0, "test-greedy")
    assert len(greedy) == SMALL["test"]
    assert found["greedy"]["r2"] == pytest.approx(sum(t.reward(2) for t in greedy) / SMALL["test"])


def test_the_oracle_corrects_only_what_the_reward_calls_wrong(stasc, tmp_path):
    folder = run(stasc, tmp_path, "--data.evaluation.sampling.temperature", 1.0, overlay="reflexion")
    for t in records(folder, 0, "test-turn-4"):
        rewards = [answer.reward for answer in t.answers]
        assert all(reward < 1 for reward in rewards[:-1])
        assert t.turn == 4 or rewards[-1] == 1
    rounds = metrics(folder, 0)["rounds"]
    assert sorted(rounds.values()) == list(rounds.values())
    assert rounds["r4"] > rounds["r1"]


def test_greedy_samples_of_a_question_would_be_the_same(refused):
    sentence = "data.evaluation.sampling.temperature is 0, so all samples of a question are the same"
    assert sentence in refused("--data.evaluation.samples", 2)


# ---------------------------------------------------------------- what the release does otherwise


def test_the_release_pairs_all_and_trains_on_other_prompts(stasc, cache, tmp_path):
    short = yaml.safe_load((ROOT / "configs/prompts/demo.yaml").read_text())
    short["correction"] = short["correction"][1:]  # the system message is what M_0 knows of demonstrations
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(short))
    options = ("--algorithm.pair_all", "true", "--algorithm.variant", "ENE", "--algorithm.only_equal", "true")
    folder = run(
        *(stasc, tmp_path / "run", *options, "--data.training_prompts", tmp_path / "training.yaml"),
        *("--trainer.callbacks+=users_own.KeepsABatch", "--trainer.default_root_dir", tmp_path / "run"),
        iterations=1,
    )
    trajectories, kept = records(folder, 1, "trajectories"), records(folder, 1, "dataset")
    expected = sum(
        first.reward(1) == second.reward(2) == 1
        for first in trajectories
        if first.path[1] == 0
        for second in trajectories
        if first.question == second.question
    )
    assert len(kept) == expected > sum(t.reward(1) == t.reward(2) == 1 for t in trajectories)
    (m0,) = (path for path in cache.glob("demo-*") if path.is_dir())
    learnt = ModelFolder(m0).tokenizer().decode(torch.load(folder / "batch.pt")[0])
    assert demo.PROMPTS["correction"][0].content not in learnt
    assert f"{demo.PROMPTS['correction'][1].content.partition('{')[0]}What" in learnt


def test_in_the_papers_figures_fixed_variants_correct_the_answers_of_m0(stasc, tmp_path):
    options = ("--algorithm.variant", "FIE", "--algorithm.fixed_in_test", "true")
    folder = run(stasc, tmp_path, *options, "--model.learning_rate", 1e-3, iterations=2)
    before, *after = ([t.upto(1) for t in records(folder, n, "test")] for n in (0, 1, 2))
    assert after == [before, before]
    corrections = [[t.answers[1] for t in records(folder, n, "test")] for n in (0, 1, 2)]
    assert corrections[0] != corrections[1] != corrections[2]


@pytest.mark.parametrize("name", ["qwen_eif", "phi3_eie"])
def test_as_released_lies_over_the_papers_configs(stasc, name):
    overlay = ("--config", f"configs/{name}.yaml", "--config", "configs/reference/as_released.yaml")
    printed = stasc("fit", *overlay, "--print_config")
    assert printed.returncode == 0, printed.stderr
    config = yaml.safe_load(printed.stdout)
    switches = config["algorithm"]["init_args"]
    assert [switches[name] for name in ("pair_all", "only_equal", "fixed_in_test")] == [True, True, True]
    assert switches["variant"] == name.rpartition("_")[2].upper()
    asked, learnt = config["data"]["prompts"], config["data"]["training_prompts"]
    for prompts, turns in ((asked, 4), (learnt, 0)):
        roles = [message["role"] for message in prompts["correction"]]
        assert roles == ["user", "user", *["user", "assistant"] * (turns // 2), "user"]
    assert [message["role"] for message in asked["initial"]] == ["user"] * 3
    assert "initial" not in learnt
    paper = yaml.safe_load((ROOT / "configs/prompts/paper.yaml").read_text())
    for kind in ("initial", "correction"):
        texts = ["\n\n".join(m["content"] for m in prompts[kind]) for prompts in (asked, paper)]
        assert texts[0] == texts[1]
    assert learnt["correction"] == [*asked["correction"][:2], asked["correction"][-1]]
