"""What strangers write is shown and not obeyed, stays in its place, and secrets stay out of all files."""

import ast
import html
import json
import re
import sys
from pathlib import Path

import markdown
import psutil
import pytest
from conftest import ROOT, answer, corrected, tiny_model

from callbacks.evaluation import sample_table
from stasc.__main__ import main
from stasc.ending import end_after_mistakes
from stasc.errors import UserError
from stasc.progress import say
from stasc.reward import InAccuracy
from stasc.texts import inline_code
from stasc.trajectory import Question

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202e<script>alert(1)</script> ![x](http://x/y) `a|b` [z](javascript:1)"
)
LISTENING: set[object] = set()
"""What this process listens to while the engine samples, and did not before."""


def listening() -> set[object]:
    """The addresses that this process listens to."""
    found = psutil.Process().net_connections()
    return {connection.laddr for connection in found if connection.status == psutil.CONN_LISTEN}


class Listens(InAccuracy):
    """Looks what this process listens to while the engine samples."""

    def score(self, prediction, references):
        LISTENING.update(listening())
        return super().score(prediction, references)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a run, all questions of which come from a stranger."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model(folder / "model")
    rows = [{"id": f"../../{HOSTILE}{n}", "question": HOSTILE, "references": [HOSTILE]} for n in range(2)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "questions.jsonl"), "id": "id"}
    options = ["--config", ROOT / "configs/quickstart.yaml", "--model.base", model]
    options += ["--sampler", "TransformersSampler", "--algorithm.iterations", 1]
    options += ["--data.sampling.max_tokens", 8, "--data.evaluation.sampling.max_tokens", 8]
    options += ["--data.reward", "test_security.Listens", "--run_dir", folder / "outer/inner/run"]
    for split in ("train", "test"):
        options += [f"--data.{split}", json.dumps({"class_path": "data.QuestionFile", "init_args": source})]
    with pytest.MonkeyPatch.context() as patch, (folder / "output").open("w") as output:
        patch.setenv("HF_TOKEN", "hf_sesame")
        patch.setenv("WANDB_API_KEY", "sesame")
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "argv", ["stasc", "fit", *map(str, options)])
        before = listening()  # of other tests
        main()
    LISTENING.difference_update(before)
    return folder


def test_names_and_ids_lead_to_no_file_outside_the_run_folder(folder):
    outside = {path for path in folder.rglob("*") if path.is_file()} - set((folder / "outer").rglob("*"))
    assert {path.parent.name for path in outside} == {folder.name, "model"}
    assert {path for path in folder.iterdir() if path.is_file()} == {
        folder / "output",
        folder / "questions.jsonl",
    }
    assert [path.name for path in (folder / "outer").iterdir()] == ["inner"]
    assert [path.name for path in (folder / "outer/inner").iterdir()] == ["run"]


def test_tokens_of_the_environment_are_in_no_file(folder):
    files = [path for path in (folder / "outer").rglob("*") if path.is_file()]
    assert {"config.yaml", "starts.json", "README.md", "system.json"} <= {path.name for path in files}
    assert [path for path in files if b"sesame" in path.read_bytes()] == []


def test_one_process_listens_to_nothing(folder):
    assert not LISTENING


def test_what_strangers_write_does_not_reach_the_terminal(folder, capsys):
    assert all(char.isprintable() or char == "\n" for char in (folder / "output").read_text())
    say(f"{HOSTILE}\nnext")
    with pytest.raises(SystemExit, match="2"), end_after_mistakes():
        raise UserError(f"question '{HOSTILE}' is wrong.")
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 2
    assert shown.err.count("\n") == 1
    assert all(char.isprintable() or char == "\n" for char in shown.out + shown.err)


def test_tensorboards_table_and_the_card_show_a_text_as_it_is():
    trajectory = corrected(Question("1", HOSTILE, (HOSTILE,)), answer(HOSTILE), answer(HOSTILE))
    page = markdown.markdown(sample_table([trajectory]), extensions=["markdown.extensions.tables"])
    assert set(re.findall(r"<(\w+)", page)) == {"table", "thead", "tbody", "tr", "th", "td"}
    cells = re.findall(r"<td>(.*?)</td>", page)
    visible = "".join(char if char.isprintable() else "?" for char in HOSTILE)
    assert len(cells) == 6
    assert html.unescape(cells[0]) == visible
    code = markdown.markdown(inline_code("``` `a|b` <b>"))
    assert code == "<p><code>``` `a|b` &lt;b&gt;</code></p>"


def test_every_threat_has_tests_that_there_are():
    page = (ROOT / "docs/security.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            functions = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
            assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}, name
