"""The card of a model whose base is a folder with a card of its own, after a run on few questions."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_model
from huggingface_hub import ModelCard

from stasc.__main__ import main

pytestmark = pytest.mark.slow

HARD = "What is `x`?\n```python\n'''\"\"\"\\n|\n````"


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Runs one iteration with a random model in this process, and gives the folder of M_1."""
    base = tiny_model(tmp_path / "my base")

    def run(*options: object, card: str | None = None, name: str = "run") -> Path:
        if card is not None:
            (base / "README.md").write_text(card)
        rows = [{"question": HARD, "references": ["e"]}, {"question": "Who?", "references": ["a"]}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"class_path": "data.QuestionFile", "init_args": {"path": str(tmp_path / "rows.jsonl")}}
        arguments = ["--config", ROOT / "configs/quickstart.yaml", "--model.base", base]
        arguments += ["--sampler", "TransformersSampler", "--algorithm.iterations", 1]
        arguments += ["--data.sampling.max_tokens", 8, "--data.evaluation.sampling.max_tokens", 8]
        for split in ("train", "test"):
            arguments += [f"--data.{split}", json.dumps(source)]
        arguments += ["--run_dir", tmp_path / name, *options]
        monkeypatch.setattr(sys, "argv", ["stasc", "fit", *map(str, arguments)])
        main()
        return tmp_path / name / "iteration-01/model"

    return run


def test_the_licence_is_that_of_the_base_and_local_folders_are_not_told(fit, tmp_path, monkeypatch, capfd):
    folder = fit(card="---\nlicense: other\nlicense_name: mine\nlicense_link: <b>|LICENSE\n---\n# Mine\n")
    card = ModelCard.load(folder / "README.md")
    licence = (card.data.license, card.data.license_name, card.data.license_link)
    assert licence == ("other", "mine", "<b>|LICENSE")
    assert "| licence | other, mine, &#60;b&#62;&#124;LICENSE |" in card.text
    assert card.data.base_model is None, "it is no id of the hub"
    assert str(tmp_path) not in card.content
    assert "| base model | my base |" in card.text
    assert "{path: rows.jsonl, question: question, references: references, split: train}" in card.text
    # The snippet is whole, whatever the question holds.
    ((_, snippet),) = re.findall(r"(`{3,})python\n(.*?)\n\1\n", card.text, re.DOTALL)
    capfd.readouterr()
    monkeypatch.chdir(folder)
    exec(snippet, {})
    output = capfd.readouterr().out
    test = json.loads((folder.parent / "test.jsonl").read_text().splitlines()[0])
    assert output == "".join(f"{answer['prompt']}: {answer['text']}\n" for answer in test["answers"])


def test_the_manual_is_that_of_the_evaluation_and_equal_runs_write_equal_cards(fit):
    options = ("--algorithm.rounds", 3, "--data.answer", "stasc.answers.LastLine")
    folder = fit(*options, card="---\nlicense: [broken\n---\n")
    manual = yaml.safe_load((folder / "stasc.yaml").read_text())
    assert manual["turns"] == ["initial", "correction", "correction", "correction"]
    assert manual["sampling"] == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 8}
    assert manual["answer"] == {"class_path": "stasc.answers.LastLine"}
    assert manual["prompts"] == yaml.safe_load((ROOT / "configs/prompts/demo.yaml").read_text())

    before = (folder / "README.md").read_bytes()
    assert ModelCard(before.decode()).data.license is None
    assert b"| licence | the base model's folder names none |" in before
    assert (fit(*options, name="again") / "README.md").read_bytes() == before
