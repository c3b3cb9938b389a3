"""A model's manual: what is written is read, mistakes in it are named, and the command line follows it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import MANUAL, tiny_model

from stasc.__main__ import main
from stasc.errors import UserError
from stasc.manual import Manual
from stasc.prompting import Message

TEXTS = (
    "One line: {question} # no comment",
    "Two\n\n  lines,\nthe last one open\n",
    "\n  white space all around \n \n",
    "tab\tand return\r\nand\x85other\u2028ends of\u2029lines",
    "\ufeff'quoted' \"twice\" \\ \x1b[31mred\x00",
    "- a list?\n- {not: a mapping}\n---\n...",
    "ünïcödé 日本語 😀\n\xa0",
)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_is_read(tmp_path, text):
    messages = [Message("assistant", text), Message("user", text + "{question}")]
    manual = replace(MANUAL, prompts={**MANUAL.prompts, "initial": messages}, template={"thinks": False})
    manual.write(tmp_path)
    assert Manual.read(tmp_path) == Manual.find(tmp_path) == manual
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    manual.write(tmp_path)
    assert file.read_bytes() == before


def test_people_read_prompts_as_they_are_sent(tmp_path):
    MANUAL.write(tmp_path)
    assert (
        "content: |-\n      {question}\n      {initial_answer}\n\n      Correct it."
        in (tmp_path / "stasc.yaml").read_text()
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"turns": []}, "has no turns: name the prompts"),
        ({"turns": ["initial", "third_look"]}, "prompts has no third_look"),
        ({"prompts": {"initial": [{"role": "user", "content": "?"}]}}, "prompts has no correction"),
        ({"sampling": {"temperature": 5}}, "temperature is 5.0: it must be 0"),
        ({"sampling": {"top_k": 5}}, "top_k"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_mistake_is_named(tmp_path, change, sentence):
    MANUAL.write(tmp_path)
    path = tmp_path / "stasc.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(UserError, match=r"stasc\.yaml.*" + sentence):
        Manual.read(tmp_path)


@pytest.mark.parametrize("text", ["{half", "- a list", "", "\xff"])
def test_a_file_that_is_something_else_is_named(tmp_path, text):
    (tmp_path / "stasc.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"stasc\.yaml has a mistake: "):
        Manual.read(tmp_path)


def test_a_folder_without_one_has_none(tmp_path):
    assert Manual.find(tmp_path) is None
    with pytest.raises(UserError, match=r"has no stasc\.yaml, which says how the model is asked: take a"):
        Manual.read(tmp_path)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def predicted(tmp_path, monkeypatch):
    """Answers two questions by ``predict``, and gives the lines that it wrote."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Who?"}\n{"question": "Why?"}\n')

    def predict(model: Path, *options: object) -> list[dict[str, str]]:
        output = tmp_path / "output.jsonl"
        output.unlink(missing_ok=True)
        arguments = ["--model.base", model, "--sampler", "TransformersSampler", "--data.output", output]
        arguments += ["--data.predict", "data.QuestionFile", "--data.predict.path", questions]
        arguments += ["--run_dir", tmp_path / "run", "--trainer.accelerator", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["stasc", "predict", *map(str, arguments)])
        main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    return predict


def test_predict_takes_prompts_and_sampling_from_the_model_unless_the_config_has_them(predicted, tmp_path):
    bare, model = tiny_model(tmp_path / "bare"), tiny_model(tmp_path / "model")
    MANUAL.write(model)
    other = replace(MANUAL, prompts={**MANUAL.prompts, "initial": [Message("user", "Say: {question}")]})
    prompts = json.dumps(other.options["data.prompts"])
    sampling = json.dumps(MANUAL.options["data.evaluation.sampling"])

    def given(manual: Manual) -> list[dict[str, str]]:
        """What the model without a manual answers to the same prompts on the command line."""
        prompts = json.dumps(manual.options["data.prompts"])
        return predicted(bare, "--data.prompts", prompts, "--data.evaluation.sampling", sampling)

    by_the_manual = predicted(model)
    assert by_the_manual == given(MANUAL)
    assert predicted(model, "--data.prompts", prompts) == given(other) != by_the_manual
    assert [len(row) for row in by_the_manual] == [4, 4]
    longer = predicted(model, "--data.evaluation.sampling.max_tokens", 16)
    assert longer != by_the_manual
    for row, short in zip(longer, by_the_manual, strict=True):
        assert row["initial_answer"].startswith(short["initial_answer"].rstrip("\ufffd"))


def test_code_that_a_model_names_is_not_run_unless_the_user_names_it(predicted, tmp_path, monkeypatch, capfd):
    model = tiny_model(tmp_path / "model")
    replace(MANUAL, answer={"class_path": "of_a_stranger.Answer"}).write(model)
    stranger = "open('ran', 'w')\nfrom stasc.answers import LastLine\nclass Answer(LastLine): pass\n"
    (model / "of_a_stranger.py").write_text(stranger)
    monkeypatch.chdir(model)
    monkeypatch.syspath_prepend(model)
    with pytest.raises(SystemExit, match="2"):
        predicted(Path())
    assert (
        "stasc.yaml of . names of_a_stranger.Answer as data.answer, which is code that"
        in capfd.readouterr().err
    )
    assert not Path("ran").exists()
    assert len(predicted(Path(), "--data.answer", "of_a_stranger.Answer")) == 2
    assert Path("ran").exists()


@pytest.mark.parametrize("command", ["test", "predict"])
def test_prompts_that_neither_the_config_nor_the_model_has_are_missed(tmp_path, monkeypatch, capfd, command):
    model = tiny_model(tmp_path / "model")
    arguments = ["--model.base", model, f"--data.{command}", "data.DemoQuestions"]
    arguments += [f"--data.{command}.split", "test", "--run_dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["stasc", command, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith(f"stasc: data.prompts is not set, and {model} has no stasc.yaml that has them:")
    assert error.count("\n") == 1
