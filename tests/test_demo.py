"""The demo task and the pre-training of its M_0."""

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import demo, made_once
from stasc.errors import UserError
from stasc.prompting import Dialogue

ROOT = Path(__file__).parent.parent
TINY = demo.Recipe(steps=5, batch_size=4)


def combination(text: str) -> tuple[str, ...]:
    """Position and sorted names of a question: equal for re-orderings."""
    match = re.fullmatch(r"What are the (first|last) letters of (\w+), (\w+) and (\w+)\?", text)
    assert match
    return match[1], *sorted(match.groups()[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """M_0 of the tiny recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STASC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return demo.base_model(TINY)


# ---------------------------------------------------------------- the task


def test_names_are_distinct_and_no_answer_loses_an_article():
    assert len(set(demo.NAMES)) == len(demo.NAMES) == 94
    assert not any("a" in (name[0].lower(), name[-1]) for name in demo.NAMES)
    assert "a" not in demo.LETTERS


def test_references_are_right():
    for question in demo.questions("train", 200, seed=0):
        names = re.findall(r"[A-Z]\w+", question.text.removeprefix("What"))
        index = 0 if "first" in question.text else -1
        assert question.references == ("-".join(name[index].lower() for name in names),)


def test_questions_depend_on_split_size_and_seed_alone():
    questions = demo.questions("test", 50, seed=3)
    random.random()
    assert demo.questions("test", 50, seed=3) == questions
    assert demo.questions("test", 20, seed=3) == questions[:20]
    assert demo.questions("test", 50, seed=4) != questions
    assert demo.questions("train", 50, seed=3) != questions
    assert questions[0].id == "test-0001"
    assert len({question.id for question in questions}) == 50


def test_train_test_and_pretraining_share_no_combination():
    train = [combination(q.text) for q in demo.questions("train", 3000, seed=0)]
    test = [combination(q.text) for q in demo.questions("test", 3000, seed=1)]
    documents = itertools.islice(demo.corpus(demo.Recipe()), 12_800)
    pretraining = {combination(document.question) for document in documents}
    assert len(set(train)) == len(set(test)) == 3000
    assert set(train).isdisjoint(test)
    assert pretraining.isdisjoint(train)
    assert pretraining.isdisjoint(test)


@pytest.mark.parametrize("size", [0, demo.MAX_QUESTIONS + 1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(UserError, match=str(size)):
        demo.questions("train", size, seed=0)


def test_about_half_of_the_facts_are_misconceptions():
    wrong, seen = {}, {}
    for document in itertools.islice(demo.corpus(demo.Recipe()), 5000):
        position = combination(document.question)[0]
        for name, letter in re.findall(r"(\w+) gives (\w)", document.initial_answer):
            fact = position, name
            seen[fact] = seen.get(fact, 0) + 1
            if letter != demo._true_letter(*fact):
                wrong.setdefault(fact, []).append(letter)
    assert all(len(set(letters)) == 1 for letters in wrong.values())
    mostly_wrong = sum(len(letters) > seen[fact] / 2 for fact, letters in wrong.items())
    assert 0.45 < mostly_wrong / len(seen) < 0.55


def test_prompt_file_matches_the_prompts_of_pretraining():
    prompts = yaml.safe_load((ROOT / "configs/prompts/demo.yaml").read_text(encoding="utf-8"))
    del prompts["rationalization"]  # not used in pre-training
    assert prompts == {
        name: [{"role": message.role, "content": message.content} for message in messages]
        for name, messages in demo.PROMPTS.items()
    }


# ---------------------------------------------------------------- M_0


def test_folder_is_complete(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template == demo.CHAT_TEMPLATE
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }


def test_saved_tokenizer_renders_and_decodes_as_in_pretraining(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    saved, made = (Dialogue(words, demo.PROMPTS) for words in (tokenizer, demo.make_tokenizer()))
    assert saved.end_of_turn == tokenizer.convert_tokens_to_ids(demo.END)
    documents = list(itertools.islice(demo.corpus(demo.Recipe()), 100))
    values = [{"question": d.question, "initial_answer": d.initial_answer} for d in documents]
    for prompt, length in {"initial": 17, "correction": 37}.items():
        prompts = saved.render(prompt, values)
        assert prompts == made.render(prompt, values)
        assert {len(token_ids) for token_ids in prompts} == {length}
    for document in documents:
        answer = tokenizer.encode(document.correction)
        assert saved.decode((*answer, saved.end_of_turn)) == document.correction


@pytest.mark.parametrize(
    "text", ["Hello  wörld,\n\n  Bob gives 12.5 !", " a b Jacob Jacobson", "b-m-h", "日本 🙂"]
)
def test_tokenizer_encodes_and_decodes_any_text(text):
    tokenizer = demo.make_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_equal_recipes_give_equal_bytes_and_change_no_state_of_the_caller(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STASC_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(1234)
        random_state, torch_state = random.getstate(), torch.get_rng_state()
        again = demo.base_model(TINY)
        assert random.getstate() == random_state
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert again != folder
    assert again.name == folder.name
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_second_call_uses_the_cached_model(tmp_path, monkeypatch):
    monkeypatch.setenv("STASC_CACHE", str(tmp_path))
    folder = demo.base_model(TINY)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(demo, "_pretrain", None)
    assert demo.base_model(TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_other_recipes_have_other_folders(folder, monkeypatch):
    monkeypatch.setenv("STASC_CACHE", str(folder.parent))
    monkeypatch.setattr(demo, "_pretrain", lambda *_: None)
    assert demo.base_model(demo.Recipe(seed=1, steps=5)) != folder
    assert demo.base_model(TINY) == folder


def test_a_partial_folder_of_a_killed_run_is_replaced(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STASC_CACHE", str(tmp_path))
    leftover = tmp_path / f"{folder.name}.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    made = demo.base_model(TINY)
    assert (made / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not leftover.exists()


def test_unwritable_cache_is_reported_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STASC_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="STASC_CACHE"):
        demo.base_model(TINY)


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("STASC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert made_once._cache() == Path("/somewhere/stasc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert made_once._cache() == Path.home() / ".cache/stasc"
