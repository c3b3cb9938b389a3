"""reasoning-gym: every task of the library is asked and scored; splits share nothing; mistakes are named."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_tokenizer

from data import ReasoningGym
from data.reasoning_gym import ORDERED_BY_HASH, UNSUITABLE, Verifier
from stasc.errors import UserError
from stasc.prompting import Dialogue, Message
from stasc.trajectory import Question, Trajectory

PRODUCTS = {"products": {"min_digits": 1, "max_digits": 2}}

# Tasks without an answer of their own, and an answer that their verifier must find right: where the library
# has one, a function of the entry's metadata.
ANSWERLESS = {
    "boxnet": None,
    "graph_color": lambda metadata: json.dumps(metadata["possible_answer"]),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
    "rush_hour": None,
}


def every_task() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def run_python(code: str, hash_seed: str = "0", *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env=environment | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )


def check_task(task: str, dialogue: Dialogue) -> list[Question]:
    """The task is asked, rendered, and its answer found right by its verifier."""
    questions = ReasoningGym({task: None}, "train", size=3).load()
    assert [question.id for question in questions] == [f"{task}-{n}" for n in (1, 2, 3)]
    assert len({question.text for question in questions}) == 3
    verifier = Verifier()
    for question in questions:
        (ids,) = dialogue.ask("initial", [Trajectory(question)])
        assert f"user\n{question.text}<|im_end|>" in dialogue.tokenizer.decode(ids)
        assert verifier.judge("", question) == 0
        assert verifier.judge("purple elephants", question) < 1
        answers = [answer.strip() for answer in question.references]
        if task in ANSWERLESS:
            assert answers == []
            find = ANSWERLESS[task]
            answers = [find(question.entry["metadata"])] if find else []
        assert [verifier.judge(answer, question) for answer in answers] == [1] * len(answers)
        assert answers or ANSWERLESS[task] is None
    return questions


def plain_dialogue() -> Dialogue:
    return Dialogue(tiny_tokenizer("qwen2"), {"initial": [Message("user", "{question}")]})


@pytest.mark.slow
def test_every_task_is_asked_and_its_own_answer_is_right():
    dialogue = plain_dialogue()
    for task in set(every_task()) - UNSUITABLE.keys() - set(ORDERED_BY_HASH):
        check_task(task, dialogue)
    for task, reason in UNSUITABLE.items():
        with pytest.raises(UserError, match=f"task '{task}' cannot be asked: {reason}"):
            ReasoningGym({task: None}, "train").load()


@pytest.mark.slow
def test_tasks_that_depend_on_hashes_are_asked_only_where_those_are_fixed():
    code = (
        "from test_reasoning_gym import *\n"
        "for task in ORDERED_BY_HASH:\n"
        "    print(*map(vars, check_task(task, plain_dialogue())))\n"
    )
    assert run_python(code).stdout == run_python(code).stdout != ""
    refused = (
        "from test_reasoning_gym import *\n"
        "for task in ORDERED_BY_HASH:\n"
        "    with pytest.raises(UserError, match='PYTHONHASHSEED is 0: set it before'):\n"
        "        ReasoningGym({task: None}, 'test', size=5).load()\n"
    )
    run_python(refused, "1")


@pytest.mark.slow
def test_the_same_arguments_give_the_same_questions_in_any_process():
    code = (
        "from test_reasoning_gym import *\n"
        "import random, numpy\n"
        "random.seed({seed}), numpy.random.seed({seed})\n"
        "tasks = set(every_task()) - set(UNSUITABLE) - set(ORDERED_BY_HASH)\n"
        "for task in sorted(tasks):\n"
        "    questions = ReasoningGym({{task: None}}, 'validation', size=2).load()\n"
        "    print(task, *[(q.id, q.text, q.references, q.entry) for q in questions])\n"
    )
    one, other = (run_python(code.format(seed=seed), seed).stdout for seed in ("1", "2"))
    different = [a for a, b in zip(one.split("\n"), other.split("\n"), strict=True) if a != b]
    assert different == []
    assert one.count("\n") > 90


def test_no_split_shares_a_question_with_another_whatever_its_arguments():
    splits = [
        {
            question.text
            for seed in (0, 1)
            for digits in (1, 2)
            for question in ReasoningGym(
                {"products": {"min_digits": 1, "max_digits": digits}, "gcd": None}, split, size=30, seed=seed
            ).load()
        }
        for split in ("train", "validation", "test")
    ]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]
    assert all(len(split) > 60 for split in splits)


def test_a_smaller_size_gives_the_first_questions_and_another_seed_gives_others():
    tasks = {"products": {"min_digits": 4, "max_digits": 6}}
    one, two, other = (ReasoningGym(tasks, "train", n, s).load() for n, s in ((20, 0), (50, 0), (50, 1)))
    assert two[:20] == one
    assert not {q.text for q in two} & {q.text for q in other}


def test_a_mix_asks_its_tasks_by_their_weights():
    tasks = {"products": None, "gcd": None}
    questions = ReasoningGym(tasks, "train", size=200, weights={"products": 3, "gcd": 1}).load()
    names = [question.id.split("-")[0] for question in questions]
    assert 120 <= names.count("products") <= 180
    assert len({question.id for question in questions}) == 200
    assert "gcd" in names[:20]
    assert {question.entry["task"] for question in questions} == tasks.keys()
    assert [Verifier().judge(q.references[0], q) for q in questions] == [1] * 200


@pytest.mark.slow  # compiles all that it imports
def test_nobody_notices_the_library(tmp_path):
    code = (
        "import random, numpy as np\n"
        "from data import ReasoningGym\n"
        "from data.reasoning_gym import Verifier\n"
        "before = random.getstate(), np.random.get_state()[1].tolist()\n"
        "tasks = {'bf': None, 'list_functions': None, 'pool_matrix': None}\n"
        "questions = ReasoningGym(tasks, 'train', size=9).load()\n"
        "assert [Verifier().judge(q.references[0], q) for q in questions] == [1] * 9\n"
        "assert before == (random.getstate(), np.random.get_state()[1].tolist())\n"
    )
    # Without compiled files, so that the compiler warns again.
    done = run_python(code, "0", "-X", f"pycache_prefix={tmp_path}")
    assert done.stdout == ""
    assert "reasoning_gym" not in done.stderr
    assert "cellpylib" not in done.stderr


@pytest.mark.slow
def test_the_library_is_imported_only_where_its_questions_are_loaded():
    code = (
        "import sys\n"
        "from jsonargparse import ArgumentParser\n"
        "from data import TrajectoryDataModule\n"
        "parser = ArgumentParser()\n"
        "parser.add_class_arguments(TrajectoryDataModule, 'data', sub_configs=True)\n"
        f"config = parser.parse_path({str(ROOT / 'configs/tasks/reasoning_gym.yaml')!r})\n"
        "data = parser.instantiate(config).data\n"
        "assert 'reasoning_gym' not in sys.modules\n"
        "data.load_questions('test')\n"
        "assert 'reasoning_gym' in sys.modules\n"
    )
    assert "cellpylib" not in run_python(code).stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tasks": {}}, "has no tasks: name one"),
        ({"tasks": {"product": None}}, r"no task 'product'; did you mean products\?"),
        ({"tasks": {"products": {"min_digit": 1}}}, "no option 'min_digit'; did you mean min_digits or"),
        (
            {"tasks": {"products": {"min_digits": 3, "max_digits": 1}}},
            r"with these options \(max_digits must",
        ),
        ({"tasks": {"products": {"min_digits": "one"}}}, r"with these options \('>' not supported"),
        ({"tasks": {"products": {"seed": 1}}}, "set seed of data.ReasoningGym itself"),
        ({"tasks": PRODUCTS, "size": 0}, "size is 0: it must be 1 or more"),
        ({"tasks": PRODUCTS, "weights": {"gcd": 1}}, "'gcd' has a weight, but is not among its tasks"),
        ({"tasks": {**PRODUCTS, "gcd": None}, "weights": {"gcd": 1}}, "'products' has no weight"),
        ({"tasks": PRODUCTS, "weights": {"products": 0}}, "weight of 'products' is 0: it must be above 0"),
        (
            {"tasks": {"products": {"min_digits": 1, "max_digits": 1}}, "size": 200},
            r"too few distinct questions: [56]\d were found for 'train', and more are asked for; lower size",
        ),
    ],
)
def test_a_mistake_is_named(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        ReasoningGym(**{"split": "train", **arguments}).load()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        UserError, match=r'not installed: run \./setup\.sh, or pip install "stasc\[examples\]"'
    ):
        ReasoningGym(PRODUCTS, "train").load()


# The verifier


def ask(task: str, **options: object) -> Question:
    (question,) = ReasoningGym({task: options}, "train", size=1).load()
    return question


def test_questions_of_another_source_are_refused():
    with pytest.raises(
        UserError, match=r"cannot judge question '7': it scores questions of data\.ReasoningGym"
    ):
        Verifier().judge("4", Question("7", "2 + 2?", ("4",)))


def test_options_that_a_verifier_looks_at_are_those_of_the_question():
    """puzzle24 takes any four numbers in its range that make 24."""
    assert Verifier().judge("6 * 4 * 1 * 1", ask("puzzle24")) == 1
    assert Verifier().judge("6 * 4 * 1 * 1", ask("puzzle24", max_value=5)) < 1


def test_partial_credit_is_the_librarys():
    question = ask("countdown")
    assert 0 < Verifier().judge("1 + 1", question) < 1
    assert Verifier().judge(question.references[0], question) == 1


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("prime_factorization", "seven"),
        ("coin_flip", "inf"),
        ("boxnet", "[1, 2]"),
        ("game_of_life", '{"a": 1}'),
    ],
)
def test_an_answer_that_a_verifier_cannot_read_is_wrong(task, answer):
    assert Verifier().judge(answer, ask(task)) == 0


@pytest.mark.parametrize(
    "task",
    [
        *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),
        *("countdown", "puzzle24", "intermediate_integration", "simple_integration"),
    ],
)
def test_an_answer_is_never_run_as_code(task, tmp_path):
    question, target = ask(task), tmp_path / "written"
    letters = "+".join(f"chr({ord(char)})" for char in str(target))
    for answer in (
        f"open({str(target)!r}, 'w')",
        f"open({letters}, chr(119))",
        f"[open({letters}, chr(119))]",
    ):
        assert Verifier().judge(answer, question) < 1
        assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["countdown", "simple_integration"])
def test_an_answer_that_takes_too_long_to_compute_is_wrong(task):
    assert Verifier().judge("9**9**9**9", ask(task)) == 0
