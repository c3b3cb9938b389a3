"""Systems of users, named by their class path: three turns with weights, and one without options."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, contents, curves, demo_fit

from stasc.run import Run
from stasc.trajectory import Records

pytestmark = pytest.mark.slow
SIZES = {"train": 60, "test": 24}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """The demo's prompts and one more, which looks at both answers."""
    found = yaml.safe_load((ROOT / "configs/prompts/demo.yaml").read_text())
    found["second_look"] = [
        *found["correction"][:1],
        {"role": "user", "content": "Question: {question}\n\nInitial Answer: {answer_1}\n{answer_2}"},
    ]
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


def three_turns(run: Path, prompts: Path, sampler: str = "TransformersSampler") -> tuple[object, ...]:
    arguments = demo_fit(run, **SIZES, iterations=2, sampler=sampler)[:-2]
    system = ("--algorithm", "users_own.ThreeTurns", "--algorithm.iterations", 2, "--algorithm.n_corr", 1)
    return (*arguments[:3], *system, *arguments[3:], "--data.prompts", prompts)


@pytest.fixture(scope="module")
def run(stasc, prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three turns")
    done = stasc(*three_turns(folder, prompts))
    assert done.returncode == 0, done.stderr
    return folder


def records(run: Path, n: int, name: str) -> Records:
    return Records(run / f"iteration-{n:02d}/{name}.jsonl")


def test_every_turn_is_a_file_that_says_which_turn_it_is(run):
    for n in (1, 2):
        first, second, third = (records(run, n, name) for name in ("initial", "trajectories", "turn-3"))
        assert len(first) == len(second) == 2 * SIZES["train"]
        assert [t.upto(1) for t in second] == list(first)
        expected = Counter()
        for trajectory in second:
            expected[trajectory] += 3 if trajectory.reward(2) < 1 else 1
        assert Counter(t.upto(2) for t in third) == expected
        for trajectory in third:
            assert (trajectory.turn == 3) == (trajectory.reward(2) < 1)
            prompts = [answer.prompt for answer in trajectory.answers]
            assert prompts == ["initial", "correction", "second_look"][: trajectory.turn]
        line = json.loads((run / f"iteration-{n:02d}/turn-3.jsonl").read_text().splitlines()[0])
        assert line["turn"] == len(line["answers"])


def test_each_second_answer_gets_third_ones_of_its_own(run):
    """In version 0.1 corrections of one initial answer shared what was drawn for the first of them."""
    third = [t for t in records(run, 1, "turn-3") if t.turn == 3]
    by_prompt: dict[tuple[str, ...], set] = {}
    for t in third:
        shown = (t.question.id, *(answer.text for answer in t.answers[:2]))
        by_prompt.setdefault(shown, set()).add(t.answers[2].token_ids)
    # Of M_0, which has never seen this prompt, hardly two draws are the same.
    assert len(set.union(*by_prompt.values())) > 0.9 * len(third)


def test_what_is_learnt_has_a_turn_a_prompt_and_a_weight(run):
    for n in (1, 2):
        examples = list(records(run, n, "dataset"))
        assert examples
        for example in examples:
            rewards = [example.trajectory.reward(turn) for turn in (1, 2, 3)]
            if example.weight == 1:
                assert (example.turn, example.prompt) == (3, "second_look")
                assert rewards[2] > rewards[1]
            else:
                assert (example.turn, example.prompt, example.weight) == (2, "correction", -0.25)
                assert rewards[0] > rewards[1]
        training = json.loads((run / f"iteration-{n:02d}/training.json").read_text())
        assert training["dataset"]["size"] == len(examples)
        assert training["training"]["steps"] == -(-len(examples) // 16)
    assert {example.weight for n in (1, 2) for example in records(run, n, "dataset")} == {1, -0.25}


def test_evaluation_has_three_turns_too(run):
    for n in range(3):
        rounds = json.loads((run / f"iteration-{n:02d}/metrics.json").read_text())["rounds"]
        third = list(records(run, n, "test-turn-3"))
        assert rounds["r3"] == pytest.approx(sum(t.reward(3) for t in third) / len(third))
    assert [step for step, _ in curves(run)["rounds/r3"]] == [0, 1, 2]


@pytest.mark.parametrize(("hook", "epochs_done"), [("on_train_batch_end", 1), ("on_save_checkpoint", 1)])
def test_three_turns_go_on_after_a_kill_with_the_same_bytes(stasc, prompts, run, tmp_path, hook, epochs_done):
    command = three_turns(tmp_path, prompts)
    kill = {"class_path": "users_own.Kill", "init_args": {"hook": hook, "epochs_done": epochs_done}}
    killed = stasc(*command, "--trainer.callbacks", json.dumps([kill]))
    assert killed.returncode == -9, killed.stderr
    again = stasc(*command)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path) == contents(run)


def test_three_turns_with_vllm_share_the_first_draws_of_another_system(stasc, prompts, tmp_path):
    done = stasc(*three_turns(tmp_path / "three", prompts, "VLLMSampler"))
    assert done.returncode == 0, done.stderr
    plain = (*demo_fit(tmp_path / "two", **SIZES, iterations=1, sampler="VLLMSampler"),)
    done = stasc(*plain, "--algorithm.n_corr", 2, "--reuse", tmp_path / "three")
    assert done.returncode == 0, done.stderr
    first, second = (records(tmp_path / run, 1, "initial") for run in ("three", "two"))
    assert list(first) == list(second)
    assert not any("initial" in path.name for path in (tmp_path / "two/draws/M_0").iterdir())
    corrections = {t.path: t for t in records(tmp_path / "two", 1, "trajectories") if t.path[1] == 0}
    shared = {t.path: t for t in records(tmp_path / "three", 1, "trajectories")}
    assert corrections == shared, "one correction of each is the first of two"


def test_a_system_may_fix_its_iterations_in_code(stasc, tmp_path):
    arguments = demo_fit(tmp_path / "run", **SIZES, iterations=2)[:-2]
    command = (*arguments[:3], "--algorithm", "users_own.TwoIterations", *arguments[3:])
    done = stasc(*command)
    assert done.returncode == 0, done.stderr
    assert "\nM_2   test        r(Y1) " in done.stdout
    system = Run(tmp_path / "run").read_system()
    assert (system.name, system.iterations) == ("Two iterations", 2)
    for n in (1, 2):
        size = len(records(tmp_path / "run", n, "dataset"))
        training = json.loads((tmp_path / f"run/iteration-{n:02d}/training.json").read_text())["training"]
        assert training["steps"] == 2 * -(-size // 16), "two epochs"
    before = contents(tmp_path / "run")
    again = stasc(*command)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "run") == before


def test_the_report_knows_them_by_name(stasc, run, tmp_path):
    done = stasc("report", run, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "report/table2.csv").read_text()
    assert "ThreeTurns" in table
    assert "ThreeTurns" in (tmp_path / "report/index.html").read_text()


def test_select_that_gives_trajectories_is_told_what_it_must_give(stasc, tmp_path):
    arguments = demo_fit(tmp_path / "run", train=4, test=2, iterations=1)[:-2]
    done = stasc(*arguments[:3], "--algorithm", "users_own.GivesTrajectories", *arguments[3:])
    assert done.returncode == 2
    assert "stasc: GivesTrajectories.select gave a Trajectory: it must give examples" in done.stderr


def of_page(folder: Path) -> dict[str, list[str]]:
    """Writes the files that the page shows; the command of each of its systems."""
    page, commands = (ROOT / "docs/own_system.md").read_text(), {}
    for name, text in re.findall(r'```\w+ title="(.+?)"\n(.*?)```', page, re.DOTALL):
        (folder / name).write_text(text)
    for text in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        words = shlex.split(text.replace("\\\n", " "))
        if "--algorithm" in words:
            commands[words[words.index("--algorithm") + 1].partition(".")[0]] = words[3:]
    return commands


@pytest.mark.parametrize("system", ["by_gain", "third_look", "rewarded"])
def test_the_systems_of_the_page_run(stasc, prompts, tmp_path, system):
    command = [word.replace("configs/", f"{ROOT}/configs/") for word in of_page(tmp_path)[system]]
    sizes = ("--algorithm.epochs", 2, "--algorithm.iterations", 1, "--data.train.init_args.size", 120)
    few = ("--data.test.init_args.size", 4, "--sampler", "TransformersSampler", "--model.learning_rate", 1e-3)
    if system == "third_look":  # in words that the demo's model knows
        known = yaml.safe_load(prompts.read_text())
        (tmp_path / "my_prompts.yaml").write_text(yaml.safe_dump(known | {"third_look": known["correction"]}))
    done = stasc(*command, *sizes, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = Run(tmp_path / "runs" / system).iteration(1)
    examples = list(Records(files.dataset))
    assert examples
    assert json.loads(files.training.read_text())["training"]["steps"] > 0
    if system == "rewarded":
        assert {example.kl * len(Records(files.answers(2))) / 2 for example in examples} == {0.01}
    else:
        assert {example.kl for example in examples} == {0.0}
