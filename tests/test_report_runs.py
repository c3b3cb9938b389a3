"""Reading run folders and the paper's curves, and which runs are one system."""

import shutil
from pathlib import Path

import pytest
from report_runs import (
    change_system,
    failure,
    make_run,
    questions,
    report,
    rows,
    trajectory,
    write_iteration,
    write_paper,
)

from stasc.report.paper import read_paper
from stasc.report.runs import read_runs
from stasc.report.systems import group_runs, panels
from stasc.run import Run, write_lines
from stasc.trajectory import to_json

ONE = [("000000", "000000")]
TWO = [("000000", "000000"), ("000000", "100000")]


def labels(*runs: Path) -> list[tuple[str, int]]:
    return [(system.name, len(system.runs)) for system in group_runs(read_runs(runs)[0])]


# ---------------------------------------------------------------- systems


def test_seeds_are_one_system(tmp_path):
    make_run(tmp_path / "a", ONE, seed=10)
    make_run(tmp_path / "b", ONE, seed=9)
    assert labels(tmp_path) == [("EIE", 2)]
    (system,) = group_runs(read_runs([tmp_path])[0])
    assert [run.record.seed for run in system.runs] == [9, 10]


def test_another_option_makes_another_system_and_is_named(tmp_path):
    make_run(tmp_path / "a", ONE)
    make_run(tmp_path / "b", ONE, model__learning_rate=1e-5)
    make_run(tmp_path / "c", ONE, algorithm__init_args__epochs=2)
    make_run(tmp_path / "d", ONE, "FIE")
    make_run(tmp_path / "e", ONE, planned=3)
    change_system(make_run(tmp_path / "f", ONE, "FIE"), threshold=0.5)
    assert labels(tmp_path) == [
        ("FIE, threshold=0.5 (SC) · demo, learning_rate=0.0001", 1),
        ("FIE, threshold=1.0 (SC) · demo, learning_rate=0.0001", 1),
        ("EIE, iterations=0 · demo, learning_rate=0.0001", 1),
        ("EIE, iterations=0, epochs=2 · demo, learning_rate=0.0001", 1),
        ("EIE, iterations=3 · demo, learning_rate=0.0001", 1),
        ("EIE · demo, learning_rate=1e-05", 1),
    ]


def test_the_names_of_models_and_classes_are_short_unless_two_are_the_same(tmp_path):
    make_run(tmp_path / "a", ONE, model__base="models/one/Qwen2.5-1.5B/")
    make_run(tmp_path / "b", ONE, model__base="models/two/Phi3.5-mini")
    assert labels(tmp_path) == [("EIE · Phi3.5-mini", 1), ("EIE · Qwen2.5-1.5B", 1)]
    make_run(tmp_path / "c", ONE, model__base="models/two/Qwen2.5-1.5B")
    assert ("EIE · models/two/Qwen2.5-1.5B", 1) in labels(tmp_path)
    make_run(tmp_path / "x/1", ONE, "Mine", algorithm__class_path="one.Mine")
    make_run(tmp_path / "x/2", ONE, "Mine", algorithm__class_path="two.Mine")
    assert labels(tmp_path / "x") == [("Mine, one.Mine", 1), ("Mine, two.Mine", 1)]


def test_tasks_that_differ_in_much_are_told_apart_by_little(tmp_path):
    for name, task in (("EIE", "sums"), ("ENE", "sums"), ("EIF", "letters")):
        of_task = {
            f"data__{option}": f"{option} of {task}" for option in ("train", "answer", "reward", "test")
        }
        make_run(tmp_path / name, ONE, name, **of_task, data__prompts=[task])
    assert labels(tmp_path) == [
        ("EIF · demo, test=test of letters", 1),
        ("EIE · demo, test=test of sums", 1),
        ("ENE · demo, test=test of sums", 1),
    ]


def test_an_option_of_any_length_has_a_name_that_fits_in_a_file_name(tmp_path):
    for name in ("one", "two"):
        make_run(tmp_path / name, ONE, data__test=f"{name} {'long ' * 100}")
        make_run(tmp_path / f"{name}-too", ONE, model__base=f"{name}{'-long' * 40}")
    report(tmp_path, "--out", tmp_path / "out")
    assert "EIE · demo, test no. 2" in (tmp_path / "out/report.md").read_text()
    pictures = [path.name for path in (tmp_path / "out/figures").glob("transitions-*.svg")]
    assert len(pictures) == 4
    assert max(map(len, pictures)) < 128


def test_a_system_is_the_same_whether_or_not_its_options_name_the_variant(tmp_path):
    make_run(tmp_path / "a", TWO, "EIE", algorithm__init_args__variant="EIE")
    make_run(tmp_path / "b", TWO, "ENE", algorithm__init_args__variant="ENE")
    (panel,) = panels(group_runs(read_runs([tmp_path])[0]))
    assert [system.name for system in panel.systems] == ["EIE", "ENE"]


def test_panels_of_one_model_differ_in_their_titles(tmp_path):
    for name in ("EIE", "ENE"):
        for epochs in (1, 2):
            make_run(tmp_path / f"{name}{epochs}", TWO, name, algorithm__init_args__epochs=epochs)
        make_run(tmp_path / f"{name}-3", TWO, name, algorithm__init_args__n_corr=3)
    titles = [panel.title for panel in panels(group_runs(read_runs([tmp_path])[0]))]
    assert len(titles) == len(set(titles)) == 3
    assert "demo (2, 2), epochs=2" in titles


def test_systems_of_a_users_own(tmp_path):
    make_run(tmp_path / "a", TWO, "new")
    make_run(tmp_path / "b", TWO, "STaR", seed=2)
    (tmp_path / "a/iteration-01.tmp").mkdir()
    shutil.copy(tmp_path / "a/iteration-01/metrics.json", tmp_path / "a/iteration-01.tmp")
    report(tmp_path, "--out", tmp_path / "out")
    assert [row["system"] for row in rows(tmp_path / "out", "table2")] == ["STaR", "new"]
    assert "new from 0.000 to 0.167" in (tmp_path / "out/report.md").read_text()


def test_a_run_is_not_counted_twice(tmp_path, capsys):
    run = make_run(tmp_path / "runs/a", ONE)
    report(run, tmp_path / "runs", run, "--out", tmp_path / "out")
    assert "1 run of 1 system" in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "runs/copy")
    assert "a and copy are the same run" in failure(capsys, tmp_path / "runs", "--out", tmp_path / "out")


def test_seeds_of_one_system_have_one_test_set(tmp_path, capsys):
    make_run(tmp_path / "a", ONE, seed=1)
    make_run(tmp_path / "b", ONE, seed=2, split="other")
    assert "a and b have the same options but other test questions" in failure(capsys, tmp_path)


# ---------------------------------------------------------------- chains of answers


def test_an_answer_that_is_not_corrected_stands(tmp_path):
    run = make_run(tmp_path, ONE)
    first, second, third = questions("test", 3)
    test = [trajectory(first, "1"), trajectory(second, "011"), trajectory(third, "00")]
    write_iteration(run, 0, test, [], 0, {})
    ((result,), _) = read_runs([run])
    assert result.points[0].rewards == {"test-0": (1, 1), "test-1": (0, 1), "test-2": (0, 0)}


# ---------------------------------------------------------------- unfinished and broken runs


def test_unfinished_runs_are_drawn_and_said_and_not_averaged(tmp_path, capsys):
    whole = [("000000", "000000"), ("000000", "110000"), ("000000", "111000")]
    make_run(tmp_path / "a", whole, seed=1)
    make_run(tmp_path / "b", whole[:2], seed=2, planned=2)
    make_run(tmp_path / "c", whole[:2], "ENE", planned=9)
    begun = make_run(tmp_path / "d", whole, seed=4)
    shutil.rmtree(begun / "iteration-00")
    drawing = make_run(tmp_path / "e", whole, seed=5)
    for folder in drawing.glob("iteration-*"):
        shutil.rmtree(folder)
    (drawing / "draws").mkdir()
    report(tmp_path, "--out", tmp_path / "out")
    output = capsys.readouterr().out
    assert "b is unfinished: iteration 1 of 2." in output
    assert "c is unfinished: iteration 1 of 9." in output
    for name in "de":
        assert f"{name} has begun and has not evaluated M_0 yet: it is left out." in output
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


def learnt(path: Path) -> None:
    """Write examples of D_n where trajectories belong."""
    write_lines(path, [to_json(trajectory(question, "01").learn()) for question in questions("test", 6)])


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
        ("iteration-01/test.jsonl", learnt),
        (
            "iteration-01/test.jsonl",
            lambda path: path.write_text(path.read_text().replace('"reward": 1', '"reward": 0')),
        ),
        (
            "iteration-01/test.jsonl",
            lambda path: write_lines(path, [to_json(trajectory(q, "")) for q in questions("test", 6)]),
        ),
        ("iteration-02/trajectories.jsonl", lambda path: path.write_text("null\n")),
        ("iteration-02/trajectories.jsonl", Path.unlink),
        ("system.json", lambda path: cut(path, 30)),
        ("system.json", lambda path: path.write_text('{"seed": 1}')),
    ],
)
def test_a_broken_file_is_named(tmp_path, capsys, broken, spoil):
    run = make_run(tmp_path / "run", [("000000", "000000"), ("000000", "110000"), ("000000", "111000")])
    spoil(run / broken)
    assert broken in failure(capsys, run, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_questions_in_a_later_iteration(tmp_path, capsys):
    run = make_run(tmp_path / "run", TWO)
    other = make_run(tmp_path / "other", TWO, split="other")
    shutil.copy(other / "iteration-01/test.jsonl", run / "iteration-01/test.jsonl")
    assert "iteration-01/test.jsonl has other questions than" in failure(capsys, run)


def test_places_without_runs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no run to report in" in failure(capsys, tmp_path / "empty")
    assert "is not a folder" in failure(capsys, tmp_path / "nothing")
    assert "RUN" in failure(capsys)
    Run(make_run(tmp_path / "old", ONE)).system.unlink()  # as earlier versions wrote it
    assert "has a system.json" in failure(capsys, tmp_path / "old")


# ---------------------------------------------------------------- the paper's curves


def test_the_papers_curves_are_runs(tmp_path):
    path = write_paper(tmp_path / "paper.csv", unknown=[("EIE", 4)])
    systems = group_runs(read_paper(path), paper=True)
    assert [system.label for system in systems] == ["FIE (SC)", "FNE", "EIE", "ENE"]
    eie = systems[2]
    assert (eie.bench, eie.sizes, eie.paper) == ("paper: Phi3-mini", (1, 5), True)
    (run,) = eie.runs
    assert (run.last, run.finished) == (10, True)
    assert [run.points[n].r2 for n in (3, 4, 5)] == [0.394, None, 0.386]
    assert [run.points[n].size for n in (0, 1, 2)] == [None, 161, 66]  # what was kept of the draws before


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda text: text.replace("n_filtered", "kept"), "has no column n_filtered"),
        (lambda text: text.replace("0.356", "high", 1), "line 4: corr_test cannot be 'high'"),
        (lambda text: text.replace("FNE,1,5,0,", "FNE,1,,0,"), "line 13: N_corr is missing"),
        (lambda text: text.replace("mini,FNE,1,5,0,", "mini,,1,5,0,"), "line 13: variant is missing"),
        (lambda text: text + '"', "paper.csv cannot be read"),
        (
            lambda text: text.replace("FNE,1,5,3,", "FNE,1,5,30,"),
            "the iterations of Phi3-mini FNE (1, 5) are not",
        ),
        (lambda text: text.splitlines()[0], "has no rows"),
        (lambda text: text + text.splitlines()[3] + "\n", "this row's curve and iteration were there before"),
        (lambda text: text.replace("0.356", "35.6", 1), "line 4: corr_test cannot be '35.6'"),
    ],
)
def test_a_spoilt_file_of_curves(tmp_path, capsys, spoil, sentence):
    run = make_run(tmp_path / "run", ONE)
    paper = write_paper(tmp_path / "paper.csv")
    paper.write_text(spoil(paper.read_text()))
    assert sentence in failure(capsys, run, "--out", tmp_path / "out", "--paper", paper)
