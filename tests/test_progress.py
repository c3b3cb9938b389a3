"""What a run says while it lasts: bars on a terminal, lines elsewhere, and how long is left."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest
from conftest import ROOT, demo_fit, stasc_environment

from callbacks.evaluation import evaluation_table, summary_lines
from stasc.progress import Pace, Progress, duration, say


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (36061, "10 h 1 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_a_log_of_ten_hours_stays_short(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress("corrections", 36_000) as stage:
        for _ in range(36_000):
            now += 1
            stage.update(1, "5 tokens/s")
    output, error = capsys.readouterr()
    lines = output.splitlines()
    assert 50 <= len(lines) <= 61
    assert re.fullmatch(r"[\d:]{8}  corrections: 601 of 36,000 in 10 min 1 s, 5 tokens/s", lines[0])
    assert re.fullmatch(r"[\d:]{8}  corrections: 36,000 in 10 h 0 min, 5 tokens/s", lines[-1])
    assert error == ""


def test_a_stage_that_fails_is_not_said_to_be_done(capsys):
    def fails() -> None:
        with Progress("corrections", 2) as stage:
            stage.update(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert capsys.readouterr().out == ""


def test_what_is_left_follows_from_whole_iterations(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace(5)
    for n, took in ((2, 10), (3, 60), (4, 120)):
        pace.begin(n, whole=n > 2)  # half of the second was done by an earlier start
        now += took
    pace.begin(5, whole=True)
    now += 100
    pace.end()
    said = [line[10:] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "iteration 2 of 5",
        "iteration 3 of 5",
        "iteration 4 of 5; 1 min 10 s so far, about 2 min 0 s left",
        "iteration 5 of 5; 3 min 10 s so far, about 1 min 30 s left",
        "done: iteration 5 of 5; this start took 4 min 50 s",
    ]


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_the_first_process_speaks(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "0")
    say("first")
    monkeypatch.setenv(variable, "1")
    say("second")
    with Progress("second", 1) as stage:
        stage.update(1)
    assert capsys.readouterr().out == "first\n"


def test_tables_of_large_numbers_fit_into_80_columns():
    counts = {"wrong_to_right": 1234, "right_to_wrong": 1234, "right_to_right": 1234, "wrong_to_wrong": 1234}
    group = {"r1": 0.1, "r2": 0.2, "delta_se": 0.01, "repeated": 1.0, "edited": 0.5, **counts}
    metrics = {"iteration": 10, "train": group, "training": {"loss": 0.25}, "dataset": {"size": 54321}}
    metrics |= {
        "validation": group,
        "test": group,
        "greedy": group,
        "rounds": {"r1": 0.1, "r2": 0.2, "r3": 0.3},
    }
    metrics["samples"] = {"k": 8, "pass_r1": 0.5, "pass_r2": 0.6, "majority_r1": 0.3, "majority_r2": 0.4}
    lines = summary_lines(metrics).splitlines()
    assert [line.split()[-1] for line in lines] == ["1234", "1234", "0.250"]
    table = evaluation_table(metrics)
    for line in (*lines, *table.splitlines()):
        assert len(line) <= 80, line
    assert "greedy      0.100  0.200  +0.100  0.010   1234   1234   1234   1234  100%  0.50" in table
    assert table.endswith(
        "rounds   r(Y1) 0.100  r(Y2) 0.200  r(Y3) 0.300\n"
        "pass@8  r(Y1) 0.500  r(Y2) 0.600\n"
        "majority of 8  r(Y1) 0.300  r(Y2) 0.400"
    )


def on_a_terminal(*command: object, environment: dict[str, str]) -> tuple[int, list[tuple[float, str]]]:
    """The exit status of a program on a terminal of 80 columns, and what it wrote after how many seconds."""
    started, written = time.monotonic(), []
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.chdir(ROOT)
        os.execvpe(sys.executable, [sys.executable, *map(str, command)], environment)
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the program has closed it
            break
        written.append((time.monotonic() - started, data.decode(errors="replace")))
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written


def screen(text: str) -> list[str]:
    """The lines that are left on a terminal: a carriage return goes back to the first column."""
    lines = []
    for written in text.replace("\r\n", "\n").split("\n"):
        line = ""
        for part in written.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


@pytest.mark.slow
def test_a_terminal_has_bars_while_they_last_and_whole_lines_after_them(cache, tmp_path):
    arguments = demo_fit(tmp_path / "run", train=60, test=20, iterations=2)
    status, written = on_a_terminal("-m", "stasc", *arguments, environment=stasc_environment(cache))
    text = "".join(part for _, part in written)
    assert status == 0, text
    first = next(seconds for seconds, part in written if "loading the libraries" in part)
    assert first < 2
    pieces = re.split(r"[\r\n]+", text)
    for title in ("iteration 1: initial answers", "M_1 on test: corrections", "iteration 2: training steps"):
        assert any(re.match(rf"{title} \|.*\| \d+/\d+", piece) for piece in pieces), title
    lines = screen(text)
    assert not any(re.search(r"\| \d+/\d|since", line) for line in lines), "a bar was left"
    timed = [line[10:] for line in lines if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert timed.index(f"starting {tmp_path / 'run'}") == timed.index("iteration 1 of 2") - 1
    assert sum(line.startswith("iteration 2 of 2; ") for line in timed) == 1
    assert sum(": corrections: " in line for line in timed) == 5
    assert sum(": training steps: " in line for line in timed) == 2
    of_models = [line.split()[0] for line in lines if re.match(r"M_\d   test        r\(Y1\) 0\.", line)]
    assert of_models == ["M_0", "M_1", "M_2"]
