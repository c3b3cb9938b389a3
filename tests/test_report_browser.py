"""The report's page in a real browser: sorted tables, filters in the address, one question followed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_runs import THREE_ITERATIONS, make_run, report

from stasc.run import Run, write_lines
from stasc.trajectory import Records, to_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium, chromium-browser or google-chrome"),
]
LONG = "A long way round. " * 100


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of two systems, two iterations each, and a long answer."""
    folder = tmp_path_factory.mktemp("report")
    make_run(folder / "runs/a", [("000000", "000000"), ("000000", "110000")], "EIE")
    make_run(folder / "runs/b", [("000000", "000000"), ("000000", "111100")], "ENE")
    make_run(folder / "long/a", THREE_ITERATIONS, "Reflexion", uses_references=True)
    prompts = "configs/prompts/of_a_name_that_is_very_long.yaml"
    make_run(folder / "long/b", THREE_ITERATIONS, "AnAlgorithmOfAVeryLongName", data__prompts=prompts)
    report(folder / "long", "--out", folder / "long/out")
    test = Run(folder / "runs/a").iteration(1).test_answers(2)
    write_lines(test, [to_json(t).replace("It is Tim.", LONG) for t in Records(test)])
    report(folder / "runs", "--out", folder / "out", "--trajectories", 2)
    return folder / "out/index.html"


@pytest.fixture
def browse(page, tmp_path):
    """Opens the page at a fragment, runs a script in it as a reader's hand, and gives the script's value."""

    def run(fragment: str, script: str, shown: Path = page, width: int = 1400) -> Any:
        # The page lets no script run but its own.
        text, replaced = re.subn(r"<meta http-equiv=.Content-Security-Policy.*?>", "", shown.read_text())
        assert replaced == 1
        tail = (
            f"<pre id=seen></pre><script>seen.textContent = JSON.stringify((() => {{{script}}})())</script>"
        )
        copy = tmp_path / "page.html"
        copy.write_text(text.replace("</body>", f"{tail}</body>"))
        options = (
            *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            f"--window-size={width},1000",
        )
        done = subprocess.run(
            [CHROMIUM, *options, "--dump-dom", f"{copy.as_uri()}{fragment}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1]))

    return run


CARDS = "const cards = () => [...document.querySelectorAll('#found .meta bdi')].map((e) => e.textContent);"


def test_filters_stand_in_the_address(browse):
    seen = browse(
        "#trajectories?run=ENE%2C+seed+1&transition=wrong_to_right&split=test",
        CARDS
        + """
        const first = cards(), form = document.getElementById("filters");
        form.elements.iteration.value = "0";
        form.elements.iteration.dispatchEvent(new Event("input", { bubbles: true }));
        return { first, then: cards(), hash: location.hash };""",
    )
    assert len(seen["first"]) == 2
    assert all(card.startswith("ENE, seed 1 · iteration 1 · test · question test-") for card in seen["first"])
    assert seen["then"] == []
    assert seen["hash"] == "#trajectories?run=ENE%2C+seed+1&split=test&iteration=0&transition=wrong_to_right"


def test_a_question_is_followed_by_one_click(browse):
    seen = browse(
        "#trajectories?split=test&iteration=0",
        CARDS
        + """
        const question = document.querySelector("#found h3").textContent;
        document.querySelector("#found .follow a").click();
        dispatchEvent(new Event("hashchange")); // which the browser sends a moment later
        return { question, cards: cards(), hash: location.hash };""",
    )
    name = seen["question"].removeprefix("Who is ").removesuffix("?").replace(" ", "-")
    assert seen["hash"] == f"#trajectories?question={name}"
    expected = [(system, n) for system in ("EIE", "ENE") for n in (0, 1)]
    assert [card.partition(" · test")[0] for card in seen["cards"]] == [
        f"{system}, seed 1 · iteration {n}" for system, n in expected
    ]
    assert all(f"question {name}," in card for card in seen["cards"])


def test_a_click_on_a_heading_sorts_a_table(browse):
    rows = browse(
        "",
        """
        const table = document.querySelector("[aria-label^='Table 2']:is(table)");
        const cells = () => [...table.querySelectorAll("tbody th[scope=row]")];
        const names = () => cells().map((e) => e.firstChild.textContent.trim());
        const heading = [...table.querySelectorAll("thead th")].find((e) => e.textContent === "final r(Y2)");
        const seen = [names()];
        for (let i = 0; i < 2; i++) {
          heading.querySelector("button").click();
          seen.push(names(), heading.getAttribute("aria-sort"));
        }
        return seen;""",
    )
    assert rows == [["EIE", "ENE"], ["ENE", "EIE"], "descending", ["EIE", "ENE"], "ascending"]


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_long_names_push_nothing_out_of_reach(browse, page, width):
    """A table that is wider than the window scrolls; on a wide one nothing needs to."""
    seen = browse(
        "",
        """
        const tables = [...document.querySelectorAll(".scroll")].filter((e) => e.offsetParent);
        const right = (box, e) => e.getBoundingClientRect().right - box.getBoundingClientRect().left;
        return {
          window: innerWidth,
          page: document.documentElement.scrollWidth,
          boxes: tables.map((box) => [
            box.clientWidth,
            box.scrollWidth,
            getComputedStyle(box).overflowX,
            Math.max(...[...box.querySelectorAll("th, td")].map((cell) => right(box, cell))),
          ]),
          pictures: [...document.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().right),
        };""",
        shown=page.parent.parent / "long/out/index.html",
        width=width,
    )
    assert seen["page"] <= seen["window"]
    assert len(seen["boxes"]) > 3
    for client, scrolled, overflow, right in seen["boxes"]:
        assert right <= scrolled + 2  # and the borders
        assert overflow == "auto"
        assert client == scrolled or width < 1400
    assert all(right <= seen["window"] for right in seen["pictures"])


def test_a_long_answer_is_folded(browse):
    before, after, whole, short_too = browse(
        "#trajectories?run=EIE%2C+seed+1&split=test&iteration=1&transition=wrong_to_wrong",
        """
        const answer = document.querySelector("#found .folded"), height = answer.clientHeight;
        answer.nextSibling.click();
        const short = [...document.querySelectorAll("#found .quoted")].find((e) => e.textContent.length < 50);
        return [height, answer.clientHeight, answer.textContent, short.matches(".folded")];""",
    )
    assert 0 < before < after
    assert whole == LONG
    assert not short_too
