"""Several training processes, each with an engine of its own, and one: the same trajectories.

The several are stopped once on the way.
"""

import subprocess
import time
from pathlib import Path

import pytest
from conftest import demo_fit

pytestmark = pytest.mark.slow

SAME = ["iteration-00/test.jsonl"]
SAME += [f"iteration-01/{stage}.jsonl" for stage in ("initial", "trajectories", "dataset")]


def workers() -> list[str]:
    """Command lines of all vLLM workers on this machine."""
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in processes.stdout.splitlines() if "stasc.sampling.vllm_worker" in line]


def assert_no_workers(folder: Path) -> None:
    """None is left of runs in that folder."""
    until = time.monotonic() + 10
    while any(str(folder) in line for line in workers()):
        assert time.monotonic() < until, "a worker outlived its run"
        time.sleep(0.1)


def test_one_process_and_two_sample_the_same(stasc, start, tmp_path):
    runs: dict[int, Path] = {}
    for processes in (1, 2):
        runs[processes] = tmp_path / f"run with {processes}"
        arguments = demo_fit(runs[processes], train=40, test=21, iterations=1, sampler="VLLMSampler")
        strategy = ("--trainer.devices", processes, "--trainer.strategy", "ddp" if processes > 1 else "auto")
        command = (*arguments, "--sampler.kv_cache_gib", 0.2, *strategy)
        if processes > 1:
            stopped = start(tmp_path / "log", *command)
            while not any(runs[processes].glob("draws/*/*")):
                assert stopped.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            stopped.terminate()
            assert stopped.wait(10) == 143
            said = (tmp_path / "log").read_text()
            assert said.endswith("\nstasc: stopped by SIGTERM; run the same command again to go on.\n")
            assert "Traceback" not in said
            assert not (runs[processes] / SAME[1]).exists(), "stopped too late"
            assert_no_workers(tmp_path)
        process = stasc(*command)
        assert process.returncode == 0, process.stderr[-3000:]
        logs = sorted(path.name for path in runs[processes].glob("engine-*.log"))
        assert logs == [f"engine-{rank}.log" for rank in range(processes)]
        assert not (runs[processes] / "draws/under-way").exists()
    for stage in SAME:
        assert (runs[1] / stage).read_bytes() == (runs[2] / stage).read_bytes(), stage
    assert_no_workers(tmp_path)
