"""The whole algorithm as a user runs it: the quickstart with real vLLM, and what it leaves on disk."""

import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT, contents, curves, demo_fit, events, stasc_environment, tiny_tokenizer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from callbacks.curves import tag
from stasc.algorithm import VARIANTS
from stasc.trajectory import Question, Records, Trajectory

pytestmark = pytest.mark.slow

QUICKSTART = ("fit", "--config", "configs/quickstart.yaml")
PROMPTS = yaml.safe_load((ROOT / "configs/prompts/demo.yaml").read_text())
TRAINED = range(1, 6)
TRANSITIONS = {
    "wrong_to_right": (0, 1),
    "right_to_wrong": (1, 0),
    "right_to_right": (1, 1),
    "wrong_to_wrong": (0, 0),
}
EVALUATION = {"test.jsonl", "metrics.json", "lines.json"}
STEPS = {"initial.jsonl", "trajectories.jsonl", "dataset.jsonl", "training.json", "probe.json", "model"}

Chat = list[dict[str, str]]


class Quickstart(NamedTuple):
    process: subprocess.CompletedProcess[str]
    run: Path

    def folder(self, n: int) -> Path:
        return self.run / f"iteration-{n:02d}"

    def records(self, n: int, name: str) -> list:
        return list(Records(self.folder(n) / f"{name}.jsonl"))

    def metrics(self, n: int) -> dict:
        return json.loads((self.folder(n) / "metrics.json").read_text())


@pytest.fixture(scope="module")
def quickstart(stasc, tmp_path_factory) -> Quickstart:
    run = tmp_path_factory.mktemp("quickstart") / "a run"
    return Quickstart(stasc(*QUICKSTART, "--run_dir", run), run)


def assert_it_learnt(done: Quickstart) -> None:
    assert done.process.returncode == 0, done.process.stderr
    assert done.metrics(0)["test"]["r2"] == pytest.approx(0.16, abs=0.04)
    assert done.metrics(5)["test"]["r2"] > 0.85


def is_right(question: Question, answer: str) -> float:
    """The reward of the demo's short answers, by hand."""
    letters = question.references[0].replace(
        "-", r"\W+"
    )  # a model may write "e--x-r", which is the same words
    return float(re.search(rf"\b{letters}\b", answer) is not None)


def tokens(trajectory: Trajectory, turn: int) -> tuple[int, ...]:
    return trajectory.after(turn).token_ids


# ---------------------------------------------------------------- the quickstart


def test_the_quickstart_learns_and_says_so(quickstart):
    assert_it_learnt(quickstart)
    output = quickstart.process.stdout
    _, _, table = output.rpartition("  n  r(Y1)  r(Y2)")
    assert max(map(len, table.splitlines()[:7])) <= 80
    rows = [line.split() for line in table.splitlines()[1:7]]
    for n, row in enumerate(rows):
        metrics = quickstart.metrics(n)
        size = str(metrics["dataset"]["size"]) if n else "-"
        counts = [str(metrics["test"][name]) for name in TRANSITIONS]
        test = metrics["test"]
        delta = [f"{test['delta']:+.3f}", f"{test['delta_se']:.3f}"]
        changes = [f"{test['repeated']:.0%}", f"{test['edited']:.2f}" if "edited" in test else "-"]
        rewards = [f"{test['r1']:.3f}", f"{test['r2']:.3f}"]
        assert row == [str(n), *rewards, *delta, size, *counts, *changes]
    assert f"M_5: corrections are not better than first answers: {test['delta']:+.3f}, p = " in output
    assert f"tensorboard --logdir '{quickstart.run}'" in output
    assert f"stasc report '{quickstart.run}' --out report" in output
    best = max(range(6), key=lambda n: quickstart.metrics(n)["test"]["r2"])
    assert f"maximum on test      M_{best}, test r(Y2) {quickstart.metrics(best)['test']['r2']:.3f}" in output


def test_a_log_of_the_quickstart_has_plain_lines_with_times(quickstart):
    assert quickstart.process.stderr == ""
    output = quickstart.process.stdout
    assert not any(mark in output for mark in ("\r", "\x1b", "| 0/"))
    lines = output.splitlines()
    at = [next(i for i, line in enumerate(lines) if f"  iteration {n} of 5" in line) for n in TRAINED]
    assert at == sorted(at)
    assert re.fullmatch(r"[\d:]{8}  iteration 3 of 5; .+ so far, about .+ left", lines[at[2]])
    of_the_third = "\n".join(lines[at[2] : at[3]])
    for stage in ("iteration 3: initial answers: 1,000 in", "iteration 3: corrections: 2,000 in"):
        assert re.search(rf"^[\d:]{{8}}  {stage} .+ tokens/s", of_the_third, re.MULTILINE)
    steps = quickstart.metrics(3)["training"]["steps"]
    assert re.search(
        rf"^[\d:]{{8}}  iteration 3: training steps: {steps} in .+, loss ", of_the_third, re.MULTILINE
    )
    test, train = (quickstart.metrics(2)[group] for group in ("test", "train"))
    assert f"\nM_2   test        r(Y1) {test['r1']:.3f}  r(Y2) {test['r2']:.3f}  w>r " in of_the_third
    assert f"\n      train       r(Y1) {train['r1']:.3f}  r(Y2) {train['r2']:.3f}  |D_2| " in of_the_third
    wide = [line for line in lines if len(line) > 80]
    assert all(str(quickstart.run) in line for line in wide), wide
    assert "  done: iteration 5 of 5; this start took " in output
    assert f"{quickstart.folder(1)}/model to {quickstart.folder(5)}/model" in output


def test_every_iteration_leaves_its_files(quickstart):
    assert {path.name for path in quickstart.folder(0).iterdir()} == EVALUATION | {"probe.json"}
    for n in TRAINED:
        assert {path.name for path in quickstart.folder(n).iterdir()} == EVALUATION | STEPS
    assert {path.name for path in quickstart.run.iterdir()} >= {"config.yaml", "checkpoints"}


@pytest.mark.parametrize("n", TRAINED)
def test_an_iteration_is_steps_1_to_3_of_the_algorithm(quickstart, n):
    initial, trajectories = quickstart.records(n, "initial"), quickstart.records(n, "trajectories")
    questions = [answer.question for answer in initial[::2]]
    assert len({question.id for question in questions}) == 500
    assert [(t.question, t.path) for t in initial] == [(x, (j,)) for x in questions for j in range(2)]
    assert [(t.upto(1), t.path[1]) for t in trajectories] == [(t, k) for t in initial for k in range(2)]
    for t in trajectories:
        assert [answer.prompt for answer in t.answers] == ["initial", "correction"]
        assert all(answer.reward == is_right(t.question, answer.text) for answer in t.answers)
    examples = [t.learn() for t in trajectories if t.reward(2) > t.reward(1)]
    assert quickstart.records(n, "dataset") == examples
    assert {(example.turn, example.prompt, example.weight) for example in examples} == {(2, "correction", 1)}

    # Draws of one prompt are draws of their own.
    same_initial = sum(tokens(a, 1) == tokens(b, 1) for a, b in zip(initial[::2], initial[1::2], strict=True))
    pairs = zip(trajectories[::2], trajectories[1::2], strict=True)
    assert same_initial / 500 < 0.5
    assert sum(tokens(a, 2) == tokens(b, 2) for a, b in pairs) / 1000 < 0.6


def test_initial_answers_evolve(quickstart):
    rewards = [sum(t.reward(1) for t in quickstart.records(n, "initial")) / 1000 for n in TRAINED]
    assert rewards[0] < 0.25
    assert rewards[4] > 0.5
    assert rewards == sorted(rewards)


def test_metrics_are_those_of_the_files(quickstart):
    def recomputed(trajectories: list[Trajectory]) -> dict[str, float]:
        pairs = [tuple(is_right(t.question, answer.text) for answer in t.answers) for t in trajectories]
        r1, r2 = (sum(rewards) / len(pairs) for rewards in zip(*pairs, strict=True))
        counts = {name: pairs.count(pair) for name, pair in TRANSITIONS.items()}
        return {"r1": r1, "r2": r2, **counts, "count": len(pairs)}

    tested = [t.question for t in quickstart.records(0, "test")]
    assert len(tested) == 500
    for n in range(6):
        metrics = quickstart.metrics(n)
        trajectories = quickstart.records(n, "test")
        assert [t.question for t in trajectories] == tested
        assert metrics.pop("iteration") == n
        measured = metrics.pop("measured")
        assert (measured["model"], measured["questions"]["test"]["count"]) == (f"M_{n}", 500)
        assert (quickstart.folder(n) / measured["config"]).is_file()
        test = metrics.pop("test")
        changes = [t.after(2).text.split() != t.after(1).text.split() for t in trajectories]
        assert test.pop("repeated") == pytest.approx(1 - sum(changes) / 500)
        assert (0 < test.pop("edited") < 1) if any(changes) else "edited" not in test
        assert test.pop("delta") == pytest.approx(test["r2"] - test["r1"])
        gains = [t.reward(2) - t.reward(1) for t in trajectories]
        assert test.pop("delta_se") == pytest.approx(stdev(gains) / math.sqrt(500))
        assert 0 < test.pop("delta_p") <= 1
        for turn in ("r1", "r2"):  # of a mean of 500 zeros and ones
            p = test[turn]
            assert test.pop(f"{turn}_se") == pytest.approx(math.sqrt(p * (1 - p) / 499))
        assert test == pytest.approx(recomputed(trajectories))
        if n:
            learnt = json.loads((quickstart.folder(n) / "training.json").read_text())
            assert learnt == {name: metrics[name] for name in learnt}
            train, asked = metrics.pop("train"), quickstart.records(n, "trajectories")
            drawn = [t.answers[-1] for t in [*quickstart.records(n, "initial"), *asked]]
            assert train.pop("answers") == len(drawn) == 1000 + 2000
            assert train.pop("tokens") == sum(len(a.token_ids) + a.finished for a in drawn)
            assert train == pytest.approx(recomputed(asked))
            size = len(quickstart.records(n, "dataset"))
            assert metrics.pop("dataset") == {"size": size, "improving": size, "non_decreasing": 0}
            training = metrics.pop("training")
            assert 0 < training["loss"] < 1
            assert (training["learning_rate"], training["steps"]) == (2.5e-4, -(-size // 16))
        assert metrics == {}


def test_tensorboard_shows_each_iteration_once(quickstart):
    assert_curves_are_the_metrics(quickstart)
    tables = events(quickstart.run).Tensors("test/trajectories/text_summary")
    assert [table.step for table in tables] == list(range(6))
    for n, table in enumerate(tables):
        shown = table.tensor_proto.string_val[0].decode()
        first = quickstart.records(n, "test")[0]
        for text in (first.question.text, *(answer.text for answer in first.answers)):
            assert text.replace("\n", "<br>") in shown


def assert_curves_are_the_metrics(done: Quickstart) -> None:
    found = curves(done.run)
    shown = {"test": ("r1", "r2", *TRANSITIONS), "dataset": ("size", "improving", "non_decreasing")}
    shown |= {"train": ("r1", "r2"), "training": ("loss", "learning_rate")}
    for group, names in shown.items():
        steps = range(6) if group == "test" else TRAINED
        for name in names:
            values = [done.metrics(n)[group][name] for n in steps]
            assert [step for step, _ in found[tag(f"{group}/{name}")]] == list(steps), (group, name)
            assert [value for _, value in found[tag(f"{group}/{name}")]] == pytest.approx(values), (
                group,
                name,
            )


# ---------------------------------------------------------------- validation


def test_validation_questions_choose_and_the_test_set_is_seen_seldom(stasc, tmp_path):
    run = tmp_path / "run"
    options = ("--data.validation", 0.25, "--data.evaluation.test_every", 3, "--keep_models", 1)
    # So that M_1 is chosen, which is not tested in its turn: iteration 1 asks 60 questions with two initial
    # answers and four corrections each, then M_0 20 for validation and 20 for the test.
    reward = ["users_own.PaysInIteration", "--data.reward.iteration", 2]
    reward += ["--data.reward.calls_per_iteration", 60 * (2 + 4) + 40 * 2]
    process = stasc(*demo_fit(run, train=80, test=20, iterations=3), *options, "--data.reward", *reward)
    assert process.returncode == 0, process.stderr
    done = Quickstart(process, run)
    metrics = [done.metrics(n) for n in range(4)]
    rewards = [of_n["validation"]["r2"] for of_n in metrics]
    assert [reward > 0 for reward in rewards] == [False, True, False, False]
    best = 1
    assert ["test" in of_n for of_n in metrics] == [True, True, False, True]
    assert {of_n["validation"]["count"] for of_n in metrics} == {20}
    held_out = {trajectory.question.id for trajectory in done.records(3, "validation")}
    learnt = {trajectory.question.id for trajectory in done.records(3, "initial")}
    assert (len(held_out), len(learnt), held_out & learnt) == (20, 60, set())
    reward = f"{metrics[best]['test']['r2']:.3f}"
    assert re.search(rf"best on validation +M_{best}, test r\(Y2\) {reward}\n", process.stdout)
    assert f"M_{best}: corrections are" in process.stdout
    assert [n for n, _ in curves(run)[tag("validation/r2")]] == [0, 1, 2, 3]
    for name in ("r1", "r2", "delta"):
        tested = [(n, pytest.approx(metrics[n]["test"][name])) for n in (0, 1, 3)]
        assert curves(run)[tag(f"test/{name}")] == tested
    models = [n for n in range(4) if (done.folder(n) / "model").exists()]
    assert models == [best, 3]
    assert process.stdout.endswith(f"{done.folder(3) / 'model'}\n")
    for n in models:
        card = (done.folder(n) / "model/README.md").read_text()
        assert ("| test | M_" in card) == ("test" in metrics[n])
        assert card.count("| validation | M_") == 2
        assert "| validation | 0.25 of train, held out |" in card


# ---------------------------------------------------------------- the models it leaves


def chat(kind: str, **values: str) -> Chat:
    """A prompt of configs/prompts/demo.yaml, filled in."""
    return [{**message, "content": message["content"].format(**values)} for message in PROMPTS[kind]]


def both_turns(trajectories: list[Trajectory]) -> tuple[list[Chat], list[str]]:
    """What the model was asked in evaluation, and what it answered."""
    initial = [chat("initial", question=t.question.text) for t in trajectories]
    correction = [
        chat("correction", question=t.question.text, initial_answer=t.answers[0].text) for t in trajectories
    ]
    return initial + correction, [t.after(turn).text for turn in (1, 2) for t in trajectories]


@pytest.mark.parametrize("n", TRAINED)
def test_plain_transformers_says_what_the_engine_said(quickstart, n):
    folder = quickstart.folder(n) / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked, answered = both_turns(quickstart.records(n, "test")[:50])
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    outputs = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    completions = outputs[:, inputs["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(completions, skip_special_tokens=True) == answered


GUIDE = (ROOT / "docs/serving.md").read_text()


def in_the_guide(language: str, mark: str) -> list[str]:
    """Blocks of the guide to serving that have a mark in them."""
    return [block for block in re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL) if mark in block]


@pytest.fixture(scope="module")
def server(quickstart, cache, tmp_path_factory) -> Iterator[str]:
    """The guide's server of the quickstart's last model, at an address of its own."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "runs").mkdir()
    (folder / "runs/quickstart").symlink_to(quickstart.run)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (command,) = in_the_guide("bash", "api_server")
    here = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"{command.rstrip()} --host localhost --port {port}"],
            cwd=folder,
            env=stasc_environment(cache) | here | {"VLLM_NO_USAGE_STATS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
                break
            time.sleep(0.2)
        yield f"localhost:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_an_openai_client_gets_from_a_vllm_server_what_the_engine_said(
    quickstart, server, monkeypatch, capfd
):
    (program,) = in_the_guide("python", "OpenAI")
    monkeypatch.chdir(quickstart.run.parent)
    Path("runs").mkdir()
    Path("runs/quickstart").symlink_to(quickstart.run)
    names: dict = {}
    exec(program.replace("localhost:8000", server), names)
    tested = quickstart.records(5, "test")[:50]

    def both(trajectory: Trajectory) -> list[str]:
        question = trajectory.question.text
        initial = names["ask"]("initial", question=question)
        return [initial, names["ask"]("correction", question=question, initial_answer=initial)]

    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(both, tested))
    assert said == [[answer.text.strip() for answer in trajectory.answers] for trajectory in tested]

    printed = capfd.readouterr().out
    replies = []
    for block in in_the_guide("bash", "curl"):  # its question is that of the program
        words = shlex.split(block)
        data = words[words.index("-d") + 1].replace("THE ANSWER", json.dumps("".join(replies))[1:-1])
        url = next(word for word in words if word.startswith("http:")).replace("localhost:8000", server)
        headers = dict([words[words.index("-H") + 1].split(": ")])
        request = urllib.request.Request(url, data.encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            replies.append(json.load(reply)["choices"][0]["message"]["content"].strip())
    assert printed == "\n".join([*replies, ""])
    assert len(replies) == 2


def test_the_card_says_what_the_run_found_and_its_snippet_runs(quickstart, monkeypatch, capfd):
    folder = quickstart.folder(5) / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stasc", "self-correction"],
    }
    for n in (0, 5):
        test = quickstart.metrics(n)["test"]
        low, high = (max(0, test["r2"] + sign * 1.96 * test["r2_se"]) for sign in (-1, 1))
        reward = f"{test['r2']:.3f} [{low:.3f}, {min(high, 1):.3f}]"
        (row,) = (row for row in card.text.splitlines() if row.startswith(f"| test | M_{n} | "))
        assert f" | {reward} | {test['delta']:+.3f} [" in row
    for messages in PROMPTS["initial"], PROMPTS["correction"]:
        assert all(message["content"] in card.text for message in messages)
    assert str(quickstart.run.parent) not in card.content
    first = quickstart.records(5, "test")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(snippet, {})
    assert capfd.readouterr().out == f"initial: {first.after(1).text}\ncorrection: {first.after(2).text}\n"


def test_all_files_of_a_model_may_be_read_by_those_who_may_read_its_config(quickstart):
    os.umask(umask := os.umask(0))
    modes = {path.name: path.stat().st_mode for path in (quickstart.folder(1) / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == modes["stasc.yaml"] == modes["README.md"]
    assert modes["config.json"] & 0o444 == 0o444 & ~umask


# ---------------------------------------------------------------- other ways to run it


def test_the_same_command_on_a_finished_run_changes_nothing(quickstart, stasc):
    before = contents(quickstart.run)
    again = stasc(*QUICKSTART, "--run_dir", quickstart.run)
    assert again.returncode == 0, again.stderr
    table = again.stdout[again.stdout.index("\n  n  r(Y1)") :]
    assert quickstart.process.stdout.endswith(table)
    assert "tokens/s" not in again.stdout
    assert contents(quickstart.run) == before
    assert_curves_are_the_metrics(quickstart)


def test_the_quickstart_learns_without_vllm(stasc, tmp_path):
    process = stasc(*QUICKSTART, "--run_dir", tmp_path / "run", "--sampler", "TransformersSampler")
    assert_it_learnt(Quickstart(process, tmp_path / "run"))
    assert "vllm" not in process.stderr.lower()


def test_fixed_initialisation_samples_initial_answers_once_and_the_lenient_filter_keeps_right_ones(
    stasc, tmp_path
):
    arguments = demo_fit(tmp_path / "run", train=60, test=40, iterations=2)
    done = Quickstart(stasc(*arguments, "--algorithm.variant", "FNF"), tmp_path / "run")
    assert done.process.returncode == 0, done.process.stderr
    assert not (done.folder(2) / "initial.jsonl").exists()
    initial = done.records(1, "initial")
    assert len(initial) == 120
    for n in (1, 2):
        trajectories, dataset = done.records(n, "trajectories"), done.records(n, "dataset")
        assert [t.upto(1) for t in trajectories[::2]] == initial
        rewards = [(t, t.reward(1), t.reward(2)) for t in trajectories]
        assert dataset == [t.learn() for t, r1, r2 in rewards if r2 > r1 or r1 == r2 == 1]
        improving = sum(r2 > r1 for _, r1, r2 in rewards)
        sizes = {"size": len(dataset), "improving": improving, "non_decreasing": len(dataset) - improving}
        assert done.metrics(n)["dataset"] == sizes
        assert 0 < improving < len(dataset)
    first, second = ([tokens(t, 2) for t in done.records(n, "trajectories")] for n in (1, 2))
    assert first != second


@pytest.mark.parametrize("variant", ["EIE", "EIF"])
def test_an_empty_dataset_leaves_the_base_model_as_it_is(stasc, cache, tmp_path, variant):
    # 60 questions with two initial answers and four corrections each, then 40 with one each.
    reward = ["users_own.PaysInIteration", "--data.reward.iteration", 2]
    arguments = demo_fit(tmp_path / "run", train=60, test=40, iterations=3)
    process = stasc(
        *arguments,
        *("--algorithm.variant", variant),
        *("--data.reward", *reward, "--data.reward.calls_per_iteration", 60 * (2 + 4) + 40 * 2),
    )
    done = Quickstart(process, tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert [done.metrics(n)["dataset"]["size"] > 0 for n in (1, 2, 3)] == [False, True, False]
    assert done.metrics(3)["training"] == {"loss": None, "learning_rate": 0.0, "steps": 0}
    base = 2 if variant == "EIE" else 0
    empty = [line for line in process.stdout.splitlines() if "is empty, so" in line]
    assert [line.partition(": D_")[2][:23] for line in empty] == [
        "1 is empty, so M_1 is M_0"[:23],
        f"3 is empty, so M_3 is M_{base}"[:23],
    ]
    assert "0 of 120 initial answers were right" in empty[0]
    assert "of 240 corrections changed their answer, 0 improved it. Draw more (algorithm.n_init" in empty[0]
    assert "Nothing was learnt in iteration 1, 3: D_n was empty, see above." in process.stdout

    def weights(n: int) -> bytes:
        (folder,) = (
            [done.folder(n) / "model"] if n else [path for path in cache.glob("demo-*") if path.is_dir()]
        )
        return (folder / "model.safetensors").read_bytes()

    assert weights(1) == weights(0) != weights(2)
    assert weights(3) == weights(base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_taken_from_the_command_line_and_from_yaml(variant, monkeypatch, capsys, tmp_path):
    from stasc.command_line.cli import run  # takes seconds

    (tmp_path / "variant.yaml").write_text(f"algorithm: {{variant: {variant}}}")
    for given in (["--algorithm.variant", variant], ["--config", str(tmp_path / "variant.yaml")]):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["stasc", *QUICKSTART, *given, "--print_config"])
        with pytest.raises(SystemExit, match="0"):
            run()
        assert yaml.safe_load(capsys.readouterr().out)["algorithm"]["init_args"]["variant"] == variant


def test_an_engine_that_keeps_old_weights_ends_the_run(stasc, tmp_path):
    small = demo_fit(tmp_path / "run", train=60, test=10, iterations=2, sampler="users_own.StaleSampler")
    process = stasc(*small)
    assert process.returncode == 2
    sentence = process.stderr.splitlines()[-1]
    assert sentence.startswith("stasc: the sampling engine does not hold ")
    assert not (tmp_path / "run/iteration-02/initial.jsonl").exists()
    assert (tmp_path / "run/iteration-01/model").is_dir()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            (),
            "stasc: training diverged: {run}/iteration-01/model gives no finite probabilities. Lower model.",
        ),
        (("--model.lora.r", 2), "stasc: training diverged: the adapters are not finite. Lower model."),
    ],
)
def test_a_run_that_diverges_says_so_and_asks_the_model_nothing(stasc, tmp_path, options, sentence):
    small = demo_fit(tmp_path / "run", train=60, test=10, iterations=2)
    process = stasc(*small, "--model.learning_rate", 1e30, *options)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(sentence.format(run=tmp_path / "run"))
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run/iteration-01/test.jsonl").exists()


def test_a_model_that_cannot_read_trees_is_refused_before_it_samples(stasc, tmp_path):
    tokenizer = tiny_tokenizer("qwen2")
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, max_position_embeddings=2048
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    small = demo_fit(tmp_path / "run", train=4, test=2, iterations=1)
    process = stasc(*small, "--model.base", tmp_path / "bloom")
    assert process.returncode == 2
    assert "stasc: bloom does not attend as prefix-sharing batches need it: set data." in process.stderr
    assert not list((tmp_path / "run").glob("iteration-*"))
