"""``python -m stasc report`` on a run of the whole program."""

import json
from collections import Counter

import pytest
from conftest import demo_fit
from report_page import Page
from report_runs import numbers, rows


@pytest.mark.slow
def test_a_real_run(stasc, tmp_path):
    runs = tmp_path / "runs"
    fitted = stasc(*demo_fit(runs / "a", train=30, test=40, iterations=1))
    assert fitted.returncode == 0, fitted.stderr
    done = stasc("report", runs, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads((runs / f"a/iteration-0{n}/metrics.json").read_text()) for n in (0, 1)]
    (row,) = rows(tmp_path / "out", "table2")
    assert (row["bench"], row["system"]) == ("demo", "EIE")
    expected = [metrics[n]["test"][turn] for turn in ("r1", "r2") for n in (0, 1)]
    assert numbers(row, "m0_r1", "final_r1", "m0_r2", "final_r2") == pytest.approx(expected)
    assert [row["dataset_size"] for row in rows(tmp_path / "out", "curves")] == [
        "",
        str(metrics[1]["dataset"]["size"]),
    ]
    page = Page(tmp_path / "out/index.html")
    assert page.errors == []
    totals = Counter()
    for _, n, split, _, count in page.data["strata"]:
        totals[n, split] += count
    assert totals == {(0, "test"): 40, (1, "test"): 40, (1, "train"): metrics[1]["train"]["count"]}
