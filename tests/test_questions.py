"""Questions from files: columns, and error messages that name the file and line."""

import json

import pytest

from data import DemoQuestions, QuestionFile
from stasc.errors import UserError
from stasc.trajectory import Question

ROWS = [
    {"qid": 7, "text": "Who?", "answers": ["Ann", "Anne"]},
    {"qid": 8, "text": "Where\xa0is it?", "answers": "Rome"},
]
COLUMNS = {"id": "qid", "question": "text", "references": "answers"}


@pytest.fixture
def write(tmp_path):
    def write(*lines: object) -> str:
        path = tmp_path / "my questions.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts), encoding="utf-8")
        return str(path)

    return write


def test_columns_are_mapped(write):
    questions = QuestionFile(write(*ROWS), **COLUMNS).load()
    assert questions == [Question("7", "Who?", ("Ann", "Anne")), Question("8", "Where\xa0is it?", ("Rome",))]


def test_rows_without_an_id_are_numbered_and_blank_lines_are_skipped(write):
    path = write(ROWS[0], "", ROWS[1])
    ids = [question.id for question in QuestionFile(path, question="text", references="answers").load()]
    assert ids == ["1", "2"]


def test_a_dot_leads_into_a_column_and_the_row_is_the_entry(write):
    row = {"meta": {"q": "Who?"}, "answer": {"value": 7, "aliases": ["7", "seven"]}, "a.b": 1.5}
    path = write(row)
    (question,) = QuestionFile(path, question="meta.q", references="answer.aliases").load()
    assert (question.text, question.references) == ("Who?", ("7", "seven"))
    assert question.entry == row
    for column, references in (("answer.value", ("7",)), ("a.b", ("1.5",))):
        (question,) = QuestionFile(path, question="meta.q", references=column).load()
        assert question.references == references
    for column in ("answer.alias", "meta.q.r", "nothing.at.all"):
        with pytest.raises(
            UserError, match=rf"line 1: there is no column '{column}' \(columns: meta, answer"
        ):
            QuestionFile(path, question="meta.q", references=column).load()


def test_predict_needs_no_references(write):
    path = write({"question": "Who?"})
    assert QuestionFile(path).load(with_references=False) == [Question("1", "Who?")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"my questions\.jsonl, line 1: this is not JSON \(.*column 2\)"),
        ([ROWS[0], '["a"]'], r"line 2: this is not a JSON object"),
        (
            [ROWS[0], {"qid": 9, "text": "x"}],
            r"line 2: there is no column 'answers' \(columns: qid, text",
        ),
        ([{**ROWS[0], "text": " "}], r"line 1: 'text' must be a non-empty string"),
        ([{**ROWS[0], "answers": []}], r"line 1: 'answers' is empty"),
        ([{**ROWS[0], "answers": [" "]}], r"line 1: 'answers' is empty"),
        ([{**ROWS[0], "answers": None}], r"line 1: 'answers' must be a string, a number, or a list of them"),
        ([{**ROWS[0], "answers": [True]}], r"line 1: 'answers' must be a string, a number, or a list"),
        ([ROWS[0], "", ROWS[0]], r"line 3: the id '7' occurs twice"),
        ([], r"my questions\.jsonl has no questions"),
    ],
)
def test_error_messages_name_file_and_line(write, lines, message):
    with pytest.raises(UserError, match=message):
        QuestionFile(write(*lines), **COLUMNS).load()


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 1: this is not UTF-8"):
        QuestionFile(str(path)).load()


def test_a_missing_file_is_not_requested_from_the_hub(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl is not a file"):
        QuestionFile(str(tmp_path / "nowhere.jsonl")).load()


@pytest.mark.slow  # imports datasets
def test_an_unavailable_hub_data_set_is_reported_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"'nobody/nothing' is not a file, and its split 'test' could not be loaded"
    ):
        QuestionFile("nobody/nothing", split="test").load()


@pytest.mark.slow  # imports datasets
def test_a_local_data_set_loads_like_one_from_the_hub(tmp_path, monkeypatch, write):
    """`datasets` reads a folder of JSONL files as it reads a hub repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "user" / "name"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("\n".join(json.dumps({**row, "answers": ["x"]}) for row in ROWS))
    source = QuestionFile("user/name", split="test[:1]", **COLUMNS)
    assert source.load() == [Question("7", "Who?", ("x",))]


def test_a_script_of_a_data_set_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "user" / "name"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps({**ROWS[0], "answers": ["x"]}))
    (folder / "name.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")  # once a way to load a data set
    with pytest.raises(UserError, match=r"scripts are no longer supported, but found name\.py"):
        QuestionFile("user/name", split="test", **COLUMNS).load()
    assert not (tmp_path / "ran").exists()


def test_demo_splits_differ():
    train, test = (DemoQuestions(split, size=20).load() for split in ("train", "test"))
    assert len(train) == len(test) == 20
    assert not {q.text for q in train} & {q.text for q in test}
