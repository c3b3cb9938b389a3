"""The ablation scripts: shared work is done once, and no process stays behind."""

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
from test_curves import hparams_page

from callbacks.curves import tag
from stasc.errors import UserError
from stasc.run import Run, SystemRecord, write_json

SIZES = {"train": 20, "test": 20, "iterations": 2}
OPTIONS = (
    *("--config", "configs/quickstart.yaml", "--seeds", 7, "--sampler", "TransformersSampler"),
    *("--data.train.size", 20, "--data.test.size", 20),
)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TRAINED = (*OPTIONS, "--algorithm.iterations", 2, "--variants", "FIE", "ENF")


@pytest.fixture(scope="module")
def script(cache):
    """Starts a script; waits for its end unless ``wait=False``."""

    def run(name: str, *arguments: object, wait: bool = True):
        process = subprocess.Popen(
            [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
            cwd=ROOT,
            env=stasc_environment(cache) | ONE_THREAD,
            # Gives each of two simultaneous runs one thread, like all others: sums depend on that number.
            preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not wait:
            return process
        output, _ = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    return run


@pytest.fixture
def ablation(monkeypatch):
    """The module that the scripts share."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("ablation")


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


@pytest.mark.slow
def test_draws_of_m0_are_reused_and_results_keep_their_bytes(variants, stasc, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = variants / "FIE/seed-7", variants / "ENF/seed-7"
    for stage in ("iteration 1: initial answers", "iteration 1: corrections", "M_0 on test"):
        assert stage in log(first)
        assert stage not in log(second)
    assert "iteration 2: initial answers" in log(second)
    command = demo_fit(tmp_path / "alone", **SIZES)
    alone = stasc(*command, "--algorithm.variant", "ENF", "--seed_everything", 7)
    assert alone.returncode == 0, alone.stderr
    assert "M_0 on test" in alone.stdout
    assert contents(tmp_path / "alone") == contents(second)
    assert contents(first) != contents(second)


@pytest.mark.slow
def test_finished_runs_are_skipped(variants, script):
    before = {path: path.stat().st_mtime_ns for path in variants.rglob("*")}
    process = script("variants", *TRAINED, "--out", variants)
    assert process.returncode == 0
    assert "FIE/seed-7: already finished\nENF/seed-7: already finished\n" in process.stdout
    assert {path: path.stat().st_mtime_ns for path in variants.rglob("*")} == before


@pytest.mark.slow
def test_tensorboard_compares_the_runs(variants):
    differing, _, rows = hparams_page(variants)
    assert differing == ["system"]
    assert set(rows) == {"FIE/seed-7", "ENF/seed-7"}
    for name, row in rows.items():
        by_iteration = [metrics(variants / name, n) for n in range(3)]
        expected = {"system": name[:3], "seed": 7, "n_init": 2, "n_corr": 2, "learning_rate": 2.5e-4}
        for turn in ("r1", "r2"):
            expected[tag(f"test/{turn}")] = (2, pytest.approx(by_iteration[2][turn]))
            expected[tag(f"best/{turn}")] = (2, pytest.approx(max(m[turn] for m in by_iteration)))
        assert row["status"] == STATUS_SUCCESS
        assert {key: row[key] for key in expected} == expected
        assert row["model"].partition("-")[0].endswith("/demo")


@pytest.mark.slow
def test_a_failing_run_is_reported_and_stops_no_other(script, tmp_path):
    untrained = (*OPTIONS, "--algorithm.iterations", 0, "--out", tmp_path)
    process = script("variants", *untrained, "--variants", "XYZ", "EIE")
    assert process.returncode == 1
    end = process.stdout.partition("\n\n")[2].splitlines()
    assert end[0] == "1 of 2 runs are finished."
    assert end[1].startswith("XYZ/seed-7 failed: stasc: ")
    assert "algorithm.variant cannot be XYZ: it must be one of" in end[1]
    assert end[2] == f"  see {tmp_path}/XYZ/seed-7/fit.log"
    assert (tmp_path / "EIE/seed-7/iteration-00/metrics.json").is_file()


def test_a_run_is_finished_if_its_command_and_configs_have_not_changed(ablation, tmp_path):
    config = tmp_path / "base.yaml"
    config.write_text("")
    job = ablation.Job("EIE", tmp_path / "run", (str(config),), ("python", "-m", "stasc", "fit"))
    another = dataclasses.replace(job, command=(*job.command, "--algorithm.iterations", "3"))
    run = Run(job.folder)
    assert not job.finished()
    system = SystemRecord("EIE", iterations=2, threshold=1.0, uses_references=False, seed=7, options={})
    write_json(run.system, vars(system))
    job.log.write_text("python -m stasc fit\noutput\n")
    for n in (0, 1):
        write_json(run.iteration(n).metrics, {})
        assert not job.finished()
    write_json(run.iteration(2).metrics, {})
    assert job.finished()
    assert not another.finished()
    os.utime(config, ns=(2 * time.time_ns(), 2 * time.time_ns()))
    assert not job.finished()
    run.system.unlink()
    assert not job.finished()


def test_a_run_under_way_is_not_started_a_second_time(ablation, tmp_path):
    job = ablation.Job("EIE", tmp_path / "run", (), ("sh", "-c", "echo said; exec sleep 60"))
    assert not job.under_way()
    process = job.start(ablation.Slot())
    try:
        assert job.under_way()
        with pytest.raises(UserError, match="has a run under way"):
            job.start(ablation.Slot())
    finally:
        ablation.stop([process])
    assert not job.under_way()
    assert job.log.read_text().startswith("sh -c ")


def test_each_device_gets_one_run_and_cpu_cores_are_divided(ablation, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    one = ("--trainer.devices", "1", "--trainer.strategy", "auto")
    assert ablation.slots([]) == [ablation.Slot()]
    assert ablation.slots(["0", "2,3", "cpu", "cpu"]) == [
        ablation.Slot(("--trainer.accelerator", "gpu", *one), {"CUDA_VISIBLE_DEVICES": "0"}),
        ablation.Slot(
            ("--trainer.accelerator", "gpu", "--trainer.devices", "2"), {"CUDA_VISIBLE_DEVICES": "2,3"}
        ),
        *[ablation.Slot(("--trainer.accelerator", "cpu", *one), {"OMP_NUM_THREADS": "3"})] * 2,
    ]


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [
        ("4,5", ["0", "1"], ["4", "5"]),
        ("4, GPU-7, 6", ["2,1"], ["6,GPU-7"]),
        ("4,5", ["GPU-7"], ["GPU-7"]),
    ],
)
def test_device_numbers_index_into_cuda_visible_devices(ablation, monkeypatch, visible, devices, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in ablation.slots(devices)] == expected


@pytest.mark.parametrize(("visible", "number"), [("4,5", 2), ("", 0)])
def test_a_device_number_out_of_range_starts_nothing(script, tmp_path, monkeypatch, visible, number):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    process = script("variants", *OPTIONS, "--out", tmp_path, "--devices", number)
    assert process.returncode == 2
    (sentence,) = process.stdout.splitlines()
    assert sentence.startswith(f"--devices {number} is out of range: CUDA_VISIBLE_DEVICES={visible} makes ")
    assert not any(tmp_path.iterdir())


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
    """Command lines of the processes whose run folder is under ``out``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        if "stasc" in command and any(word.startswith(f"{out}/") for word in command):
            found.append(" ".join(command))
    return found


@pytest.mark.slow
def test_an_interrupted_ablation_leaves_no_process_and_resumes(script, variants, tmp_path):
    command = ("variants", *TRAINED, "--out", tmp_path, "--devices", "cpu", "cpu")
    process = script(*command, wait=False)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("*/seed-7/iteration-01/model"))) < 1 or len(programs(tmp_path)) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.endswith("interrupted; run the same command again to resume.\n")
    assert programs(tmp_path) == []
    assert not (tmp_path / "ENF/seed-7/iteration-02/metrics.json").exists(), "interrupted too late"

    again = script(*command)
    assert again.returncode == 0, again.stdout
    for variant in ("FIE", "ENF"):
        run = Path(variant, "seed-7")
        assert contents(tmp_path / run) == contents(variants / run)


@pytest.mark.slow
def test_the_grid_and_the_baselines(script, variants, tmp_path):
    grid = script(
        *("grid", *OPTIONS, "--out", tmp_path / "grid", "--reuse", variants, "--algorithm.iterations", 1),
        *("--n_init", 1, "--n_corr", 3),
    )
    assert grid.returncode == 0, grid.stdout
    cell = tmp_path / "grid/EIF-1-3/seed-7"
    assert "M_0 on test" not in log(cell), "the evaluation of M_0 does not depend on the cell"
    assert "iteration 1: initial answers" not in log(cell), "one answer of each is the first of two"
    assert "iteration 1: corrections" in log(cell), "and the third correction of each is new"
    assert len((cell / "iteration-01/trajectories.jsonl").read_text().splitlines()) == 20 * 1 * 3

    baselines = script("baselines", *OPTIONS, "--out", tmp_path / "baselines", "--algorithm.iterations", 1)
    assert baselines.returncode == 0, baselines.stdout
    *_, rows = hparams_page(tmp_path / "baselines")
    assert {row["system"] for row in rows.values()} == {"STaR", "SelfRefine", "Reflexion"}
    assert "M_0 on test: initial" in log(tmp_path / "baselines/STaR/seed-7")
    for system in ("SelfRefine", "Reflexion"):
        output = log(tmp_path / f"baselines/{system}/seed-7")
        assert "M_0 on test: initial" not in output, "its initial answers are STaR's"
    assert "M_0 on test, round 2" not in output, "Reflexion's corrections are among those of Self-Refine"
