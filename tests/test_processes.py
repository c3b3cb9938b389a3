"""Several training processes, each with an engine of its own, and one: the same trajectories.

The several are stopped once on the way, and go on as two nodes with one process each.
"""

import socket
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


def test_one_process_and_two_and_two_nodes_sample_the_same(stasc, start, tmp_path, monkeypatch):
    alone, several, log = tmp_path / "alone", tmp_path / "several", tmp_path / "log"

    def command(run: Path, *strategy: object) -> tuple[object, ...]:
        arguments = demo_fit(run, train=40, test=21, iterations=1, sampler="VLLMSampler")
        return (*arguments, "--sampler.kv_cache_gib", 0.2, "--trainer.strategy", *strategy)

    process = stasc(*command(alone, "auto", "--trainer.devices", 1))
    assert process.returncode == 0, process.stderr[-3000:]

    stopped = start(log, *command(several, "ddp", "--trainer.devices", 2))
    while not any(several.glob("draws/*/*")):
        assert stopped.poll() is None, log.read_text()
        time.sleep(0.01)
    stopped.terminate()
    assert stopped.wait(10) == 143
    said = log.read_text()
    assert said.endswith("\nstasc: stopped by SIGTERM; run the same command again to go on.\n")
    assert "Traceback" not in said
    assert not (several / SAME[1]).exists(), "stopped too late"
    assert_no_workers(tmp_path)

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    nodes = []
    for number in (0, 1):
        monkeypatch.setenv("NODE_RANK", str(number))
        options = ("--trainer.num_nodes", 2, "--trainer.devices", 1)
        nodes.append(start(tmp_path / f"log-{number}", *command(several, "ddp", *options)))
    logs = [tmp_path / f"log-{number}" for number in (0, 1)]
    assert [node.wait(600) for node in nodes] == [0, 0], "\n".join(log.read_text() for log in logs)
    assert all(f"waiting for all 2 nodes at 127.0.0.1:{port}\n" in log.read_text() for log in logs)
    for run, count in ((alone, 1), (several, 2)):
        logs = sorted(path.name for path in run.glob("engine-*.log"))
        assert logs == [f"engine-{rank}.log" for rank in range(count)]
        assert not (run / "draws/under-way").exists()
    for stage in SAME:
        assert (alone / stage).read_bytes() == (several / stage).read_bytes(), stage
    assert_no_workers(tmp_path)
