"""The scripts of the paper's ablations: many runs, each piece of work done once, and nothing left behind."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, contents, demo_fit, stasc_environment
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from test_curves import hparams_table

from stasc.run import Run, write_json

SIZES = {"train": 20, "test": 20, "iterations": 2}
OPTIONS = (
    *("--config", "configs/quickstart.yaml", "--seeds", 7, "--sampler", "TransformersSampler"),
    *("--data.train.size", 20, "--data.test.size", 20),
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TRAINED = (*OPTIONS, "--algorithm.iterations", 2, "--variants", "FIE", "ENF")


@pytest.fixture(scope="module")
def script(cache):
    """Starts a script, and without ``wait=False`` runs it to its end."""

    def run(name: str, *arguments: object, wait: bool = True):
        process = subprocess.Popen(
            [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
            cwd=ROOT,
            env=stasc_environment(cache) | ONE_THREAD,
            # Two runs at a time then have one thread each, like all others: sums depend on their number.
            preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not wait:
            return process
        said, _ = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, said)

    return run


@pytest.fixture(scope="module")
def variants(script, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("variants")
    process = script("variants", *TRAINED, "--out", out)
    assert process.returncode == 0, process.stdout
    assert process.stdout.endswith("2 of 2 runs are finished.\n")
    return out


def log(run: Path) -> str:
    return (run / "fit.log").read_text()


def metrics(run: Path, n: int) -> dict[str, float]:
    return json.loads((run / f"iteration-{n:02d}/metrics.json").read_text())["test"]


def test_what_m0_said_is_taken_over_and_changes_no_byte(variants, stasc, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = variants / "FIE/seed-7", variants / "ENF/seed-7"
    for stage in ("iteration 1: initial answers", "iteration 1: corrections", "M_0 on test"):
        assert stage in log(first)
        assert stage not in log(second)
    assert "iteration 2: initial answers" in log(second)
    command = demo_fit(tmp_path / "alone", **SIZES)
    alone = stasc(*command, "--algorithm.variant", "ENF", "--seed_everything", 7)
    assert alone.returncode == 0, alone.stderr
    assert "M_0 on test" in alone.stderr
    assert contents(tmp_path / "alone") == contents(second)
    assert contents(first) != contents(second)


def test_finished_runs_are_skipped(variants, script):
    before = {path: path.stat().st_mtime_ns for path in variants.rglob("*")}
    process = script("variants", *TRAINED, "--out", variants)
    assert process.returncode == 0
    assert "FIE/seed-7: was finished before\nENF/seed-7: was finished before\n" in process.stdout
    assert {path: path.stat().st_mtime_ns for path in variants.rglob("*")} == before


def test_tensorboard_compares_the_runs(variants):
    _, rows = hparams_table(variants)
    assert set(rows) == {"FIE/seed-7/tensorboard", "ENF/seed-7/tensorboard"}
    for name, row in rows.items():
        run = variants / name.removesuffix("/tensorboard")
        found = [metrics(run, n) for n in range(3)]
        told = {"system": name[:3], "seed": 7, "n_init": 2, "n_corr": 2, "learning_rate": 2.5e-4}
        for turn in ("r1", "r2"):
            told[f"test/{turn}"] = (2, pytest.approx(found[2][turn]))
            told[f"best/{turn}"] = (2, pytest.approx(max(m[turn] for m in found)))
        assert row["status"] == STATUS_SUCCESS
        assert {key: row[key] for key in told} == told
        assert row["model"].partition("-")[0].endswith("/demo")


def test_a_failing_run_stops_no_other_and_is_told(script, tmp_path):
    untrained = (*OPTIONS, "--algorithm.iterations", 0, "--out", tmp_path)
    process = script("variants", *untrained, "--variants", "XYZ", "EIE")
    assert process.returncode == 1
    end = process.stdout.partition("\n\n")[2].splitlines()
    assert end[0] == "1 of 2 runs are finished."
    assert end[1].startswith("XYZ/seed-7 failed: stasc: ")
    assert end[1].endswith("Got value: XYZ")
    assert end[2] == f"  see {tmp_path}/XYZ/seed-7/fit.log"
    assert (tmp_path / "EIE/seed-7/iteration-00/metrics.json").is_file()


def test_a_run_is_finished_if_nothing_that_it_follows_from_has_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    ablation = importlib.import_module("ablation")
    config = tmp_path / "base.yaml"
    config.write_text("")
    job = ablation.Job("EIE", tmp_path / "run", (str(config),), ("python", "-m", "stasc", "fit"))
    another = dataclasses.replace(job, command=(*job.command, "--algorithm.iterations", "3"))
    run = Run(job.folder)
    assert not job.finished()
    run.claim({"algorithm": {"init_args": {"iterations": 2}}})
    job.log.write_text("python -m stasc fit\nsaid\n")
    for n in (0, 1):
        write_json(run.iteration(n).metrics, {})
        assert not job.finished()
    write_json(run.iteration(2).metrics, {})
    assert job.finished()
    assert not another.finished()
    os.utime(config, ns=(2 * time.time_ns(), 2 * time.time_ns()))
    assert not job.finished()


def test_each_device_gets_one_run_and_the_cpu_is_divided(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    ablation = importlib.import_module("ablation")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    one = ("--trainer.devices", "1", "--trainer.strategy", "auto")
    assert ablation.places([]) == [ablation.Place()]
    assert ablation.places(["0", "2,3", "cpu", "cpu"]) == [
        ablation.Place(("--trainer.accelerator", "gpu", *one), {"CUDA_VISIBLE_DEVICES": "0"}),
        ablation.Place(
            ("--trainer.accelerator", "gpu", "--trainer.devices", "2"), {"CUDA_VISIBLE_DEVICES": "2,3"}
        ),
        *[ablation.Place(("--trainer.accelerator", "cpu", *one), {"OMP_NUM_THREADS": "3"})] * 2,
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--config", "configs/quickstart.yaml", "--seeds", "1", "1"], "two runs would share a folder"),
    ],
)
def test_a_mistake_starts_nothing(script, tmp_path, arguments, sentence):
    process = script("variants", *arguments, "--out", tmp_path)
    assert process.returncode == 2
    assert sentence in process.stdout
    assert not any(tmp_path.iterdir())


def programs(out: Path) -> list[str]:
    """Command lines of runs that lie under ``out``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # gone meanwhile
            continue
        if "stasc" in command and any(word.startswith(f"{out}/") for word in command):
            found.append(" ".join(command))
    return found


def test_an_interrupted_ablation_leaves_nothing_running_and_goes_on(script, variants, tmp_path):
    command = ("variants", *TRAINED, "--out", tmp_path, "--devices", "cpu", "cpu")
    process = script(*command, wait=False)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("*/seed-7/iteration-01/model"))) < 1 or len(programs(tmp_path)) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("interrupted; the same command goes on.\n")
    assert programs(tmp_path) == []
    assert not (tmp_path / "ENF/seed-7/iteration-02/metrics.json").exists(), "interrupted too late"

    again = script(*command)
    assert again.returncode == 0, again.stdout
    for variant in ("FIE", "ENF"):
        run = Path(variant, "seed-7")
        assert contents(tmp_path / run) == contents(variants / run)


def test_the_grid_and_the_baselines(script, variants, tmp_path):
    grid = script(
        *("grid", *OPTIONS, "--out", tmp_path / "grid", "--reuse", variants, "--algorithm.iterations", 1),
        *("--n_init", 1, "--n_corr", 3),
    )
    assert grid.returncode == 0, grid.stdout
    cell = tmp_path / "grid/EIF-1-3/seed-7"
    assert "M_0 on test" not in log(cell), "M_0's evaluation has nothing to do with the cell"
    assert len((cell / "iteration-01/trajectories.jsonl").read_text().splitlines()) == 20 * 1 * 3

    baselines = script("baselines", *OPTIONS, "--out", tmp_path / "baselines", "--algorithm.iterations", 1)
    assert baselines.returncode == 0, baselines.stdout
    _, rows = hparams_table(tmp_path / "baselines")
    assert {row["system"] for row in rows.values()} == {"STaR", "SelfRefine", "Reflexion"}
    assert "M_0 on test: initial" not in log(tmp_path / "baselines/SelfRefine/seed-7"), "STaR's are the same"
    assert "M_0 on test: initial" in log(tmp_path / "baselines/Reflexion/seed-7")
