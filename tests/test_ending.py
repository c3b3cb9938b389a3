"""A signal ends the program at once, with one sentence, and nothing that it has started outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, demo_fit, stasc_environment

from stasc.ending import SIGNALS

RANKS_WITH_ENGINES = r"""
import ctypes, os, subprocess, sys, time
from stasc.ending import end_on_signals, end_with, end_with_rank_zero, end_with_ranks

if "engine" in sys.argv:
    end_with(os.getppid())
    os.write(1, f"engine {os.getpid()}\n".encode())
    time.sleep(60)
end_on_signals()
end_with_rank_zero()
rank = os.environ.get("LOCAL_RANK", "0")
os.write(1, f"{rank} {os.getpid()}\n".encode())
subprocess.Popen([sys.executable, __file__, "engine"], start_new_session=True)
if rank == "0":
    end_with_ranks([subprocess.Popen([sys.executable, __file__], env={**os.environ, "LOCAL_RANK": "1"})])
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)  # as in a collective call: never returns, and runs no handler of Python
"""
POOL = """
import multiprocessing, signal, sys
from stasc.ending import end_on_signals

end_on_signals()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1]) == [1]
    # leaving the block sends SIGTERM to the pool's processes
pool.join()
print("the program goes on", flush=True)
sys.stdin.read()
"""


def started(folder: Path, program: str, **options: object) -> subprocess.Popen[str]:
    (file := folder / "program.py").write_text(program)
    return subprocess.Popen(
        [sys.executable, file],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("wb"),
        text=True,
        **options,
    )


def ranks_and_engines(program: subprocess.Popen[str]) -> list[tuple[str, int]]:
    """What each of the four processes is, and its id."""
    lines = [program.stdout.readline().split() for _ in range(4)]
    return [(name, int(process)) for name, process in lines]


def assert_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [pid for pid in processes if running(pid)]:
        assert time.monotonic() < deadline, f"{left} outlive the program"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_ends_ranks_and_engines_with_one_sentence(tmp_path, number, whole_group):
    program = started(tmp_path, RANKS_WITH_ENGINES, process_group=0)
    processes = [process for _, process in ranks_and_engines(program)]
    (os.killpg if whole_group else os.kill)(program.pid, number)
    killed = number == signal.SIGKILL
    assert program.wait(60) == (-number if killed else 128 + number)
    assert_gone(processes)
    sentence = f"\nstasc: stopped by {number.name}; run the same command again to go on.\n"
    assert (tmp_path / "stderr").read_text() == ("" if killed else sentence)


def test_a_job_of_slurm_has_no_checkpoint_beside_that_of_its_run(cache, tmp_path):
    """Lightning would write one on SIGUSR1, and start from any that lies in the current directory."""
    (another := tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another program")
    numbers = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    slurm = numbers | {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "learn", "SLURM_JOB_ID": "7"}
    _, _, config, *arguments = demo_fit(run := tmp_path / "run", train=16, test=4, iterations=1)
    job = subprocess.Popen(
        [sys.executable, "-m", "stasc", "fit", "--config", ROOT / config, *map(str, arguments)],
        cwd=tmp_path,
        env=stasc_environment(cache) | slurm,
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "stderr").open("wb"),
    )
    while not (run / "iteration-00/metrics.json").exists():
        assert job.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 128 + signal.SIGUSR1
    said = (tmp_path / "stderr").read_text()
    assert said.endswith("\nstasc: stopped by SIGUSR1; run the same command again to go on.\n")
    assert list(tmp_path.rglob("hpc_ckpt*")) == [another]


def test_a_rank_that_is_killed_ends_all_others_with_one_sentence(tmp_path):
    program = started(tmp_path, RANKS_WITH_ENGINES)
    processes = ranks_and_engines(program)
    os.kill(dict(processes)["1"], signal.SIGKILL)
    assert program.wait(60) == 128 + signal.SIGKILL
    assert_gone([process for _, process in processes])
    assert (tmp_path / "stderr").read_text() == (
        "\nstasc: process 2 of 2 was ended by SIGKILL (was memory full? lower data.batches.token_budget, or "
        "sampler.kv_cache_gib); run the same command again to go on.\n"
    )


FAILING_RANK = """
import subprocess, sys, time
from stasc.ending import end_with_ranks

end_with_ranks([subprocess.Popen([sys.executable, "-c", sys.argv[1]])])
time.sleep(60)
"""


FAILED = "stasc: process 2 of 2 failed, as it says above; run the same command again to go on."


@pytest.mark.parametrize(
    ("rank", "status", "last"),
    [
        ("1 / 0", 1, FAILED),
        ("sys.exit(255)", 255, FAILED),
        ("print('stasc: a sentence', file=sys.stderr); sys.exit(2)", 2, "stasc: a sentence"),
    ],
)
def test_a_rank_that_fails_has_said_why(rank, status, last):
    failed = subprocess.run(
        [sys.executable, "-c", FAILING_RANK, f"import sys\n{rank}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert failed.returncode == status
    assert failed.stderr.splitlines()[-1] == last


def test_nohup_keeps_ignoring_a_closed_terminal(tmp_path):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    program = started(tmp_path, RANKS_WITH_ENGINES, preexec_fn=ignore)
    processes = [process for _, process in ranks_and_engines(program)]
    for process in processes:
        os.kill(process, signal.SIGHUP)
    time.sleep(0.3)
    assert all(map(running, processes))
    program.terminate()
    assert program.wait(60) == 143
    assert_gone(processes)


def test_a_pool_of_the_users_is_ended_without_the_program(tmp_path):
    program = started(tmp_path, POOL)
    assert program.stdout.readline() == "the program goes on\n", (tmp_path / "stderr").read_text()
    program.stdin.close()
    assert program.wait(60) == 0
