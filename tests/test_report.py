"""``python -m stasc report``: every figure by hand, and whatever a run folder may hold."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from conftest import ROOT, demo_fit
from scipy import stats

from stasc.errors import UserError
from stasc.report.browser import pieces
from stasc.report.command import main
from stasc.report.runs import read_runs
from stasc.report.statistics import RESAMPLES, correlation, holm, over_seeds, paired_test
from stasc.report.systems import group_runs
from stasc.run import Run, write_json, write_lines
from stasc.trajectory import Completion, Question, Trajectory, to_json

T_OF_ONE = 12.706205  # the 97.5 % quantile of t with one degree of freedom
Rewards = list[tuple[str, str]]  # r(y1) and r(y2) of M_0, M_1, ...: a digit for each test question


def questions(split: str, count: int) -> list[Question]:
    return [Question(f"{split}-{i}", f"Who is {split} {i}?", ("Ruth",)) for i in range(count)]


def trajectory(question: Question, r1: str, r2: str, **numbers: int) -> Trajectory:
    said = {"0": "It is Tim.", "1": "It is Ruth."}
    initial, correction = (Completion(said[r], (1, 2), True) for r in (r1, r2))
    return Trajectory(
        question, numbers.get("j", 0), numbers.get("k", 0), initial, correction, int(r1), int(r2)
    )


def scores(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    words = {0.0: "wrong", 1.0: "right"}
    counts = Counter(f"{words[t.r1]}_to_{words[t.r2]}" for t in trajectories)
    return {
        "r1": fmean(t.r1 for t in trajectories),
        "r2": fmean(t.r2 for t in trajectories),
        **{f"{a}_to_{b}": counts[f"{a}_to_{b}"] for a, b in product(words.values(), repeat=2)},
        "count": len(trajectories),
    }


def make_run(
    folder: Path,
    tests: Rewards,
    *,
    variant: str = "EIE",
    seed: int = 1,
    sizes: Sequence[int] = (),
    planned: int | None = None,
    split: str = "test",
    further: dict | None = None,
    change: Callable[[dict], None] = lambda config: None,
) -> Path:
    """A run folder. More digits than one for each of the six questions are further samples."""
    count = len(tests[0][0])
    asked = questions(split, min(count, 6))
    for n, (r1, r2) in enumerate(tests):
        pairs = enumerate(zip(r1, r2, strict=True))
        write_iteration(
            folder,
            n,
            [trajectory(asked[i % 6], *rewards, j=i // 6) for i, rewards in pairs],
            [trajectory(question, "0", "1", j=n) for question in questions("train", 12)],
            dict(enumerate(sizes, start=1)).get(n, 5),
            further or {},
        )
    config = {
        "seed_everything": seed,
        "trainer": {"devices": 1, "accelerator": "cpu"},
        "model": {"base": "demo", "learning_rate": 1e-4},
        "data": {"reward": {"class_path": "stasc.reward.InAccuracy", "init_args": {"marker": None}}},
        "run_dir": str(folder),
        "algorithm": {
            "class_path": "stasc.algorithm.STaSC",
            "init_args": {"variant": variant, "n_init": 2, "n_corr": 2, "threshold": 1.0},
        },
        "sampler": {"class_path": "stasc.sampling.VLLMSampler", "init_args": {"kv_cache_gib": 4}},
    }
    config["algorithm"]["init_args"]["iterations"] = len(tests) - 1 if planned is None else planned
    change(config)
    write_lines(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).splitlines())
    return folder


def write_iteration(
    folder: Path, n: int, test: list[Trajectory], train: list[Trajectory], size: int, further: dict
) -> None:
    box = Run(folder).iteration(n)
    metrics = {"iteration": n, "test": scores(test)}
    write_lines(box.test, map(to_json, test))
    if n:
        write_lines(box.trajectories, map(to_json, train))
        metrics |= {"train": scores(train), "dataset": {"size": size}, "training": {"loss": None}}
    write_json(box.metrics, metrics | further)


def baseline(name: str) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        config["algorithm"] = {"class_path": f"stasc.algorithm.{name}", "init_args": {"threshold": 1.0}}

    return change


def report(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def failure(capsys, *arguments: object) -> str:
    """The one sentence that the program ends with."""
    with pytest.raises(SystemExit) as end:
        report(*arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("stasc: ")
    assert said.count("\n") == 1
    return said


def rows(out: Path, table: str) -> list[dict[str, str]]:
    with (out / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(row: dict[str, str], *names: str) -> list[float]:
    return [float(row[name]) for name in names]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- Tables 1 and 2


def test_table_2_by_hand(tmp_path, capsys):
    # r(Y2) of seed 1: 1/6, 5/6, 2/6; of seed 2: 1/6, 2/6, 3/6.
    make_run(tmp_path / "a", [("000000", "000001"), ("100000", "111110"), ("000000", "110000")], seed=1)
    make_run(tmp_path / "b", [("000000", "000001"), ("110000", "110000"), ("000000", "110100")], seed=2)
    report(tmp_path, "--out", tmp_path / "out")
    assert "2 runs of 1 system" in capsys.readouterr().out

    (row,) = rows(tmp_path / "out", "table2")
    assert (row["system"], row["bench"], row["seeds"], row["final_iteration"]) == ("EIE", "demo", "2", "2")
    assert numbers(row, "m0_r1", "m0_r2", "max_r1", "final_r1") == pytest.approx([0, 1 / 6, 1.5 / 6, 0])
    # The mean of two maxima, and of two population deviations over iterations.
    assert float(row["max_r2"]) == pytest.approx((5 / 6 + 3 / 6) / 2)
    deviations = pstdev([1 / 6, 5 / 6, 2 / 6]), pstdev([1 / 6, 2 / 6, 3 / 6])
    assert float(row["max_r2_deviation"]) == pytest.approx(fmean(deviations))
    assert row["max_r2_iterations"] == "1 2"
    # t intervals of two values: their mean and half their distance times the quantile.
    spread = [2.5 / 6, 2.5 / 6 - T_OF_ONE * 0.5 / 6, 2.5 / 6 + T_OF_ONE * 0.5 / 6]
    assert numbers(row, "final_r2", "final_r2_low", "final_r2_high") == pytest.approx(spread, abs=1e-6)
    # Questions gain 1, 1, 0, 1/2, 0 and -1 over M_0, as means over the two seeds.
    assert float(row["difference"]) == pytest.approx(1.5 / 6)
    assert row["questions"] == "6"
    exact = stats.permutation_test(([1, 1, 0, 0.5, 0, -1],), np.mean, permutation_type="samples", axis=0)
    assert float(row["p"]) == pytest.approx(exact.pvalue, abs=0.015)

    markdown = (tmp_path / "out/report.md").read_text()
    assert "0.667 ± 0.210" in markdown
    assert "n = 1 to 2" in markdown


def test_a_single_seed_has_no_interval(tmp_path):
    make_run(tmp_path / "a", [("000000", "000000"), ("100000", "111000")])
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "table2")
    assert [row[f"{name}_{end}"] for name in ("max_r2", "final_r2") for end in ("low", "high")] == [""] * 4
    assert over_seeds([0.5]).low is None


def test_a_maximum_may_be_that_of_m0_and_the_final_iteration_shows_the_collapse(tmp_path):
    make_run(tmp_path / "a", [("111100", "111110"), ("111100", "110000"), ("000000", "000000")])
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "table2")
    assert numbers(row, "max_r2", "max_r2_iterations", "final_r2") == pytest.approx([5 / 6, 0, 0])
    assert float(row["difference"]) == pytest.approx(-5 / 6)


def test_table_1_has_the_grid_and_table_2_the_variants(tmp_path):
    def sizes(n_init: int, n_corr: int) -> Callable[[dict], None]:
        return lambda config: config["algorithm"]["init_args"].update(n_init=n_init, n_corr=n_corr)

    tests = [("000000", "000000"), ("000000", "100000")]
    for n_init, n_corr in product((1, 3), (1, 3)):
        make_run(tmp_path / f"{n_init}{n_corr}", tests, variant="EIF", change=sizes(n_init, n_corr))
    make_run(tmp_path / "ene", tests, variant="ENE", change=sizes(3, 3))
    report(tmp_path, "--out", tmp_path / "out")
    grid = [(row["system"], row["n_init"], row["n_corr"]) for row in rows(tmp_path / "out", "table1")]
    assert grid == [
        (f"EIF, n_init={n_init}, n_corr={n_corr}", str(n_init), str(n_corr))
        for n_init, n_corr in product((1, 3), (1, 3))
    ]
    assert [row["system"] for row in rows(tmp_path / "out", "table2")] == ["EIF, n_init=3, n_corr=3", "ENE"]
    # Figures 2 and 3 show what shares all options but the variant.
    assert (tmp_path / "out/figures/figure2-demo-r2.svg").read_text().count("ENE") >= 1


# ---------------------------------------------------------------- systems


def labels(*runs: Path) -> list[tuple[str, int]]:
    return [(system.name, len(system.runs)) for system in group_runs(read_runs(runs)[0])]


def test_seeds_of_a_system_may_run_anywhere(tmp_path):
    def elsewhere(config: dict) -> None:
        config["trainer"].update(devices=2, strategy="fsdp", accelerator="gpu", logger=False)
        config["sampler"]["init_args"]["kv_cache_gib"] = 8

    tests = [("000000", "000000")]
    make_run(tmp_path / "a", tests, seed=1)
    make_run(tmp_path / "b", tests, seed=2, change=elsewhere)
    assert labels(tmp_path) == [("EIE", 2)]


def test_another_option_makes_another_system_and_is_named(tmp_path):
    tests = [("000000", "000000")]
    make_run(tmp_path / "a", tests)
    make_run(tmp_path / "b", tests, change=lambda config: config["model"].update(learning_rate=1e-5))
    make_run(tmp_path / "c", tests, change=lambda config: config["algorithm"]["init_args"].update(epochs=2))
    make_run(tmp_path / "d", tests, variant="FIE")
    assert labels(tmp_path) == [
        ("FIE (SC) · demo, learning_rate=0.0001", 1),
        ("EIE · demo, learning_rate=0.0001", 1),
        ("EIE, epochs=2 · demo, learning_rate=0.0001", 1),
        ("EIE · demo, learning_rate=1e-05", 1),
    ]


def test_systems_of_a_users_own(tmp_path):
    tests = [("000000", "000000"), ("000000", "100000")]
    own = {"class_path": "my_package.Mine", "init_args": {"iterations": 1, "variant": "new"}}
    make_run(tmp_path / "a", tests, change=lambda config: config.update(algorithm=own))
    make_run(tmp_path / "b", tests, seed=2, change=baseline("STaR"))
    (tmp_path / "a/iteration-01.tmp").mkdir()
    shutil.copy(tmp_path / "a/iteration-01/metrics.json", tmp_path / "a/iteration-01.tmp")
    report(tmp_path, "--out", tmp_path / "out")
    assert [row["system"] for row in rows(tmp_path / "out", "table2")] == ["STaR", "new"]
    assert "new from 0.000 to 0.167" in (tmp_path / "out/report.md").read_text()


def test_a_run_is_not_counted_twice(tmp_path, capsys):
    run = make_run(tmp_path / "runs/a", [("000000", "000000")])
    report(run, tmp_path / "runs", run, "--out", tmp_path / "out")
    assert "1 run of 1 system" in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "runs/copy")
    assert "a and copy are the same run" in failure(capsys, tmp_path / "runs", "--out", tmp_path / "out")


def test_baselines_stand_beside_the_variants(tmp_path, capsys):
    rounds = {"rounds": {"r1": 0.0, "r2": 0.5, "r3": 0.75}, "samples": {"k": 4, "pass_r1": 0.25}}
    make_run(tmp_path / "a", [("000000", "000000"), ("000000", "100000")])
    for name in ("STaR", "SelfRefine", "Reflexion"):
        further = rounds if name != "STaR" else {}
        tests = [("000000", "111100" if name == "Reflexion" else "111000")]
        make_run(tmp_path / name, tests, change=baseline(name), further=further)
    report(tmp_path, "--out", tmp_path / "out")
    table = rows(tmp_path / "out", "table2")
    names = ["EIE", "STaR", "SelfRefine", "Reflexion (uses references at inference)"]
    assert [row["system"] for row in table] == names
    assert [row["difference"] != "" for row in table] == [True, False, False, False]  # M_0 against itself
    pairs = {
        (row["system"], row["minus"]): float(row["difference"]) for row in rows(tmp_path / "out", "pairs")
    }
    assert pairs["EIE", "SelfRefine"] == pytest.approx(-2 / 6)
    further = {row["system"]: row for row in rows(tmp_path / "out", "further")}
    assert set(further) == {"SelfRefine", names[3]}
    assert numbers(further["SelfRefine"], "rounds.r3", "samples.pass_r1") == [0.75, 0.25]


# ---------------------------------------------------------------- paired tests


@pytest.mark.parametrize(
    "differences",
    [
        [1.0] * 9 + [-1.0] * 2 + [0.0] * 40,
        [0.5, 0.25, -0.25, 1.0, 0.0, 0.75, -0.5, 0.25, 0.1, 0.2],
        [0.0] * 5,
        [1.0],
    ],
)
def test_the_paired_test_against_all_sign_flips(differences):
    found = paired_test(differences)
    moved = [d for d in differences if d]
    flips = [
        sum(sign * d for sign, d in zip(signs, moved, strict=True))
        for signs in product((1, -1), repeat=len(moved))
    ]
    exact = fmean(abs(total) >= abs(sum(moved)) - 1e-9 for total in flips)
    noise = 4 * (exact * (1 - exact) / RESAMPLES) ** 0.5 + 1 / RESAMPLES
    assert found.p == pytest.approx(exact, abs=noise)
    assert found.difference == pytest.approx(fmean(differences))
    assert found.questions == len(differences)
    assert found.low <= found.difference <= found.high


def test_for_rewards_of_0_and_1_it_is_mcnemars_test():
    found = paired_test([1.0] * 30 + [-1.0] * 14 + [0.0] * 456)
    exact = stats.binomtest(14, 44).pvalue
    assert found.p == pytest.approx(exact, abs=4 * (exact / RESAMPLES) ** 0.5)
    by_scipy = stats.bootstrap(
        ([1.0] * 30 + [-1.0] * 14 + [0.0] * 456,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=1
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((by_scipy.low, by_scipy.high), abs=0.0015)


def test_pairs_are_over_questions_and_the_seeds_that_both_have(tmp_path):
    nothing = ("000000", "000000")
    make_run(tmp_path / "eie-1", [nothing, ("000000", "111100")], seed=1)
    make_run(tmp_path / "eie-2", [nothing, ("000000", "111111")], seed=2)  # ENE has no such seed
    # Two samples of each question: means 1, 1/2, 0, 0, 0, 1/2.
    make_run(tmp_path / "ene-1", [nothing, ("0" * 12, "110000" + "100001")], seed=1, variant="ENE")
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "pairs")
    assert (row["system"], row["minus"], row["seeds"], row["questions"]) == ("EIE", "ENE", "1", "6")
    assert float(row["difference"]) == pytest.approx((4 - 2) / 6)


def test_unlike_test_sets_are_not_paired_and_that_is_said(tmp_path, capsys):
    tests = [("000000", "000000"), ("000000", "111100")]
    make_run(tmp_path / "a", tests)
    make_run(tmp_path / "b", tests, variant="ENE")
    make_run(tmp_path / "c", tests, variant="FNF", split="other")
    make_run(tmp_path / "d", tests, variant="FNE", seed=7)
    report(tmp_path, "--out", tmp_path / "out")
    assert [(row["system"], row["minus"]) for row in rows(tmp_path / "out", "pairs")] == [("EIE", "ENE")]
    sentence = "Systems are not paired across different test sets, of which there are 2: FNF | FNE, EIE, ENE."
    assert sentence in capsys.readouterr().out
    page = (tmp_path / "out/index.html").read_text()
    assert sentence in page
    assert "Not paired, for want of a common seed: FNE and EIE; FNE and ENE." in page


def test_seeds_of_one_system_have_one_test_set(tmp_path, capsys):
    make_run(tmp_path / "a", [("000000", "000000")], seed=1)
    make_run(tmp_path / "b", [("000000", "000000")], seed=2, split="other")
    assert "a and b have the same options but other test questions" in failure(capsys, tmp_path)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


# ---------------------------------------------------------------- the paper's curves

# Phi3-mini with (N_init, N_corr) = (1, 5): r(Y2) of M_0 to M_10, and what was kept of the draws of each. From
# the public notebook of the paper's repository (github.com/VityaVitalich/STASC, vis.ipynb); Table 2 and the
# correlation of section 4.2 follow from these.
PAPER = {
    "FIE": (
        (0.348, 0.352, 0.356, 0.366, 0.370, 0.374, 0.372, 0.360, 0.372, 0.362, 0.352),
        (152, 153, 181, 170, 183, 208, 202, 222, 213, 216, 211),
    ),
    "FNE": (
        (0.348, 0.346, 0.364, 0.336, 0.358, 0.358, 0.348, 0.348, 0.346, 0.374, 0.364),
        (742, 122, 153, 137, 158, 169, 171, 183, 194, 203, 191),
    ),
    "EIE": (
        (0.356, 0.364, 0.372, 0.394, 0.388, 0.386, 0.388, 0.368, 0.366, 0.362, 0.370),
        (161, 66, 47, 45, 68, 53, 46, 21, 43, 31, 17),
    ),
    "ENE": (
        (0.356, 0.300, 0.280, 0.282, 0.222, 0.206, 0.208, 0.162, 0.152, 0.108, 0.132),
        (711, 639, 596, 574, 503, 476, 455, 410, 367, 283, 397),
    ),
}


def write_paper(path: Path, unknown: Sequence[tuple[str, int]] = (), header: str = "n_filtered") -> Path:
    lines = [f"model,variant,N_init,N_corr,iteration,init_train,init_test,corr_test,{header}"]
    for variant, (rewards, kept) in PAPER.items():
        for n, (r2, size) in enumerate(zip(rewards, kept, strict=True)):
            r2 = "" if (variant, n) in unknown else r2
            lines.append(f"Phi3-mini,{variant},1,5,{n},0.3,,{r2},{size}.0")
    path.write_text("\n".join(lines) + "\n")
    return path


def paper_report(tmp_path: Path, **options: object) -> Path:
    make_run(tmp_path / "run", [("000000", "000000"), ("000000", "100000")])
    report(
        tmp_path / "run", "--out", tmp_path / "out", "--paper", write_paper(tmp_path / "paper.csv", **options)
    )
    return tmp_path / "out"


def test_the_papers_table_2_from_its_curves(tmp_path):
    out = paper_report(tmp_path)
    found = {row["system"]: row for row in rows(out, "table2") if row["source"] == "paper"}
    as_printed = {
        "FIE (SC)": (0.374, 0.009),
        "FNE": (0.374, 0.010),
        "EIE": (0.394, 0.012),
        "ENE": (0.356, 0.074),  # of M_0: this variant only falls
    }
    for system, printed in as_printed.items():
        assert numbers(found[system], "max_r2", "max_r2_deviation") == pytest.approx(printed, abs=5e-4)
    assert found["ENE"]["max_r2_iterations"] == "0"
    assert float(found["ENE"]["final_r2"]) == 0.132
    assert {row["max_r1"] for row in found.values()} == {""}  # not in the file
    assert {row["p"] for row in found.values()} == {""}
    assert "paper: Phi3-mini" in (out / "index.html").read_text()
    assert "stroke-dasharray" in (out / "figures/figure2-paper-phi3-mini-1-5-r2.svg").read_text()


def test_the_papers_correlation_rests_on_one_variant(tmp_path):
    found = {
        (row["variants"], row["left_out"]): row
        for row in rows(paper_report(tmp_path), "correlation")
        if row["panel"].startswith("paper")
    }
    assert found["all variants", ""]["points"] == "40"
    assert float(found["all variants", ""]["r"]) == pytest.approx(-0.51, abs=0.005)  # section 4.2
    assert float(found["all variants", "ENE"]["r"]) == pytest.approx(-0.06, abs=0.005)
    assert found["all variants", "ENE"]["r_low"] == ""  # three runs are too few for an interval


def test_what_the_paper_does_not_tell_stays_unknown(tmp_path):
    out = paper_report(tmp_path, unknown=[("EIE", 4)])
    (row,) = (row for row in rows(out, "table2") if (row["source"], row["system"]) == ("paper", "EIE"))
    assert row["max_r2"] == ""  # it might have been at iteration 4
    assert float(row["final_r2"]) == 0.370
    (row,) = (
        row for row in rows(out, "curves") if (row["run"], row["iteration"]) == ("Phi3-mini EIE (1, 5)", "4")
    )
    assert (row["r2"], row["dataset_size"]) == ("", "45.0")
    (row,) = (
        row for row in rows(out, "correlation") if row["panel"].startswith("paper") and not row["left_out"]
    )
    assert row["points"] == "38"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text.replace("n_filtered", "kept"), "has no column n_filtered"),
        (lambda text: text.replace("0.356", "high", 1), "line 4: could not convert string to float: 'high'"),
        (
            lambda text: text.replace("FNE,1,5,3,", "FNE,1,5,30,"),
            "the iterations of Phi3-mini FNE (1, 5) are not",
        ),
        (lambda text: text.splitlines()[0], None),
    ],
)
def test_a_spoilt_file_of_curves(tmp_path, capsys, spoil, said):
    run = make_run(tmp_path / "run", [("000000", "000000")])
    paper = write_paper(tmp_path / "paper.csv")
    paper.write_text(spoil(paper.read_text()))
    if said is None:
        report(run, "--out", tmp_path / "out", "--paper", paper)
    else:
        assert said in failure(capsys, run, "--out", tmp_path / "out", "--paper", paper)


# ---------------------------------------------------------------- |D_n| and gain


def test_the_correlation_by_numpy(tmp_path):
    make_run(
        tmp_path / "a", [("000000", "000000"), ("000000", "111000"), ("000000", "111100")], sizes=(10, 40)
    )
    make_run(tmp_path / "b", [("000000", "000000"), ("000000", "100000")], sizes=(25,), variant="ENF")
    report(tmp_path, "--out", tmp_path / "out")
    found = {(row["variants"], row["left_out"]): row for row in rows(tmp_path / "out", "correlation")}
    by_numpy = np.corrcoef([10, 40, 25], [3 / 6, 1 / 6, 1 / 6])[0, 1]
    assert float(found["all variants", ""]["r"]) == pytest.approx(by_numpy)
    assert (found["all variants", ""]["runs"], found["all variants", ""]["r_low"]) == ("2", "")
    assert ("all variants", "EIE") not in found  # one point has no correlation


def test_the_interval_draws_whole_runs():
    # Within each run the points are copies: an interval over points would be much too narrow.
    random = np.random.default_rng(3)
    centres = random.normal(size=(12, 2))
    single = correlation([[tuple(centre)] for centre in centres])
    copies = correlation([[tuple(centre)] * 50 for centre in centres])
    assert (copies.r, copies.low, copies.high) == pytest.approx((single.r, single.low, single.high))
    assert copies.r == pytest.approx(np.corrcoef(centres.T)[0, 1])
    resampled = [np.corrcoef(centres[random.integers(12, size=12)].T)[0, 1] for _ in range(4000)]
    assert (single.low, single.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.05)
    assert correlation([[(1.0, 2.0)] * 5]) is None
    assert correlation([]) is None


# ---------------------------------------------------------------- unfinished and broken runs


def test_unfinished_runs_are_drawn_and_said_and_not_averaged(tmp_path, capsys):
    whole = [("000000", "000000"), ("000000", "110000"), ("000000", "111000")]
    make_run(tmp_path / "a", whole, seed=1)
    make_run(tmp_path / "b", whole[:2], seed=2, planned=2)
    make_run(tmp_path / "c", whole[:2], variant="ENE", planned=9)
    begun = make_run(tmp_path / "d", whole, seed=4)
    shutil.rmtree(begun / "iteration-00")
    report(tmp_path, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "b is unfinished: iteration 1 of 2." in said
    assert "c is unfinished: iteration 1 of 9." in said
    assert "d has begun and has not evaluated M_0 yet: it is left out." in said
    eie, ene = rows(tmp_path / "out", "table2")
    assert (eie["seeds"], eie["unfinished"], float(eie["final_r2"])) == ("1", "1", 0.5)
    assert (ene["seeds"], ene["unfinished"], ene["final_iteration"]) == ("1", "1", "1")
    page = (tmp_path / "out/index.html").read_text()
    assert "+ 1 unfinished" in page
    assert "unfinished: n = 1 of 9" in page
    assert len(rows(tmp_path / "out", "runs")) == 3
    assert {row["run"] for row in rows(tmp_path / "out", "curves")} == {"a", "b", "c"}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("broken", "spoil"),
    [
        ("iteration-01/metrics.json", lambda path: cut(path, 100)),
        ("iteration-01/metrics.json", lambda path: path.write_text('{"test": {"r1": "high"}}')),
        ("iteration-01/metrics.json", lambda path: path.write_text("[]")),
        ("iteration-01/metrics.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("iteration-01/metrics.json", Path.unlink),
        ("iteration-00/test.jsonl", Path.unlink),
        ("iteration-01/test.jsonl", lambda path: cut(path, path.stat().st_size - 20)),
        ("iteration-01/test.jsonl", lambda path: path.write_text(path.read_text().split("\n", 1)[1])),
        ("iteration-01/test.jsonl", lambda path: path.write_text('{"question": 3}\n')),
        (
            "iteration-01/test.jsonl",
            lambda path: path.write_text(path.read_text().replace('"r2": 1', '"r2": 0')),
        ),
        ("iteration-02/trajectories.jsonl", lambda path: path.write_text("null\n")),
        ("iteration-02/trajectories.jsonl", Path.unlink),
        ("config.yaml", lambda path: path.write_text("a: [")),
        ("config.yaml", lambda path: path.write_text("seed_everything: 1\n")),
    ],
)
def test_a_broken_file_is_named(tmp_path, capsys, broken, spoil):
    tests = [("000000", "000000"), ("000000", "110000"), ("000000", "111000")]
    run = make_run(tmp_path / "run", tests)
    spoil(run / broken)
    assert broken in failure(capsys, run, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_questions_in_a_later_iteration(tmp_path, capsys):
    run = make_run(tmp_path / "run", [("000000", "000000"), ("000000", "110000")])
    other = make_run(tmp_path / "other", [("000000", "000000"), ("000000", "110000")], split="other")
    shutil.copy(other / "iteration-01/test.jsonl", run / "iteration-01/test.jsonl")
    assert "iteration-01/test.jsonl has other questions than" in failure(capsys, run)


def test_places_without_runs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no run to report in" in failure(capsys, tmp_path / "empty")
    assert "is not a folder" in failure(capsys, tmp_path / "nothing")
    assert "RUN" in failure(capsys)


# ---------------------------------------------------------------- the folder


def test_the_same_runs_give_the_same_bytes(tmp_path):
    tests = [("000000", "000000"), ("100000", "110000"), ("000000", "110100")]
    folders = [
        make_run(tmp_path / f"runs/{v}-{s}", tests, variant=v, seed=s) for v in ("EIE", "FNF") for s in (1, 2)
    ]
    paper = write_paper(tmp_path / "paper.csv")
    report(tmp_path / "runs", "--out", tmp_path / "one", "--paper", paper)
    report(*reversed(folders), "--out", tmp_path / "two", "--paper", paper)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    report(tmp_path / "runs", "--out", tmp_path / "one", "--paper", paper)
    assert contents(tmp_path / "one") == before


def test_a_users_files_are_left_alone(tmp_path, capsys):
    run = make_run(tmp_path / "run", [("000000", "000000"), ("000000", "100000")])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "index.html").write_text("<h1>My own page</h1>")
    assert "holds other things than a report" in failure(capsys, run, "--out", mine)
    assert "is a file" in failure(capsys, run, "--out", mine / "index.html")
    assert contents(mine).keys() == {"index.html"}

    report(run, "--out", tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    report(run, "--out", tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_figures_are_whole(tmp_path):
    tests = [("000000", "000000"), ("100000", "110000"), ("000000", "110100")]
    for variant in ("EIE", "ENF", "FIE"):
        make_run(tmp_path / "runs" / variant, tests, variant=variant, sizes=(3, 8))
    report(tmp_path / "runs", "--out", tmp_path / "out")
    figures = {path.name for path in (tmp_path / "out/figures").iterdir()}
    names = ["figure2-demo-r1", "figure2-demo-r2", "figure3-demo-r1", "figure3-demo-r2", "figure4-demo"]
    names += ["sizes-demo", "gains-demo", "transitions-eie", "transitions-enf", "transitions-fie-sc"]
    assert figures == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    for name in names:
        ElementTree.parse(tmp_path / f"out/figures/{name}.svg")
        assert (tmp_path / f"out/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in (tmp_path / "out/report.md").read_text()
    # A variant has one colour everywhere.
    blue = "#2b7bba"  # of improving filter and evolving fine-tuning
    for name in ("figure2-demo-r2", "figure3-demo-r2", "sizes-demo", "gains-demo"):
        assert blue in (tmp_path / f"out/figures/{name}.svg").read_text()


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a browser would see: elements, scripts and the embedded data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attributes)))
        given = dict(attributes)
        self.ids += filter(None, [given.get("id")])
        self.links += filter(None, [given.get(name) for name in ("src", "href", "xlink:href", "action")])
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, text: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += text
        elif self.inside != "style":
            self.text += text

    def shown(self) -> list[tuple[str, str]]:
        """Initial answers and corrections."""
        return [("".join(t[6]), "".join(t[7])) for t in self.data["trajectories"]]


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    '" onload="alert(1)" \' `${document}` $data ${title} &lt;b&gt;',
    "\u2028\u2029\u0000\u0007\ud800 lone \udfff",
    "\u202ereversed\u2066 \u0645\u0631\u062d\u0628\u0627",
    "long" * 2000,
    "| a | b |\n---\n# head",
)


def test_whatever_a_model_writes_is_text(tmp_path):
    tests = [("000000", "000000"), ("000000", "100000")]
    make_run(tmp_path / "tame", tests)
    hostile = make_run(tmp_path / 'x<b onclick="f()">&', tests)
    test = hostile / "iteration-01/test.jsonl"
    records = [json.loads(line) for line in test.read_text().splitlines()]
    texts = iter(HOSTILE * 5)
    for record in records:
        record["initial"]["text"], record["correction"]["text"] = next(texts), next(texts)
        record["question"]["references"] = [next(texts)]
    test.write_text("".join(json.dumps(record) + "\n" for record in records))
    first = hostile / "iteration-00/test.jsonl"
    olds = [json.loads(line) for line in first.read_text().splitlines()]
    for old, new in zip(olds, records, strict=True):
        old["question"] = new["question"]
    first.write_text("".join(json.dumps(record) + "\n" for record in olds))

    report(tmp_path / "tame", "--out", tmp_path / "out-tame")
    report(hostile, "--out", tmp_path / "out")
    page = Page(tmp_path / "out/index.html")
    assert page.elements == Page(tmp_path / "out-tame/index.html").elements
    shown = page.shown()
    for record in records:
        assert (record["initial"]["text"], record["correction"]["text"]) in shown
    assert 'x<b onclick="f()">&' in page.text
    assert (tmp_path / "out/index.html").read_bytes().count(b"<script") == 2


def test_whatever_a_config_says_is_text(tmp_path):
    name = "<img src=x onerror=alert(1)>|`$data$ ${title}\t</svg>"
    tests = [("000000", "000000"), ("000000", "100000")]
    make_run(tmp_path / "a", tests)
    make_run(tmp_path / "b", tests, change=lambda config: config["model"].update(base=name))
    report(tmp_path / "a", "--out", tmp_path / "out-a")
    report(tmp_path / "b", "--out", tmp_path / "out-b")
    tame, hostile = Page(tmp_path / "out-a/index.html"), Page(tmp_path / "out-b/index.html")
    assert [element for element in hostile.elements if element[0] not in ("g", "path", "use", "text")] == [
        element for element in tame.elements if element[0] not in ("g", "path", "use", "text")
    ]
    for svg in (tmp_path / "out-b/figures").glob("*.svg"):
        ElementTree.parse(svg)
    assert "<img" not in (tmp_path / "out-b/report.md").read_text()


def test_the_page_needs_nothing_else(tmp_path):
    make_run(tmp_path / "run", [("000000", "000000"), ("000000", "100000")])
    report(tmp_path / "run", "--out", tmp_path / "out")
    page = Page(tmp_path / "out/index.html")
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    text = (tmp_path / "out/index.html").read_text()
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(http" not in text
    # Tables for screen readers: every header says what it heads.
    headers = [element for element in page.elements if element[0] == "th"]
    assert headers
    assert all("scope" in element for element in headers)


def test_the_page_shows_a_stated_sample(tmp_path):
    tests = [("000000", "000000"), ("000011", "110001")]
    make_run(tmp_path / "run", tests)
    report(tmp_path / "run", "--out", tmp_path / "out", "--trajectories", 2)
    page = Page(tmp_path / "out/index.html")
    # M_0: 6 wrong > wrong. M_1: 2 wrong > right, 2 wrong > wrong, 1 right > wrong, 1 right > right.
    transitions = page.data["transitions"]
    strata = {(n, split, transitions[kind]): count for _, n, split, kind, count in page.data["strata"]}
    assert strata == {
        (0, "test", "wrong_to_wrong"): 6,
        (1, "test", "wrong_to_right"): 2,
        (1, "test", "right_to_wrong"): 1,
        (1, "test", "right_to_right"): 1,
        (1, "test", "wrong_to_wrong"): 2,
        (1, "train", "wrong_to_right"): 12,
    }
    shown = Counter(stratum for stratum, *_ in page.data["trajectories"])
    assert [shown[i] for i in range(6)] == [min(2, count) for *_, count in page.data["strata"]]
    assert "10 of the 24 trajectories of these runs are on this page: at most 2 for each run" in page.text
    assert "10 of the 24" in (tmp_path / "out/report.md").read_text()

    report(tmp_path / "run", "--out", tmp_path / "out", "--trajectories", 12)
    assert "All 24 trajectories of these runs are on this page." in Page(tmp_path / "out/index.html").text
    report(tmp_path / "run", "--out", tmp_path / "out", "--trajectories", 0)
    assert Page(tmp_path / "out/index.html").data["trajectories"] == []


def test_further_rounds_and_greedy_answers_can_be_browsed(tmp_path):
    run = make_run(tmp_path / "run", [("000000", "000000")])
    for name in ("test-round-2", "test-greedy"):
        shutil.copy(run / "iteration-00/test.jsonl", run / f"iteration-00/{name}.jsonl")
    report(run, "--out", tmp_path / "out")
    splits = {split for _, _, split, *_ in Page(tmp_path / "out/index.html").data["strata"]}
    assert splits == {"test", "test, round 2", "test, greedy"}


@pytest.mark.parametrize(
    ("text", "references", "marked"),
    [
        ("The answer is Ruth.", ["Ruth"], ["Ruth"]),
        ("No, it is: JEAN-PAUL  Sartre!", ["Jean Paul Sartre"], ["JEAN-PAUL  Sartre"]),
        ("a Café, cafe\u0301 and cafes", ["cafe"], ["Café", "cafe\u0301"]),
        ("It was 1915, not 15.", ["15"], ["15"]),
        ("The Beatles; beatles", ["the beatles"], ["The Beatles"]),
        ("It was Beatles.", ["The Beatles"], ["Beatles"]),
        ("Vitamin C", ["Vitamin A"], []),
        ("no such thing", ["?!", "", "the"], []),
        ("x-y and y-z", ["x y", "y and y"], ["x-y"]),
        ("first Ruth. Final answer: Tim and Ruth", ["Ruth"], ["Ruth", "Ruth"]),
        ("", ["Ruth"], []),
    ],
)
def test_references_are_marked_in_answers(text, references, marked):
    cut = pieces(text, references)
    assert "".join(cut) == text
    assert cut[1::2] == marked


def test_only_what_a_reward_looks_at_is_marked():
    cut = pieces("Ruth? Final Answer: Ruth", ["Ruth"], "final answer:")
    assert cut == ["Ruth? Final Answer: ", "Ruth", ""]
    assert pieces("Ruth", ["Ruth"], "final answer:") == ["Ruth"]


# ---------------------------------------------------------------- the program


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
    totals = Counter()
    for _, n, split, _, count in page.data["strata"]:
        totals[n, split] += count
    assert totals == {(0, "test"): 40, (1, "test"): 40, (1, "train"): metrics[1]["train"]["count"]}


def test_the_report_starts_without_torch():
    program = (
        "import sys, stasc.report.command; print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"


def test_errors_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no run to report"):
        read_runs([tmp_path])
