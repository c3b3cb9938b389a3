"""The folder of a report: its page, its figures, and whatever models and options may say."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from report_page import Page
from report_runs import (
    THREE_ITERATIONS,
    contents,
    failure,
    make_run,
    questions,
    report,
    trajectory,
    write_iteration,
    write_paper,
)

from stasc.report.browser import pieces
from stasc.run import Run, write_lines
from stasc.trajectory import Answer, Records, Trajectory, to_json

ONE = [("000000", "000000")]
TWO = [("000000", "000000"), ("000000", "100000")]

# ---------------------------------------------------------------- the folder


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(tmp_path):
    folders = [
        make_run(tmp_path / f"runs/{name}-{seed}", THREE_ITERATIONS, name, seed=seed)
        for name in ("EIE", "FNF")
        for seed in (1, 2)
    ]
    paper = write_paper(tmp_path / "paper.csv")
    report(tmp_path / "runs", "--out", tmp_path / "one", "--paper", paper)
    report(*reversed(folders), "--out", tmp_path / "two", "--paper", paper)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    report(tmp_path / "runs", "--out", tmp_path / "one", "--paper", paper)
    assert contents(tmp_path / "one") == before


def test_a_users_files_are_left_alone(tmp_path, capsys):
    run = make_run(tmp_path / "run", TWO)
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


def test_the_report_starts_without_torch():
    program = (
        "import sys, stasc.report.command; print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- figures


def test_figures_are_whole(tmp_path):
    for name in ("EIE", "ENF", "FIE"):
        make_run(tmp_path / "runs" / name, THREE_ITERATIONS, name, sizes=(3, 8))
    report(tmp_path / "runs", "--out", tmp_path / "out")
    figures = {path.name for path in (tmp_path / "out/figures").iterdir()}
    names = ["figure2-demo-r1", "figure2-demo-r2", "figure3-demo-r1", "figure3-demo-r2", "figure4-demo"]
    names += [
        "delta-demo",
        "sizes-demo",
        "gains-demo",
        "transitions-eie",
        "transitions-enf",
        "transitions-fie-sc",
    ]
    assert figures == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    for name in names:
        ElementTree.parse(tmp_path / f"out/figures/{name}.svg")
        assert (tmp_path / f"out/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in (tmp_path / "out/report.md").read_text()
    # A variant has one colour everywhere.
    blue = "#2b7bba"  # of improving filter and evolving fine-tuning
    for name in ("figure2-demo-r2", "figure3-demo-r2", "sizes-demo", "gains-demo"):
        assert blue in (tmp_path / f"out/figures/{name}.svg").read_text()


def test_no_label_of_a_figure_is_cut_off(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig

    def save_and_look(figure: Figure, *arguments: object, **options: object) -> None:
        save(figure, *arguments, **options)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        drawn.append(axes.get_ylabel())
        box = figure.get_tightbbox()
        assert 0 <= box.x0 < box.x1 <= figure.get_figwidth(), drawn[-1]
        assert 0 <= box.y0 < box.y1 <= figure.get_figheight(), drawn[-1]

    monkeypatch.setattr(Figure, "savefig", save_and_look)
    nothing = ("0" * 40, "0" * 40)  # gains of a fortieth, whose ticks are long
    few = ("0" * 40, "1" + "0" * 39)
    make_run(tmp_path / "a", [nothing, few, nothing], sizes=(1234, 98765))
    make_run(tmp_path / "b", [nothing, few, nothing], "AnAlgorithmWithALongName")
    make_run(tmp_path / "c", [nothing, few], data__prompts="configs/prompts/of_a_name_that_is_very_long.yaml")
    report(*(tmp_path / name for name in "abc"), "--out", tmp_path / "out")
    assert "gain: r(Y2) of Mₙ less Mₙ₋₁" in drawn


def test_a_system_without_iterations_has_a_bar_like_others_and_one_tick(tmp_path, monkeypatch):
    drawn = {}
    save = Figure.savefig

    def save_and_look(figure: Figure, *arguments: object, **options: object) -> None:
        save(figure, *arguments, **options)
        (axes,) = figure.axes
        drawn[axes.get_ylabel()] = axes

    monkeypatch.setattr(Figure, "savefig", save_and_look)
    report(make_run(tmp_path / "run", ONE, "SelfRefine"), "--out", tmp_path / "out")
    axes = drawn["share of pairs"]
    assert list(axes.get_xticks()) == [0]
    left, right = axes.get_xlim()
    assert right - left > 5 * axes.patches[0].get_width()


# ---------------------------------------------------------------- the page

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    '" onload="alert(1)" \' `${document}` {{ 7 * 7 }} {% raw %} $data &lt;b&gt;',
    "\u2028\u2029\u0000\u0007\ud800 lone \udfff",
    "\u202ereversed\u2066 \u0645\u0631\u062d\u0628\u0627",
    "long" * 2000,
    "| a | b |\n---\n# head",
)


def rewrite(path: Path, trajectories: list[Trajectory]) -> None:
    """Write a file of trajectories with characters that UTF-8 has not, as JSON escapes."""
    lines = (json.dumps(json.loads(to_json(trajectory))) for trajectory in trajectories)
    write_lines(path, lines)


def test_whatever_a_model_writes_is_text(tmp_path):
    make_run(tmp_path / "tame", TWO)
    hostile = make_run(tmp_path / 'x<b onclick="f()">&', TWO)
    texts = iter(HOSTILE * 5)

    def spoil(answer: Answer) -> Answer:
        return replace(answer, text=next(texts))

    test, first = (Run(hostile).iteration(n).test_answers(2) for n in (1, 0))
    spoilt = [
        Trajectory(replace(t.question, references=(next(texts),)), tuple(map(spoil, t.answers)))
        for t in Records(test)
    ]
    before = [replace(old, question=new.question) for old, new in zip(Records(first), spoilt, strict=True)]
    rewrite(test, spoilt)
    rewrite(first, before)

    report(tmp_path / "tame", "--out", tmp_path / "out-tame")
    report(hostile, "--out", tmp_path / "out")
    page = Page(tmp_path / "out/index.html")
    assert page.elements == Page(tmp_path / "out-tame/index.html").elements
    assert page.errors == []
    shown = page.shown()
    for t in spoilt:
        assert [answer.text for answer in t.answers] in shown
    assert 'x<b onclick="f()">&' in page.text
    assert (tmp_path / "out/index.html").read_bytes().count(b"<script") == 2
    assert "<b" not in (tmp_path / "out/report.md").read_text().replace("<br>", "").replace("\\<", "")


def test_whatever_an_option_says_is_text(tmp_path):
    name = "</svg><img src=x onerror=alert(1)>|`$data$ {{ 7 * 7 }} ${title}\t_*"
    make_run(tmp_path / "a", TWO)
    make_run(tmp_path / "b", TWO, model__base=name)
    report(tmp_path / "a", "--out", tmp_path / "out-a")
    report(tmp_path / "b", "--out", tmp_path / "out-b")
    tame, hostile = Page(tmp_path / "out-a/index.html"), Page(tmp_path / "out-b/index.html")
    drawn = ("g", "path", "use", "text")
    elements = [[element for element in page.elements if element[0] not in drawn] for page in (tame, hostile)]
    assert elements[0] == elements[1]
    assert hostile.errors == []
    assert "{{ 7 * 7 }}" in hostile.text
    for svg in (tmp_path / "out-b/figures").glob("*.svg"):
        ElementTree.parse(svg)
    text = (tmp_path / "out-b/report.md").read_text()
    assert "<img" not in text.replace("\\<img", "")
    assert "\\_\\*: the highest final r(Y2)" in text  # in the lead too


def test_the_page_needs_nothing_else(tmp_path):
    make_run(tmp_path / "run", TWO)
    report(tmp_path / "run", "--out", tmp_path / "out")
    page = Page(tmp_path / "out/index.html")
    assert page.errors == []
    inside = {link for link in page.links if link.startswith("#")}
    assert {link[1:] for link in inside} <= set(page.ids)
    assert set(page.links) - inside == {"../run/config.yaml"}
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    text = (tmp_path / "out/index.html").read_text()
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(http" not in text
    # Tables for screen readers: every header says what it heads.
    headers = [element for element in page.elements if element[0] == "th"]
    assert headers
    assert all("scope" in element for element in headers)


def test_a_long_name_of_a_row_may_be_broken():
    # Unbroken, it pushes the last columns of Table 2 out of view.
    style = (Path(__file__).parent.parent / "stasc/report/page.css").read_text()
    unbroken = [line for line in style.splitlines() if "white-space: nowrap" in line]
    assert len(unbroken) == 1
    assert unbroken[0].startswith("td {")


def test_the_page_shows_a_stated_sample(tmp_path):
    make_run(tmp_path / "run", [("000000", "000000"), ("000011", "110001")])
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


def test_greedy_answers_and_chains_of_any_length_can_be_browsed(tmp_path):
    run = make_run(tmp_path / "run", ONE)
    iteration = Run(run).iteration(0)
    shutil.copy(iteration.test_answers(2), iteration.test_greedy)
    (question, other) = questions("test", 2)
    write_lines(
        iteration.test_answers(3), map(to_json, [trajectory(question, "001"), trajectory(other, "1")])
    )
    report(run, "--out", tmp_path / "out", "--trajectories", 12)
    data = Page(tmp_path / "out/index.html").data
    strata = {(split, data["transitions"][kind]): count for _, _, split, kind, count in data["strata"]}
    assert strata == {
        ("test", "wrong_to_wrong"): 6,
        ("test, greedy", "wrong_to_wrong"): 6,
        ("test, turn 3", "wrong_to_right"): 1,  # of the last turn, whatever there was before
        ("test, turn 3", "right_to_right"): 1,
    }
    longest = max((answers for *_, answers in data["trajectories"]), key=len)
    assert [answer[:4] for answer in longest] == [
        [0, 0.0, False, True],
        [0, 0.0, False, True],
        [0, 1.0, True, True],
    ]
    assert longest[2][4:] != [["", "It is Ruth."]]


def test_training_answers_of_any_number_of_turns_can_be_browsed(tmp_path):
    run = make_run(tmp_path / "run", TWO)
    iteration = Run(run).iteration(1)
    write_lines(iteration.answers(3), [to_json(trajectory(questions("train", 1)[0], "010"))])
    report(run, "--out", tmp_path / "out")
    data = Page(tmp_path / "out/index.html").data
    assert {split for _, _, split, *_ in data["strata"]} == {"test", "train", "train, turn 3"}
    iteration.answers(3).unlink()
    iteration.answers(2).unlink()
    write_lines(iteration.answers(1), [to_json(trajectory(q, "1")) for q in questions("train", 3)])
    report(run, "--out", tmp_path / "out")
    data = Page(tmp_path / "out/index.html").data
    train = [
        (data["transitions"][kind], count) for _, _, split, kind, count in data["strata"] if split == "train"
    ]
    assert train == [("right_to_right", 3)]


# ---------------------------------------------------------------- references in answers


@pytest.mark.parametrize(
    ("text", "references", "marked"),
    [
        ("The answer is Ruth.", ["Ruth"], ["Ruth"]),
        ("No, it is: JEAN-PAUL  Sartre!", ["Jean Paul Sartre"], ["JEAN-PAUL  Sartre"]),
        ("a Café, cafe\u0301 and cafes", ["cafe"], ["Café", "cafe\u0301"]),
        ("It was 1915, not 15.", ["15"], ["15"]),
        ("The Beatles; beatles", ["the beatles"], ["The Beatles", "beatles"]),
        ("It was Beatles.", ["The Beatles"], ["Beatles"]),
        ("Vitamin C", ["Vitamin A"], []),
        ("no such thing", ["?!", "", "the"], []),
        ("x-y and y-z", ["x y", "y and y"], ["x-y"]),
        ("first Ruth. Final answer: Tim and Ruth", ["Ruth"], ["Ruth", "Ruth"]),
        ("", ["Ruth"], []),
    ],
)
def test_references_are_marked_in_answers(text, references, marked):
    parts = pieces(text, references)
    assert "".join(parts) == text
    assert parts[1::2] == marked


def test_only_what_a_reward_looks_at_is_marked(tmp_path):
    parts = pieces("Ruth? Final Answer: Ruth", ["Ruth"], "final answer:")
    assert parts == ["Ruth? Final Answer: ", "Ruth", ""]
    assert pieces("Ruth", ["Ruth"], "final answer:") == ["Ruth"]
    run = make_run(tmp_path / "run", ONE, data__answer__init_args__marker="it is")
    write_iteration(run, 0, [trajectory(question, "01") for question in questions("test", 6)], [], 0, {})
    report(run, "--out", tmp_path / "out")
    answers = Page(tmp_path / "out/index.html").data["trajectories"][0][2]
    assert [answer[4] for answer in answers] == [["It is Tim."], ["It is ", "Ruth", "."]]
