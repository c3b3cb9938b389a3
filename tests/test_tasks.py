"""The tasks of configs/tasks: each is loaded from rows of its data set's real columns, asked, and scored."""

import itertools
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_tokenizer
from jsonargparse import ArgumentParser

from data import TrajectoryDataModule
from stasc.prompting import Dialogue
from stasc.trajectory import Answer, Question, Trajectory

pytestmark = pytest.mark.slow  # imports datasets and reasoning-gym

NATURAL_QUESTION = {
    "question_id": "single_nq_dev_1",
    "question_text": "who wrote hamlet",
    "reference": ["Shakespeare"],
}
TRIVIA = {
    "question": "Which metal is liquid at room temperature?",
    "question_id": "tc_1",
    "question_source": "http://www.example.org/",
    "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
    "search_results": {
        "description": [],
        "filename": [],
        "rank": [],
        "title": [],
        "url": [],
        "search_context": [],
    },
    "answer": {
        "aliases": ["Mercury (element)", "Quicksilver"],
        "normalized_aliases": ["mercury element", "quicksilver"],
        "matched_wiki_entity_name": "",
        "normalized_matched_wiki_entity_name": "",
        "normalized_value": "quicksilver",
        "type": "WikipediaEntity",
        "value": "Quicksilver",
    },
}
HOTPOT = {
    "id": "5a7a06935542990198eaf050",
    "question": "Are Lisbon and Porto in the same country?",
    "answer": "yes",
    "type": "comparison",
    "level": "medium",
    "supporting_facts": {"title": ["Lisbon", "Porto"], "sent_id": [0, 0]},
    "context": {"title": ["Lisbon", "Porto"], "sentences": [["Lisbon is ..."], ["Porto is ..."]]},
}
GSM8K = {
    "question": "A box holds 250 pens. How many pens do 5 boxes hold?",
    "answer": "5 boxes hold 5*250=<<5*250=1250>>1250 pens.\n#### 1,250",
}
MATH = {
    "problem": r"What is $\frac{1}{4}+\frac{1}{4}$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": r"We add: $\frac{2}{4} = \boxed{\frac{1}{2}}$.",
}
MATH_500 = {
    "problem": r"Which $x$ satisfy $x^2 \le 4$?",
    "solution": r"They are $\boxed{[-2,2]}$.",
    "answer": "[-2,2]",
    "subject": "Algebra",
    "level": 2,
    "unique_id": "test/algebra/1.json",
}

# The data sets of each task: hub id, configuration, and for each split the number of rows and one of them.
DATA_SETS = {
    "natural_questions": {
        ("VityaVitalich/adaptive_rag_natural_questions", "default"): {
            "train": (500, NATURAL_QUESTION),
            "test": (500, NATURAL_QUESTION),
        }
    },
    "triviaqa": {
        ("mandarjoshi/trivia_qa", "unfiltered.nocontext"): {
            "train": (700, TRIVIA),
            "validation": (600, TRIVIA),
        }
    },
    "hotpotqa": {("hotpotqa/hotpot_qa", "distractor"): {"train": (700, HOTPOT), "validation": (600, HOTPOT)}},
    "gsm8k": {("openai/gsm8k", "main"): {"train": (700, GSM8K), "test": (1319, GSM8K)}},
    "math": {
        ("DigitalLearningGmbH/MATH-lighteval", "default"): {"train": (7500, MATH), "test": (5000, MATH)},
        ("HuggingFaceH4/MATH-500", "default"): {"test": (500, MATH_500)},
    },
    "reasoning_gym": {},
}
SIZES = {
    "natural_questions": (400, 100, 500),
    "triviaqa": (500, 125, 500),
    "hotpotqa": (500, 125, 500),
    "gsm8k": (500, 125, 1319),
    "math": (504, 126, 500),
    "reasoning_gym": (500, 200, 500),
}
RIGHT_AND_WRONG = {
    "natural_questions": (
        ["Step-by-step reasoning: It is a play.\nFinal Answer: William Shakespeare"],
        ["Final Answer: Christopher Marlowe", ""],
    ),
    "triviaqa": (["It is quicksilver.", "Final Answer: Mercury (element)"], ["Final Answer: gallium", ""]),
    "hotpotqa": (
        ["Both are in Portugal.\nFinal Answer: Yes"],
        ["Final Answer: no", "Yes, both are in Portugal."],
    ),
    "gsm8k": (
        ["5 * 250 = 1250.\nFinal Answer: 1,250", "Final Answer: $1250$ pens", r"Final Answer: \boxed{1250}"],
        ["5 * 250 = 1250.", "Final Answer: 125", "5 * 250 = 1250. Final Answer:"],
    ),
    "math": (
        [r"Final Answer: $[-2, 2]$", r"Final Answer: \([-2,2]\)", r"Final Answer: \boxed{[-2, 2]}"],
        ["Final Answer: $(-2, 2)$", "[-2,2]", "Final Answer: 2"],
    ),
}


def write_data_set(folder: Path, name: str, splits: dict) -> None:
    """A data set as a hub repository has it: Parquet files, and a card that names configurations."""
    from datasets import Dataset

    files = []
    for split, (rows, row) in splits.items():
        path = folder / name / f"{split}-00000-of-00001.parquet"
        identifier = next((key for key in ("question_id", "id", "unique_id") if key in row), None)
        numbers = range(rows)
        numbered = [row | ({identifier: f"{row[identifier]}-{n}"} if identifier else {}) for n in numbers]
        Dataset.from_list(numbered).to_parquet(path)
        files.append({"split": split, "path": f"{name}/{split}-*"})
    card = yaml.safe_dump({"configs": [{"config_name": name, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")


@pytest.fixture(params=DATA_SETS)
def task(request, tmp_path, monkeypatch) -> tuple[str, TrajectoryDataModule]:
    """A task's name, and what its configuration describes, with its data sets in folders named like them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for (path, name), splits in DATA_SETS[request.param].items():
        (tmp_path / path).mkdir(parents=True)
        write_data_set(tmp_path / path, name, splits)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrajectoryDataModule, "data", sub_configs=True)
    config = parser.parse_path(ROOT / f"configs/tasks/{request.param}.yaml")
    return request.param, parser.instantiate(config).data


def test_the_task_is_asked_and_scored(task):
    name, data = task
    questions = data.load_questions("fit")
    sizes = tuple(len(questions[part]) for part in ("train", "validation", "test"))
    assert sizes == SIZES[name]
    assert data.load_questions("test")["test"] == questions["test"]
    question = questions["test"][0]
    if name == "reasoning_gym":
        (product,) = question.references
        right, wrong = [f"The product is {product}."], [str(int(product) + 1), "I do not know."]
    else:
        right, wrong = RIGHT_AND_WRONG[name]
    for completions, reward in ((right, 1), (wrong, 0)):
        for completion in completions:
            assert data.reward.judge(data.answer.find(completion), question) == reward, completion
    if name == "math":  # whose training questions have whole solutions as references
        answers = ["Final Answer: 0.5", r"Final Answer: $\frac24$", r"Final Answer: \frac{1}{4}"]
        found = [data.reward.judge(data.answer.find(a), questions["train"][0]) for a in answers]
        assert found == [1, 1, 0]
    check_prompts(data, question, right[0])


def check_prompts(data: TrajectoryDataModule, question: Question, completion: str) -> None:
    dialogue = Dialogue(tiny_tokenizer("qwen2"), data.prompts)
    answer = Answer("initial", 0, completion, (), True, 1.0)
    chains = {"initial": (), "correction": (answer,), "rationalization": (answer,)}
    assert data.prompts.keys() == chains.keys()
    for prompt, answers in chains.items():
        (ids,) = dialogue.ask(prompt, [Trajectory(question, answers)])
        text = dialogue.tokenizer.decode(ids)
        assert question.text in text
        assert (completion in text) == (prompt == "correction")
        assert (question.references[0] in text) >= (prompt == "rationalization")
        assert not [word for word in ("{question}", "{initial_answer}", "{reference}") if word in text]


def test_a_task_holds_what_belongs_to_it_and_nothing_else():
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs/tasks").iterdir()}
    assert configs.keys() == DATA_SETS.keys()
    assert {key for config in configs.values() for key in config} == {"data"}
    for one, other in itertools.pairwise(configs.values()):  # so that a task laid over another replaces it
        assert one["data"].keys() == other["data"].keys()
