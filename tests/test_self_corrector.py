"""A model in use: from Python and on the terminal."""

import io
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MANUAL, ROOT, stasc_environment, tiny_model

from stasc.__main__ import main
from stasc.errors import UserError
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue
from stasc.self_corrector import SelfCorrector
from stasc.trajectory import Trajectory

QUESTIONS = ["Who?", "Why?", "Where, in {initial_answer}?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    colours = [f"\x1b[3{i}m" for i in range(8)]  # what a terminal obeys
    folder = tiny_model(tmp_path_factory.mktemp("model") / "m", context=256, phrases=colours)
    MANUAL.write(folder)
    return folder


@pytest.fixture(scope="module")
def corrector(model) -> SelfCorrector:
    return SelfCorrector.from_pretrained(model)


def texts(trajectory: Trajectory) -> list[tuple[str, str]]:
    return [(answer.prompt, answer.text) for answer in trajectory.answers]


def test_questions_are_answered_and_corrected_in_order(corrector):
    trajectories = corrector.ask(QUESTIONS)
    assert [trajectory.question.text for trajectory in trajectories] == QUESTIONS
    for trajectory in trajectories:
        assert [prompt for prompt, _ in texts(trajectory)] == ["initial", "correction"]
        assert all(len(answer.token_ids) <= 8 for answer in trajectory.answers)
        assert all(math.isnan(answer.reward) for answer in trajectory.answers), "nobody scored it"
    assert len({texts(trajectory)[0] for trajectory in trajectories}) == len(QUESTIONS)


def test_the_same_questions_get_the_same_answers_one_or_many_at_a_time(corrector, model):
    trajectories = corrector.ask(QUESTIONS)
    assert texts(corrector.ask(QUESTIONS[0])) == texts(trajectories[0])
    assert corrector.ask([]) == []
    again = SelfCorrector.from_pretrained(model).ask(QUESTIONS)
    assert list(map(texts, again)) == list(map(texts, trajectories))
    other = SelfCorrector.from_pretrained(model, seed=1).ask(QUESTIONS)
    assert not set(map(str, map(texts, other))) & set(map(str, map(texts, trajectories)))


def test_rounds(corrector):
    trajectory = corrector.ask("Who?", rounds=3)
    assert [prompt for prompt, _ in texts(trajectory)] == ["initial", *["correction"] * 3]
    assert len({text for _, text in texts(trajectory)}) == 4
    for rounds in (0, 1, 2):
        assert texts(corrector.ask("Who?", rounds=rounds)) == texts(trajectory)[: rounds + 1]
    with pytest.raises(UserError, match="rounds is -1: it must be 0 or more"):
        corrector.ask("Who?", rounds=-1)


def test_greedy_answers_are_those_of_plain_transformers(corrector, model):
    greedy = replace(MANUAL, sampling=replace(MANUAL.sampling, temperature=0.0))
    corrector = SelfCorrector(ModelFolder(model), greedy, corrector.sampler)
    trajectory = corrector.ask(QUESTIONS[0])
    dialogue = Dialogue(ModelFolder(model).tokenizer(), MANUAL.prompts)
    network = corrector.sampler._loaded_network()
    for turn, answer in enumerate(trajectory.answers):
        (prompt,) = dialogue.ask(answer.prompt, [trajectory.upto(turn)])
        sequence = [*prompt, *answer.token_ids]
        best = network(network.dummy_inputs["input_ids"].new_tensor([sequence])).logits[0].argmax(-1)
        assert tuple(best[len(prompt) - 1 : -1].tolist()) == answer.token_ids


def test_a_question_that_is_too_long_is_named(corrector):
    with pytest.raises(UserError, match=r"question '2': with the answers in it the initial prompt is"):
        corrector.ask(["Who?", "Who? " * 100])


def test_a_model_that_does_not_say_how_it_is_asked_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no stasc\.yaml, which says how the model is asked"):
        SelfCorrector.from_pretrained(tiny_model(tmp_path / "bare"))


# ---------------------------------------------------------------- on the terminal


@pytest.fixture
def chat(monkeypatch, capfd):
    """What ``chat`` prints to a text on standard input."""

    def run(typed: bytes, *arguments: object) -> tuple[str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["stasc", "chat", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        main()
        return capfd.readouterr()

    return run


def test_lines_of_a_pipe_are_answered_without_what_a_terminal_would_obey(chat, corrector, model):
    questions = [f"Why {i}?" for i in range(20)]
    typed = "\n\n  ".join(questions).encode()
    output, error = chat(typed, "--model.base", model)
    assert error == ""
    assert output.count("initial answer: ") == output.count("correction: ") == 20
    raw = [corrector.ask(question).after(turn).text for question in questions for turn in (1, 2)]
    assert any("\x1b[3" in text for text in raw), "or this shows nothing"
    assert all(char.isprintable() or char == "\n" for char in output)
    safe = ["".join(c if c.isprintable() or c == "\n" else "?" for c in text.strip()) for text in raw]
    assert output == "".join(
        f"initial answer: {initial}\ncorrection: {correction}\n"
        for initial, correction in zip(safe[::2], safe[1::2], strict=True)
    )


def test_chat_goes_on_after_a_question_that_is_too_long(chat, model):
    output, error = chat(b"Who? " * 100 + b"\nWho?\xff", "--model.base", model, "--rounds", 2)
    assert error.startswith("stasc: ")
    assert error.count("\n") == 1
    assert output.count("initial answer: ") == 1
    assert output.count("correction: ") == 2


@pytest.mark.parametrize("arguments", [[], ["--model.base", "./nowhere"], ["--sampler", "NoSampler"]])
def test_a_mistake_ends_chat_in_one_sentence(chat, capfd, arguments):
    with pytest.raises(SystemExit) as exit_info:
        chat(b"Who?", *arguments)
    assert exit_info.value.code == 2
    output, error = capfd.readouterr()
    assert output == ""
    assert error.startswith("stasc: ")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_ends_chat_without_a_word(model, cache):
    process = subprocess.Popen(
        [sys.executable, "-m", "stasc", "chat", "--model.base", model],
        cwd=ROOT,
        env=stasc_environment(cache),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("Who?\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("initial answer: ")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
