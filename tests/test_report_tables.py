"""Every number of the report's tables, computed by hand."""

import itertools
import json
import re
from pathlib import Path
from statistics import fmean, pstdev
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from report_runs import make_run, numbers, report, rows, write_paper
from scipy import stats

from stasc.report.table import Column, Table, markdown, to_frame
from stasc.run import Run, read_json, write_json

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
TWO = [("000000", "000000"), ("000000", "100000")]

# ---------------------------------------------------------------- a table


def test_a_table_is_a_frame_and_how_it_is_shown():
    frame = to_frame(
        [
            {"group": "a", "name": "x-1", "value": 0.1 + 0.2, "count": 3, "uses_references": False},
            {"group": "b", "name": "alone", "value": 9.0, "count": None, "uses_references": False},
            {"group": "a", "name": "y|z", "value": -0.12345, "count": None, "uses_references": False},
            {"group": "a", "name": "bound", "value": 1.5, "count": 0, "uses_references": True},
            {"group": "b", "name": "unknown", "value": None, "count": 1, "uses_references": False},
        ]
    )
    columns = (
        Column("Name", "name"),
        Column("Value", "value", "+.3f", lambda row: f"of {row['group']}\nsecond", bold=True),
        Column("Count", "count"),
    )
    table = Table("name", "A_title", "A *note*", frame, columns, ("group",))
    assert table.csv().splitlines() == [
        "group,name,value,count,uses_references",
        "a,x-1,0.30000000000000004,3,False",
        "b,alone,9.0,,False",
        "a,y|z,-0.12345,,False",
        "a,bound,1.5,0,True",
        "b,unknown,,1,False",
    ]
    detail = "<br><sub>of {}</sub><br><sub>second</sub>".format
    header = "| Name | Value | Count |\n| --- | ---: | ---: |\n"
    assert table.markdown().split("\n\n") == [
        "### A\\_title",
        "A \\*note\\*",
        "**a**",
        f"{header}| x-1 | **+0.300**{detail('a')} | 3 |\n"
        f"| y\\|z | {MINUS}0.123{detail('a')} | {DASH} |\n"
        f"| bound | +1.500{detail('a')} | 0 |",
        "**b**",
        # The only known value of a group is no best one.
        f"{header}| alone | +9.000{detail('b')} | {DASH} |\n| unknown | {DASH}{detail('b')} | 1 |",
    ]
    assert table
    assert not Table("name", "title", "note", pd.DataFrame(), columns)


def test_markdown_shows_a_text_as_it_is():
    assert markdown("a_b *c* [d](e) <f> &lt; g|h `i` #j") == (
        "a\\_b \\*c\\* \\[d\\](e) \\<f\\> \\&lt; g\\|h \\`i\\` \\#j"
    )


# ---------------------------------------------------------------- Tables 1 and 2


def test_three_seeds_have_an_interval(tmp_path):
    for seed, final in enumerate(("110000", "110100", "111100")):
        make_run(tmp_path / f"runs/{seed}", [("000000", "000000"), ("000000", final)], seed=seed)
    report(tmp_path / "runs", "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "table2")
    low, high = stats.ttest_1samp([2 / 6, 3 / 6, 4 / 6], 0).confidence_interval(0.95)
    found = numbers(row, "final_r2", "final_r2_low", "final_r2_high")
    assert found == pytest.approx([0.5, low, high], abs=1e-6)
    assert f"0.500<br><sub>\\[{low:.3f}, {high:.3f}\\]</sub>" in (tmp_path / "out/report.md").read_text()


def test_table_2_by_hand(tmp_path, capsys):
    # r(Y2) of seed 1: 1/6, 5/6, 2/6; of seed 2: 1/6, 2/6, 3/6.
    make_run(tmp_path / "a", [("000000", "000001"), ("100000", "111110"), ("000000", "110000")], seed=1)
    make_run(tmp_path / "b", [("000000", "000001"), ("110000", "110000"), ("000000", "110100")], seed=2)
    report(tmp_path, "--out", tmp_path / "out")
    output = capsys.readouterr().out
    assert "2 runs of 1 system" in output
    assert "demo: the highest final r(Y2) is that of EIE, 0.417 (M_0 0.167; iteration 2; 2 seeds)." in output

    (row,) = rows(tmp_path / "out", "table2")
    assert (row["system"], row["bench"], row["seeds"], row["final_iteration"]) == ("EIE", "demo", "2", "2")
    assert numbers(row, "m0_r1", "m0_r2", "max_r1", "final_r1") == pytest.approx([0, 1 / 6, 1.5 / 6, 0])
    # The mean of two maxima, and of two population deviations over iterations.
    assert float(row["max_r2"]) == pytest.approx((5 / 6 + 3 / 6) / 2)
    deviations = pstdev([1 / 6, 5 / 6, 2 / 6]), pstdev([1 / 6, 2 / 6, 3 / 6])
    assert float(row["max_r2_deviation"]) == pytest.approx(fmean(deviations))
    assert row["max_r2_iterations"] == "1 2"
    assert float(row["final_r2"]) == pytest.approx(2.5 / 6)
    assert row["final_r2_low"] == row["final_r2_high"] == "", "two seeds say too little for an interval"
    # Questions gain 1, 1, 0, 1/2, 0 and -1 over M_0, as means over the two seeds.
    assert float(row["difference"]) == pytest.approx(1.5 / 6)
    assert row["questions"] == "6"
    exact = stats.permutation_test(([1, 1, 0, 0.5, 0, -1],), np.mean, permutation_type="samples", axis=0)
    assert float(row["p"]) == pytest.approx(exact.pvalue, abs=0.015)

    # Corrections of the final models gain 1, 1, 0, 1/2, 0 and 0 over their own first answers.
    assert float(row["delta"]) == pytest.approx(2.5 / 6)
    exact = stats.permutation_test(([1, 1, 0, 0.5, 0, 0],), np.mean, permutation_type="samples", axis=0)
    assert float(row["delta_p"]) == pytest.approx(exact.pvalue, abs=0.015)
    # Two corrections of the first seed, and three of the second, have other words than the answer.
    assert float(row["repeated"]) == pytest.approx((4 / 6 + 3 / 6) / 2)
    p = f"p = {float(row['delta_p']):.2g}; 58% repeat them."
    assert f"demo: EIE, M_2: corrections are not better than first answers: +0.417, {p}" in output

    (shown,) = (
        line for line in (tmp_path / "out/report.md").read_text().splitlines() if line.startswith("| EIE<br>")
    )
    cells = [cell.strip() for cell in shown.strip("|").split(" | ")]
    assert cells[:3] == [
        "EIE<br><sub>answers Mₙ₋₁, trains Mₙ₋₁</sub><br><sub>improving filter</sub>",
        "2",
        "0.167",
    ]
    assert cells[4] == "0.667 ± 0.210<br><sub>n = 1 to 2</sub>"
    assert cells[7].startswith("+0.417<br><sub>\\[+0.0")
    assert cells[7].endswith(f"<br><sub>p {float(row['delta_p']):.3f}</sub>")
    assert cells[8].startswith(f"+0.250<br><sub>\\[{MINUS}0.333, +0.7")
    assert cells[9].endswith("<br><sub>6 qu.</sub>")


def test_a_single_seed_has_no_interval(tmp_path):
    make_run(tmp_path / "a", [("000000", "000000"), ("100000", "111000")])
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "table2")
    assert [row[f"{name}_{end}"] for name in ("max_r2", "final_r2") for end in ("low", "high")] == [""] * 4


def test_a_maximum_may_be_that_of_m0_and_the_final_iteration_shows_the_collapse(tmp_path):
    make_run(tmp_path / "a", [("111100", "111110"), ("111100", "110000"), ("000000", "000000")])
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "table2")
    assert numbers(row, "max_r2", "max_r2_iterations", "final_r2") == pytest.approx([5 / 6, 0, 0])
    assert float(row["difference"]) == pytest.approx(-5 / 6)


def add_validation(folder: Path, *rewards: float) -> None:
    """Give the iterations of a run validation rewards r(Y2)."""
    for n, reward in enumerate(rewards):
        path = Run(folder).iteration(n).metrics
        write_json(path, read_json(path) | {"validation": {"r2": reward}})


def untest(folder: Path, n: int) -> None:
    """Leave iteration n as one that was not evaluated on the test questions."""
    files = Run(folder).iteration(n)
    files.test_answers(2).unlink()
    write_json(files.metrics, {k: v for k, v in read_json(files.metrics).items() if k != "test"})


def test_the_iteration_that_validation_chooses_is_beside_the_last_and_the_papers_maximum(tmp_path):
    tests = [("000000", "100000"), ("000000", "111110"), ("000000", "110000"), ("000000", "111000")]
    for seed, rewards in enumerate([(0.1, 0.2, 0.4, 0.4), (0.4, 0.3, 0.2, 0.1)], start=1):
        run = make_run(tmp_path / f"{seed}", tests, seed=seed)
        add_validation(run, *rewards)
        untest(run, 1)
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "table2")
    found = numbers(row, "chosen_r2", "max_r2", "final_r2")
    assert found == pytest.approx([(2 / 6 + 1 / 6) / 2, 3 / 6, 3 / 6]), "M_1, not tested, is no maximum"
    assert (row["chosen_r2_iterations"], row["max_r2_iterations"]) == ("0 2", "3")
    text = (tmp_path / "out/report.md").read_text()
    assert "| best by validation r(Y2) |" in text
    curves = rows(tmp_path / "out", "curves")
    assert [row["validation_r2"] for row in curves[:4]] == ["0.1", "0.2", "0.4", "0.4"]
    assert (curves[1]["r2"], curves[1]["wrong_to_right"]) == ("", "")


def test_without_validation_questions_nothing_is_said_of_them(tmp_path):
    make_run(tmp_path / "a", [("000000", "111100"), ("111100", "110000")])
    report(tmp_path, "--out", tmp_path / "out")
    assert rows(tmp_path / "out", "table2")[0]["chosen_r2"] == ""
    assert "best by validation r(Y2)" not in (tmp_path / "out/report.md").read_text()


def test_table_1_has_the_grid_and_table_2_the_variants(tmp_path):
    grid = list(itertools.product((1, 3), (1, 3)))
    for n_init, n_corr in grid:
        sizes = {"algorithm__init_args__n_init": n_init, "algorithm__init_args__n_corr": n_corr}
        make_run(tmp_path / f"{n_init}{n_corr}", TWO, "EIF", **sizes)
    make_run(tmp_path / "ene", TWO, "ENE", **sizes)
    report(tmp_path, "--out", tmp_path / "out")
    assert [(row["system"], row["n_init"], row["n_corr"]) for row in rows(tmp_path / "out", "table1")] == [
        (f"EIF, n_init={n_init}, n_corr={n_corr}", str(n_init), str(n_corr)) for n_init, n_corr in grid
    ]
    assert [row["system"] for row in rows(tmp_path / "out", "table2")] == ["EIF, n_init=3, n_corr=3", "ENE"]
    assert "**demo, EIF**" in (tmp_path / "out/report.md").read_text()
    # Figures 2 and 3 show what shares all options but the variant.
    assert (tmp_path / "out/figures/figure2-demo-r2.svg").read_text().count("ENE") >= 1


def test_p_is_adjusted_for_the_tests_of_a_table(tmp_path):
    for seed, (name, final) in enumerate({"EIE": "111111", "ENE": "111110", "FNF": "000000"}.items()):
        make_run(tmp_path / name, [("000000", "000000"), ("000000", final)], name, seed=seed)
    report(tmp_path, "--out", tmp_path / "out")
    table = {row["system"]: numbers(row, "p", "p_holm") for row in rows(tmp_path / "out", "table2")}
    assert table["EIE"][1] == pytest.approx(3 * table["EIE"][0])
    assert table["ENE"][1] == pytest.approx(2 * table["ENE"][0])
    assert table["FNF"] == [1, 1]


def test_baselines_are_beside_the_variants(tmp_path):
    rounds = {"rounds": {"r1": 0.0, "r2": 0.5, "r3": 0.75}, "samples": {"k": 4, "pass_r1": 0.25}}
    make_run(tmp_path / "a", TWO)
    make_run(tmp_path / "b", [("000000", "000000"), ("000000", "111000")], "STaR")
    make_run(tmp_path / "c", [("000000", "111000")], "SelfRefine", further=rounds)
    make_run(tmp_path / "d", [("000000", "111100")], "Reflexion", further=rounds, uses_references=True)
    report(tmp_path, "--out", tmp_path / "out")
    table = rows(tmp_path / "out", "table2")
    names = ["EIE", "STaR", "SelfRefine", "Reflexion (uses references at inference)"]
    assert [row["system"] for row in table] == names
    assert [row["uses_references"] for row in table] == ["False"] * 3 + ["True"]
    assert [row["n_init"] for row in table] == ["2", "", "", ""]
    assert [row["difference"] != "" for row in table] == [True, True, False, False]  # M_0 against itself
    pairs = {
        (row["system"], row["minus"]): float(row["difference"]) for row in rows(tmp_path / "out", "pairs")
    }
    assert pairs["EIE", "SelfRefine"] == pytest.approx(-2 / 6)
    further = {row["system"]: row for row in rows(tmp_path / "out", "further")}
    assert set(further) == {"SelfRefine", names[3]}
    assert numbers(further["SelfRefine"], "rounds.r3", "samples.pass_r1") == [0.75, 0.25]
    text = (tmp_path / "out/report.md").read_text()
    assert "| System | round r(Y1) | round r(Y2) | round r(Y3) | k | pass@k r(Y1) |" in text
    assert "| SelfRefine | 0.000 | 0.500 | 0.750 | 4 | 0.250 |" in text
    # An upper bound is not the best system, neither in bold nor in the lead.
    assert "**0.667" not in text
    assert "the highest final r(Y2) is that of STaR, 0.500" in text


# ---------------------------------------------------------------- pairs


def test_pairs_are_over_questions_and_the_seeds_that_both_have(tmp_path):
    nothing = ("000000", "000000")
    make_run(tmp_path / "eie-1", [nothing, ("000000", "111100")], seed=1)
    make_run(tmp_path / "eie-2", [nothing, ("000000", "111111")], seed=2)  # ENE has no such seed
    # Two samples of each question: means 1, 1/2, 0, 0, 0, 1/2.
    make_run(tmp_path / "ene-1", [nothing, ("0" * 12, "110000" + "100001")], "ENE", seed=1)
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "pairs")
    assert (row["system"], row["minus"], row["seeds"], row["questions"]) == ("EIE", "ENE", "1", "6")
    assert float(row["difference"]) == pytest.approx((4 - 2) / 6)


def test_unlike_test_sets_are_not_paired_and_that_is_said(tmp_path, capsys):
    tests = [("000000", "000000"), ("000000", "111100")]
    make_run(tmp_path / "a", tests)
    make_run(tmp_path / "b", tests, "ENE")
    make_run(tmp_path / "c", tests, "FNF", split="other")
    make_run(tmp_path / "d", tests, "FNE", seed=7)
    report(tmp_path, "--out", tmp_path / "out")
    assert [(row["system"], row["minus"]) for row in rows(tmp_path / "out", "pairs")] == [("EIE", "ENE")]
    sentence = "Systems are not paired across different test sets, of which there are 2: FNF | FNE, EIE, ENE."
    assert sentence in capsys.readouterr().out
    page = (tmp_path / "out/index.html").read_text()
    assert sentence in page
    assert "Not paired, for want of a common seed: FNE and EIE; FNE and ENE." in page


# ---------------------------------------------------------------- what corrections change, and cost


def test_what_corrections_change_stands_beside_what_those_of_m0_do(tmp_path):
    make_run(tmp_path / "a", [("110000", "100000"), ("110000", "011100")], seed=1)
    make_run(tmp_path / "b", [("110000", "100000"), ("110000", "111111")], seed=2)
    report(tmp_path, "--out", tmp_path / "out")
    (row,) = rows(tmp_path / "out", "corrections")
    shares = numbers(row, "wrong_to_right", "right_to_wrong", "right_to_right", "wrong_to_wrong")
    assert shares == pytest.approx([3 / 6, 0.5 / 6, 1.5 / 6, 1 / 6])
    assert numbers(row, "m0_wrong_to_right", "m0_right_to_wrong") == pytest.approx([0, 1 / 6])
    assert row["edited"] == "", "these runs do not say how much was changed"
    assert "50.0%<br><sub>M₀ 0.0%</sub>" in (tmp_path / "out/report.md").read_text()


def test_what_training_took_is_summed_over_iterations_and_starts(tmp_path):
    def run(name: str, seed: int, seconds: list[float]) -> None:
        tests, folder = [("000000", "000000")] * 3, tmp_path / f"{name}-{seed}"
        work = {"train": {"answers": 100 * seed, "tokens": 1000}, "training": {"steps": 7}}
        make_run(folder, tests, name, seed=seed, sizes=(5, 9), further=work)
        stopped = {"date": "before an iteration was done"}
        starts = [stopped, *({"seconds": of, "processes": 2} for of in seconds)]
        write_json(Run(folder).starts, {"starts": starts})

    run("EIE", 1, [1800.0, 3600.0])
    run("EIE", 2, [1800.0])
    run("ENE", 1, [3600.0])
    make_run(tmp_path / "older", [("000000", "000000")] * 2, "FNF", sizes=(4,))
    make_run(tmp_path / "nothing-trained", [("000000", "000000")], "SelfRefine")
    report(tmp_path, "--out", tmp_path / "out")
    fnf, eie, ene = rows(tmp_path / "out", "cost")
    names = ("answers", "tokens", "learnt", "steps", "hours")
    assert numbers(eie, *names) == pytest.approx([300, 2000, 14, 14, 2.0])
    assert numbers(ene, *names) == pytest.approx([200, 2000, 14, 14, 2.0])
    assert [fnf[name] for name in names] == ["", "", "4", "", ""], "a run of an earlier version"


# ---------------------------------------------------------------- runs and curves


def test_runs_and_curves_by_hand(tmp_path):
    make_run(tmp_path / "a", [("100000", "110000"), ("111000", "111100")], seed=1, sizes=(4,))
    make_run(tmp_path / "b", [("000000", "000000")], seed=2, planned=1)
    report(tmp_path, "--out", tmp_path / "out")
    first, second = rows(tmp_path / "out", "runs")
    assert [first[name] for name in ("run", "seed", "last_iteration", "iterations")] == ["a", "1", "1", "1"]
    assert [second[name] for name in ("run", "seed", "last_iteration", "iterations")] == ["b", "2", "0", "1"]
    errors = [stats.sem([1, 1, 1, 0, 0, 0]), stats.sem([1, 1, 1, 1, 0, 0])]
    assert numbers(first, "r1", "r1_se", "r2", "r2_se") == pytest.approx([3 / 6, errors[0], 4 / 6, errors[1]])
    curves = rows(tmp_path / "out", "curves")
    assert [(row["run"], row["iteration"], row["dataset_size"]) for row in curves] == [
        ("a", "0", ""),
        ("a", "1", "4"),
        ("b", "0", ""),
    ]
    transitions = ("right_to_right", "wrong_to_right", "right_to_wrong", "wrong_to_wrong")
    assert numbers(curves[1], *transitions) == [3, 1, 0, 2]
    text = (tmp_path / "out/report.md").read_text()
    table = "| System | n = 0 | n = 1 |\n| --- | ---: | ---: |\n"
    assert f"**r(Y1)**\n\n{table}| EIE | 0.083 | 0.500 |\n" in text
    assert f"**\\|Dₙ\\|**\n\n{table}| EIE | {DASH} | 4 |\n" in text


def test_settings_that_differ_and_links_to_configs(tmp_path):
    prompts = [{"role": "user", "content": "{question} " * 20}]
    make_run(tmp_path / "runs/one & two/a", TWO, data__prompts__initial=prompts)
    make_run(tmp_path / "runs/b", TWO, model__learning_rate=2e-4, data__prompts__initial=[])
    make_run(tmp_path / "runs/c", TWO, "STaR", model__learning_rate=2e-4, algorithm__init_args__hint=True)
    report(tmp_path / "runs", "--out", tmp_path / "out")
    found = [
        (row["option"], row["value"], row["systems"].count(";") + 1)
        for row in rows(tmp_path / "out", "settings")
    ]
    assert sorted(found) == sorted(
        [
            ("algorithm.hint", "", 2),
            ("algorithm.hint", "true", 1),
            ("data.prompts.initial", json.dumps(prompts), 1),
            ("data.prompts.initial", "[]", 1),
            ("data.prompts.initial", "", 1),
            ("model.learning_rate", "0.0001", 1),
            ("model.learning_rate", "0.0002", 2),
        ]
    )
    page = (tmp_path / "out/index.html").read_text()
    links = [unquote(link) for link in re.findall(r'<a href="([^"#]+)">config\.yaml</a>', page)]
    assert sorted(links) == sorted(f"../runs/{run}/config.yaml" for run in ("one & two/a", "b", "c"))
    for link in links:
        assert (tmp_path / "out" / link).is_file()
    assert "](../runs/one%20%26%20two/a/config.yaml)" in (tmp_path / "out/report.md").read_text()


# ---------------------------------------------------------------- the paper's curves


def paper_report(tmp_path: Path, **options: object) -> Path:
    make_run(tmp_path / "run", TWO)
    paper = write_paper(tmp_path / "paper.csv", **options)
    report(tmp_path / "run", "--out", tmp_path / "out", "--paper", paper)
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
    assert f"{MINUS}0.224" in (out / "report.md").read_text()  # the gain of ENE, from its means
    assert "stroke-dasharray" in (out / "figures/figure2-paper-phi3-mini-1-5-r2.svg").read_text()


def test_the_papers_correlation_rests_on_one_variant(tmp_path):
    out = paper_report(tmp_path)
    found = {
        (row["variants"], row["left_out"]): row
        for row in rows(out, "correlation")
        if row["panel"].startswith("paper")
    }
    assert found["all variants", ""]["points"] == "40"
    assert float(found["all variants", ""]["r"]) == pytest.approx(-0.51, abs=0.005)  # section 4.2
    assert float(found["all variants", "ENE"]["r"]) == pytest.approx(-0.06, abs=0.005)
    assert found["all variants", "ENE"]["r_low"] == ""  # three runs are too few for an interval
    assert found["all variants", "ENE"]["systems"] == "FIE, FNE, EIE"
    assert f"<br><sub>ENE: {MINUS}0.06</sub> |" in (out / "report.md").read_text()


def test_what_the_paper_does_not_tell_stays_unknown(tmp_path):
    out = paper_report(tmp_path, unknown=[("EIE", 4), *(("FNE", n) for n in range(11))])
    table = {row["system"]: row for row in rows(out, "table2") if row["source"] == "paper"}
    assert table["EIE"]["max_r2"] == ""  # it might have been at iteration 4
    assert float(table["EIE"]["final_r2"]) == 0.370
    assert (table["FNE"]["m0_r2"], table["FNE"]["final_r2"]) == ("", "")
    (row,) = (
        row for row in rows(out, "curves") if (row["run"], row["iteration"]) == ("Phi3-mini EIE (1, 5)", "4")
    )
    assert (row["r2"], row["dataset_size"], row["seed"]) == ("", "45", "")
    (row,) = (
        row for row in rows(out, "correlation") if row["panel"].startswith("paper") and not row["left_out"]
    )
    assert row["points"] == "28"


# ---------------------------------------------------------------- |D_n| and gain


def test_the_correlation_by_numpy(tmp_path):
    nothing = ("000000", "000000")
    make_run(tmp_path / "a", [nothing, ("000000", "111000"), ("000000", "111100")], sizes=(10, 40))
    make_run(tmp_path / "b", [nothing, ("000000", "100000")], "ENF", sizes=(25,))
    report(tmp_path, "--out", tmp_path / "out")
    found = {(row["variants"], row["left_out"]): row for row in rows(tmp_path / "out", "correlation")}
    by_numpy = np.corrcoef([10, 40, 25], [3 / 6, 1 / 6, 1 / 6])[0, 1]
    assert float(found["all variants", ""]["r"]) == pytest.approx(by_numpy)
    assert (found["all variants", ""]["runs"], found["all variants", ""]["r_low"]) == ("2", "")
    assert ("all variants", "EIE") not in found  # one point has no correlation
