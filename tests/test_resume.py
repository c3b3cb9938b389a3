"""The same command after a signal, kill -9 too, goes on where it stopped, and ends with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, contents, curves, demo_fit, events, stasc_environment

from callbacks.curves import tag
from stasc.run import Run

pytestmark = pytest.mark.slow

ITERATIONS = 3
SIZES = {"train": 80, "test": 40, "iterations": ITERATIONS}
EPOCHS = 2
OPTIONS = ("--algorithm.epochs", EPOCHS, "--data.batches.size", 4)


def uninterrupted(stasc, run: Path, sampler: str) -> Path:
    done = stasc(*demo_fit(run, **SIZES, sampler=sampler), *OPTIONS)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def with_transformers(stasc, tmp_path_factory) -> Path:
    return uninterrupted(stasc, tmp_path_factory.mktemp("uninterrupted"), "TransformersSampler")


@pytest.fixture(scope="module")
def with_vllm(stasc, tmp_path_factory) -> Path:
    return uninterrupted(stasc, tmp_path_factory.mktemp("uninterrupted"), "VLLMSampler")


def assert_same(run: Path, reference: Path) -> None:
    assert contents(run) == contents(reference)
    points, expected = curves(run), curves(reference)
    assert [n for n, _ in points[tag("test/r1")]] == list(range(ITERATIONS + 1))
    assert [n for n, _ in points[tag("train/r1")]] == list(range(1, ITERATIONS + 1))
    trained = [json.loads(path.read_text())["training"] for path in run.glob("iteration-*/training.json")]
    steps = sum(training["steps"] for training in trained)
    assert [step for step, _ in points[tag("step/loss")]] == list(range(steps))
    assert points == expected, "every point is in the event files once"
    shown, tables = (events(folder).Tensors("test/trajectories/text_summary") for folder in (run, reference))
    assert [table.step for table in shown] == list(range(ITERATIONS + 1))
    assert [table.tensor_proto for table in shown] == [table.tensor_proto for table in tables]


# Hook of Lightning, training epochs done by then, the last that is on disk, and the first that is not.
MOMENTS = {
    "in the first epoch": ("on_train_batch_end", 2, "iteration-02/dataset.jsonl", "iteration-02/model"),
    "after M_1's evaluation": ("on_train_epoch_start", 2, "iteration-01/metrics.json", "iteration-02/model"),
    "in the second epoch": ("on_train_batch_end", 3, "iteration-01/metrics.json", "iteration-02/model"),
    "before M_2's checkpoint": ("on_save_checkpoint", 4, "iteration-02/model", "iteration-03/initial.jsonl"),
    "before M_3's evaluation": ("on_train_end", 6, "iteration-03/model", "iteration-03/test.jsonl"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_by_itself_at_an_exact_moment(stasc, with_transformers, tmp_path, moment):
    hook, epochs_done, there, not_there = MOMENTS[moment]
    command = (*demo_fit(tmp_path, **SIZES), *OPTIONS)
    kill = {"class_path": "users_own.Kill", "init_args": {"hook": hook, "epochs_done": epochs_done}}
    killed = stasc(*command, "--trainer.callbacks", json.dumps([kill]))
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / there).exists()
    assert not (tmp_path / not_there).exists()
    if hook == "on_save_checkpoint":  # M_2 is trained again, and is what was trained last
        shutil.copy(tmp_path / "iteration-01/model/model.safetensors", tmp_path / there)

    again = stasc(*command)
    assert again.returncode == 0, again.stderr
    assert_same(tmp_path, with_transformers)
    first, second = json.loads((tmp_path / "starts.json").read_text())["starts"]
    assert "users_own.Kill" in first["command"]
    assert "users_own.Kill" not in second["command"]
    assert first["questions"] == second["questions"]


def wait_for(path: Path, process: subprocess.Popen[bytes], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, f"the program ended before it wrote {path}"
        assert time.monotonic() < deadline, f"no {path} after {timeout} s"
        time.sleep(0.005)


def workers(parent: int) -> Iterator[str]:
    """Sampling engines that a process started; a zombie has no command line any more."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # gone meanwhile
            continue
        if "stasc.sampling.vllm_worker" in command and str(parent) in command:
            yield process.name


def assert_no_workers(parent: int) -> None:
    deadline = time.monotonic() + 30
    while left := list(workers(parent)):
        assert time.monotonic() < deadline, f"workers {left} outlive the program"
        time.sleep(0.1)


def test_killed_twice_from_outside_with_vllm(stasc, start, with_vllm, tmp_path):
    run = tmp_path / "run"
    command = (*demo_fit(run, **SIZES, sampler="VLLMSampler"), *OPTIONS)
    for there, not_there in (
        ("iteration-01/model", "iteration-02/initial.jsonl"),  # before it samples from M_1
        ("iteration-02/initial.jsonl", "iteration-02/trajectories.jsonl"),  # while it samples corrections
    ):
        program = start(tmp_path / "log", *command)
        wait_for(run / there, program)
        assert list(workers(program.pid))
        program.kill()
        program.wait()
        assert not (run / not_there).exists(), "killed too late"
        assert_no_workers(program.pid)

    again = stasc(*command)
    assert again.returncode == 0, again.stderr
    assert_same(run, with_vllm)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_stopped_three_times_with_vllm(stasc, cache, with_vllm, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = (*demo_fit(run, **SIZES, sampler="VLLMSampler"), *OPTIONS)
    other = Run(run)
    other.lock()
    refused = stasc(*command)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"stasc: {run} has a run under way (process {os.getpid()} on")
    assert [path.name for path in run.iterdir()] == ["lock"]
    del other
    finished = {}
    for there, not_there, number in (
        ("engine-0.log", "draws", signal.SIGINT),  # while the engine starts
        ("draws", "iteration-01/initial.jsonl", signal.SIGTERM),  # while it samples
        ("iteration-00/metrics.json", "iteration-01/model", signal.SIGTERM),  # while the model trains
    ):
        with log.open("wb") as output:
            program = subprocess.Popen(
                [sys.executable, "-m", "stasc", *map(str, command)],
                cwd=ROOT,
                env=stasc_environment(cache),
                stdout=output,
                stderr=output,
                process_group=0,
            )
        wait_for(run / there, program)
        while program.poll() is None:  # an impatient user, and a terminal that tells the whole group
            with suppress(ProcessLookupError):
                os.killpg(program.pid, number)
            time.sleep(0.1)
        output = log.read_text()
        assert program.returncode == 128 + number, output
        sentence = f"stasc: stopped by {number.name}; run the same command again to go on."
        assert output.splitlines()[-1] == sentence
        assert "Traceback" not in output
        assert not (run / not_there).exists(), "stopped too late"
        assert_no_workers(program.pid)
        files = (path for path in run.glob("iteration-*/*.json*") if path.name != "lines.json")  # it grows
        finished |= {path: path.stat().st_mtime_ns for path in files}

    again = stasc(*command)
    assert again.returncode == 0, again.stderr
    assert_same(run, with_vllm)
    assert run / "iteration-01/dataset.jsonl" in finished
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
