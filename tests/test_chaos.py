"""``scripts/chaos.py`` in a short form: faults do no harm, and harm would be seen."""

import subprocess
import sys

import pytest
from conftest import ROOT, stasc_environment

pytestmark = pytest.mark.slow

SEED = 3394
"""With it the first three rounds have one configuration, of one process and without vLLM."""


def test_faults_do_no_harm_and_harm_would_be_seen(cache, tmp_path):
    def play(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "scripts/chaos.py",
                "--seed",
                str(SEED),
                "--out",
                tmp_path,
                *map(str, arguments),
            ],
            cwd=ROOT,
            env=stasc_environment(cache),
            capture_output=True,
            text=True,
            check=False,
        )

    played = play("--rounds", 3)
    assert played.returncode == 0, played.stdout + played.stderr
    *rounds, total = played.stdout.splitlines()
    assert [line.split(": ")[1] for line in rounds] == ["FIF-one-TransformersSampler-1-full"] * 3
    assert total == "3 rounds, 0 broken"

    (metrics,) = tmp_path.glob("undisturbed/*/run/iteration-02/metrics.json")
    metrics.write_bytes(metrics.read_bytes()[:-1])
    played = play("--round", 3)
    assert played.returncode == 1
    undisturbed = metrics.parent.parent
    assert f"BROKEN, iteration-02/metrics.json differ from {undisturbed}" in played.stdout
    assert (tmp_path / "round-3/run/iteration-02/metrics.json").is_file(), "it stays, to be looked at"
