"""The search: options by rewards on validation questions, which goes on after a kill."""

import csv
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, stasc_environment

from stasc.errors import UserError

FIT = (
    *("--config", "configs/quickstart.yaml", "--sampler", "TransformersSampler"),
    *("--data.train.size", 80, "--data.test.size", 10, "--algorithm.iterations", 2),
)
VALIDATED = (*FIT, "--data.validation", 0.25)


@pytest.fixture
def module(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("search")


@pytest.fixture
def start(cache):
    """Starts the script."""

    def popen(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "scripts/search.py", *map(str, arguments)],
            cwd=ROOT,
            env=stasc_environment(cache) | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return popen


@pytest.fixture
def script(start):
    """Runs the script to its end: its status and output."""

    def run(*arguments: object) -> tuple[int, str]:
        process = start(*arguments)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output

    return run


def space_file(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


def rows(out: Path) -> dict[int, dict[str, str]]:
    with (out / "search.csv").open(newline="") as file:
        return {int(row["trial"]): row for row in csv.DictReader(file)}


def validation(run: Path, n: int) -> dict[str, float]:
    return json.loads((run / f"iteration-{n:02d}/metrics.json").read_text())["validation"]


def wait_for(pattern: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    deadline = time.monotonic() + 300
    while len(list(pattern.parents[2].glob(str(pattern.relative_to(pattern.parents[2]))))) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_values_are_typed_as_on_the_command_line(module, tmp_path):
    path = space_file(
        tmp_path,
        "algorithm.n_corr: [1, 2]\n"
        "data.prompts: [a.yaml, {initial: [], correction: []}]\n"
        "model.learning_rate: {low: 1e-6, high: 1.0e-4, log: true}\n"
        "model.lora.r: {low: 4, high: 16, step: 4}\n"
        "config: [null, overlay.yaml]\n",
    )
    space = module.read_space(path)
    seen: dict[str, set] = {option: set() for option in space}
    study = module.optuna.create_study(sampler=module.optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        module.choose(trial, space)
        for option, value in trial.params.items():
            seen[option].add(value)
        words = module.typed(trial.params)
        overlay = ["--config", "overlay.yaml"]
        assert words[:2] == overlay or "--config" not in words, "others override it"
        assert words[words.index("--algorithm.n_corr") + 1] in ("1", "2")
    assert seen["data.prompts"] == {"a.yaml", '{"initial": [], "correction": []}'}
    assert seen["model.lora.r"] == {4, 8, 12, 16}
    assert seen["config"] == {"null", "overlay.yaml"}
    rates = sorted(seen["model.learning_rate"])
    assert 1e-6 <= rates[0] < 1e-5 < rates[-1] <= 1e-4, "by order of magnitude"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- 1\n", "must map options"),
        ("a: [1\n", "cannot be read"),
        ("a: 3\n", "a is 3: write a list"),
        ("a: []\n", "a is []: write a list"),
        ("run_dir: [x, y]\n", "run_dir is for the search to set"),
        ("a: {low: 2, high: 1}\n", "the space's a cannot be {'low': 2, 'high': 1}"),
        ("a: {low: 0.0, high: 1, log: true}\n", "the space's a cannot be"),
        ("a: {low: 1, hihg: 2}\n", "the space's a cannot be"),
    ],
)
def test_a_space_that_cannot_be_searched(module, tmp_path, text, sentence):
    with pytest.raises(UserError) as error:
        module.choose(module.optuna.create_study().ask(), module.read_space(space_file(tmp_path, text)))
    assert sentence in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "options", "sentence"),
    [
        ("algorithm.n_corr: [1, 2]", FIT, "a search needs questions that are not the test's: set data.val"),
        ("algorithm.n_cor: [1, 2]", VALIDATED, "n_cor"),
        ("algorithm.n_corr: [1, 2]", (*VALIDATED, "--trials", 0), "holds no search yet"),
    ],
)
def test_a_mistake_starts_nothing(script, tmp_path, space, options, sentence):
    status, output = script(*options, "--space", space_file(tmp_path, space), "--out", tmp_path / "out")
    assert status == 2
    (line,) = output.splitlines()
    assert sentence in line
    assert not (tmp_path / "out").exists()


def test_without_optuna(tmp_path):
    code = "import sys, runpy; sys.path.insert(0, 'scripts'); sys.modules['optuna'] = None; "
    code += "runpy.run_path('scripts/search.py')"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert process.stderr == "the search needs Optuna, which is not installed: pip install 'stasc[search]'\n"


@pytest.mark.slow
def test_a_search_goes_on_after_a_kill_prunes_and_ends_in_a_table(script, start, tmp_path):
    # One learning rate teaches nothing, the other destroys the model. The seed tries the first one first.
    space = space_file(tmp_path, "model.learning_rate: [1e-9, 1.0]\nalgorithm.n_corr: [2, 3]\n")
    out = tmp_path / "out"
    command = (*VALIDATED, "--space", space, "--out", out, "--seed_everything", 1, "--startup", 1, "--trials")

    killed = start(*command, 3)
    wait_for(out / "trial-000/iteration-01/model", killed)
    killed.kill()  # leaves its run behind
    killed.wait()
    interrupted = start(*command, 3)
    wait_for(out / "trial-*/iteration-01/model", interrupted, count=2)
    interrupted.send_signal(signal.SIGINT)
    output, _ = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, output
    assert "trial-000: complete after" in output
    assert output.endswith("interrupted; run the same command again to resume.\n")
    first = rows(out)
    assert [row["outcome"] for row in first.values()] == ["complete", "under way"]

    status, output = script(*command, 3)
    assert status == 0, output
    table = rows(out)
    numbers = list(table)
    assert [row["outcome"] for row in table.values()] == ["complete", "complete", "pruned at 1"], output
    for number, row in first.items():
        chosen = [row[option] for option in ("model.learning_rate", "algorithm.n_corr")]
        assert list(table[number].values())[2:4] == chosen, "the trial under way was continued"
        assert "going on in" in (out / f"trial-{number:03d}/fit.log").read_text() or number == 0
    options = [(row["model.learning_rate"], row["algorithm.n_corr"]) for row in table.values()]
    assert sorted(options[:2]) == [("1e-9", "2"), ("1e-9", "3")], "none is tried twice"
    assert options[2][0] == "1.0"
    for number, row in table.items():
        metrics = validation(out / f"trial-{number:03d}", int(row["last n"]))
        assert row["last n"] == ("2" if row["outcome"] == "complete" else "1")
        for key in ("r1", "r2", "delta", "delta_se"):
            assert float(row[f"last {key}"]) == pytest.approx(metrics[key])
    pruned = out / f"trial-{numbers[2]:03d}"
    assert not (pruned / "iteration-02/metrics.json").exists()
    assert "stopped by SIGINT" in (pruned / "fit.log").read_text()
    for run in out.glob("trial-*"):
        stages = (run / "fit.log").read_text()
        assert "M_1 on validation" in stages or run.name == "trial-000"
        assert "M_1 on test" not in stages
        assert "M_0 on validation" not in stages or run.name == "trial-000", "M_0's draws are shared"
    assert output.endswith((out / "search.md").read_text() + "\n")
    assert f"--run_dir {out}/test/trial-{numbers[0]:03d}/seed-$seed" in output

    before = (out / "search.csv").read_text()
    assert script(*command, 0)[0] == 0
    assert (out / "search.csv").read_text() == before
    status, output = script(*command, 0, "--objective", "delta")
    assert status == 2
    assert output == f"{out} holds a search with another objective: choose another --out, or remove it.\n"
