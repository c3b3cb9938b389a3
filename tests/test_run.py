"""The run folder: whole files or none, and one configuration for each run."""

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import psutil
import pytest
from conftest import ROOT

from stasc import processes
from stasc.algorithm import STaSC
from stasc.errors import UserError
from stasc.run import (
    NEVER,
    START,
    TRAINING,
    FirstUse,
    Run,
    SystemRecord,
    first_use,
    read_json,
    write_folder,
    write_json,
    write_lines,
)

SYSTEM = SystemRecord("EIE", 2, 1.0, False, 42, {"algorithm.init_args.variant": "EIE"})


def config(variant: str = "EIE", iterations: int = 2, **others: Any) -> dict[str, Any]:
    options = {"variant": variant, "iterations": iterations}
    algorithm = {"class_path": "stasc.algorithm.STaSC", "init_args": options}
    return {"algorithm": algorithm, "trainer": {"devices": 1}, "run_dir": "a", **others}


def use(option: str, before: Any, now: Any) -> FirstUse:
    if option in ("run_dir", "trainer.devices"):
        return NEVER
    return TRAINING if option == "rate" else START


def claim(run: Run, configuration: dict[str, Any]) -> None:
    run.claim(configuration, SYSTEM, use, {"date": "today"})


def test_what_is_interrupted_leaves_the_old_file_and_no_folder(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})

    def lines():
        yield "half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_lines(path, lines())
    assert path.read_text() == '{\n  "a": 1\n}\n'

    def fill():
        with write_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill()
    assert not (tmp_path / "model").exists()
    with write_folder(tmp_path / "model") as folder:
        assert not any(folder.iterdir())
        (folder / "weights").write_text("whole")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["weights"]
    with write_folder(tmp_path / "model") as folder:
        (folder / "others").write_text("whole")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["others"]
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "model"}


def test_a_file_that_another_node_has_written_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "made" / "file"
    threading.Timer(0.5, write_lines, (path, ["here"])).start()
    processes.wait_for(path)
    assert path.read_text() == "here\n"
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="nowhere is written, and process 0 does not see it"):
        processes.wait_for(tmp_path / "nowhere")


def test_a_run_goes_on_with_whatever_has_no_part_in_its_results(tmp_path):
    run = Run(tmp_path / "run")
    claim(run, config())
    write_lines(run.iteration(1).answers(1), ["{}"])
    claim(run, config())
    claim(run, config(trainer={"devices": 2}, run_dir="moved"))
    assert run.read_system() == SYSTEM
    assert read_json(run.starts) == {"starts": [{"date": "today"}] * 3}
    run.note_seconds(1.26, processes=2)
    run.note_seconds(2.04, processes=2)
    last = {"date": "today", "seconds": 2.0, "processes": 2}
    assert read_json(run.starts) == {"starts": [{"date": "today"}] * 2 + [last]}


def test_more_iterations_continue_a_run_and_fewer_than_it_has_do_not(tmp_path):
    run = Run(tmp_path)

    def uses(option: str, before: Any, now: Any) -> FirstUse:
        return first_use(STaSC.first_uses, option.removeprefix("algorithm.init_args."), before, now)

    run.claim(config(), SYSTEM, uses, {})
    write_json(run.iteration(1).training, {})
    run.claim(config(iterations=3), SYSTEM, uses, {})
    run.claim(config(iterations=1), SYSTEM, uses, {})
    run.claim(config(iterations=3), SYSTEM, uses, {})
    write_json(run.iteration(2).training, {})
    with pytest.raises(UserError, match=r"another --algorithm\.iterations \(3, now 1\)"):
        run.claim(config(iterations=1), SYSTEM, uses, {})


def test_an_option_may_change_until_the_first_file_that_follows_from_it(tmp_path):
    run = Run(tmp_path)
    claim(run, config(rate=1))
    claim(run, config(variant="FIF", rate=1))  # nothing was sampled yet
    write_lines(run.iteration(1).answers(1), ["{}"])
    claim(run, config(variant="FIF", rate=2))
    write_json(run.iteration(1).training, {})
    with pytest.raises(UserError, match=r"another --rate \(2, now 3\)"):
        claim(run, config(variant="FIF", rate=3))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (config(variant="FIF"), r"--algorithm\.variant \(EIE, now FIF\)"),
        (
            config(algorithm={"class_path": "stasc.algorithm.STaR"}),
            r"--algorithm \(stasc\.algorithm\.STaSC, now ",
        ),
        (
            config(algorithm={"class_path": "stasc.algorithm.STaSC"}),
            r"--algorithm\.iterations \(2, now None\)",
        ),
        (config(data={"test": {"init_args": {"size": 3}}}), r"--data\.test\.size \(None, now 3\)"),
    ],
)
def test_another_configuration_is_refused_as_a_user_types_it_and_the_old_one_stays(tmp_path, other, named):
    run = Run(tmp_path)
    claim(run, config())
    write_lines(run.iteration(1).answers(1), ["{}"])
    before = run.config.read_bytes()
    with pytest.raises(UserError, match=f"holds a run with another {named}.*: choose another"):
        claim(run, other)
    assert run.config.read_bytes() == before


def test_a_file_that_lost_lines_can_be_told_from_one_that_has_none(tmp_path):
    first, second = Run(tmp_path).iteration(1).answers(1), Run(tmp_path).iteration(1).dataset
    assert Run.lines(first) is None
    Run.note_lines(first, write_lines(first, ["{}", "{}"]))
    Run.note_lines(second, write_lines(second, []))
    assert (Run.lines(first), Run.lines(second)) == (2, 0)


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff", b"[]", b"null", b"{}"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.json (cannot be read|does not hold what was written)"):
        read_json(path, "iteration")


@pytest.mark.parametrize(
    "change", [{"iterations": "2"}, {"threshold": None}, {"seed": True}, {"options": []}]
)
def test_a_record_of_wrong_types_is_refused(tmp_path, change):
    write_json(Run(tmp_path).system, {**vars(SYSTEM), **change})
    with pytest.raises(UserError, match=rf"system\.json cannot be read \({next(iter(change))} is "):
        Run(tmp_path).read_system()


def test_iterations_without_a_configuration_belong_to_nobody(tmp_path):
    (tmp_path / "iteration-01").mkdir()
    with pytest.raises(UserError, match=r"without its config\.yaml"):
        claim(Run(tmp_path), config())


def test_a_run_of_an_earlier_version_is_not_continued(tmp_path):
    run = Run(tmp_path)
    claim(run, config())
    write_lines(run.iteration(1).answers(1), ["{}"])
    run.system.unlink()
    with pytest.raises(UserError, match="a run of an earlier version"):
        claim(run, config())
    with pytest.raises(UserError, match=r"system\.json cannot be read"):
        run.read_system()


HOLDS_THE_LOCK = """
import subprocess, sys
from stasc.run import Run

run = Run(sys.argv[1])
run.lock()
engine = subprocess.Popen(["sleep", "60"])
print(engine.pid, flush=True)
engine.wait()
"""


def test_a_second_start_is_refused_until_the_first_is_gone_even_if_its_engine_is_not(tmp_path):
    command = [sys.executable, "-c", HOLDS_THE_LOCK, tmp_path]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    engine = int(first.stdout.readline())
    with pytest.raises(UserError, match=rf"has a run under way \(process {first.pid} on .*\): wait for"):
        Run(tmp_path).lock()
    first.kill()
    first.wait()
    assert psutil.Process(engine).status() != psutil.STATUS_ZOMBIE, "the engine is there"
    run = Run(tmp_path)
    run.lock()
    os.kill(engine, signal.SIGKILL)
    del run
    Run(tmp_path).lock()
