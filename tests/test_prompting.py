"""Prompts through three families of chat templates: the very tokens, and where the correction lies."""

import pytest
import yaml
from conftest import ROOT, answer, corrected, tiny_tokenizer
from transformers import GenerationConfig

from stasc.errors import UserError
from stasc.prompting import Dialogue, Message, check_prompts
from stasc.trajectory import Example, Question, Trajectory

PROMPTS = {
    "initial": [Message("system", "Be brief."), Message("user", "Q: {question}")],
    "correction": [
        Message("system", "Correct it."),
        Message("user", "Q: 1+1?\nA: 3"),
        Message("assistant", "2"),
        Message("user", "Q: {question}\nA: {initial_answer}"),
    ],
}

# Written out by hand: what the model reads before it corrects, and what ends its turn.
RENDERED = {
    "qwen2": (
        "<|im_start|>system\nCorrect it.<|im_end|>\n<|im_start|>user\nQ: 1+1?\nA: 3<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nQ: 2+2?\nA: five<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "phi3": (
        "<|system|>\nCorrect it.<|end|>\n<|user|>\nQ: 1+1?\nA: 3<|end|>\n<|assistant|>\n2<|end|>\n"
        "<|user|>\nQ: 2+2?\nA: five<|end|>\n<|assistant|>\n",
        "<|end|>",
    ),
    "no-system": (
        "<turn>user\nCorrect it.\n\nQ: 1+1?\nA: 3</turn>\n<turn>assistant\n2</turn>\n"
        "<turn>user\nQ: 2+2?\nA: five</turn>\n<turn>assistant\n",
        "</turn>",
    ),
}


def example(tokenizer, correction: str, finished: bool) -> Example:
    learnt = answer(correction, 1.0, token_ids=tokenizer.encode(correction), finished=finished)
    return corrected(Question("q", "2+2?", ("4",)), answer("five\n"), learnt).learn()


def initial_prompt(dialogue: Dialogue, question: str) -> list[int]:
    return dialogue.ask("initial", [Trajectory(Question("q", question))])[0]


def correction_prompt(dialogue: Dialogue, question: str, wrong: str) -> list[int]:
    return dialogue.ask("correction", [Trajectory(Question("q", question), (answer(wrong),))])[0]


@pytest.mark.parametrize("kind", RENDERED)
def test_only_the_correction_and_its_end_of_turn_carry_loss(kind):
    tokenizer = tiny_tokenizer(kind)
    dialogue = Dialogue(tokenizer, PROMPTS)
    before, end = RENDERED[kind]
    prompt, target = dialogue.example(example(tokenizer, "four, sorry", finished=True))
    assert tokenizer.decode(prompt) == before
    assert tokenizer.decode(target) == "four, sorry" + end


@pytest.mark.parametrize("kind", RENDERED)
def test_the_prompt_in_training_is_the_prompt_in_sampling(kind):
    tokenizer = tiny_tokenizer(kind)
    dialogue = Dialogue(tokenizer, PROMPTS)
    prompt, _ = dialogue.example(example(tokenizer, "four", finished=True))
    assert prompt == correction_prompt(dialogue, "2+2?", "five\n")
    assert tokenizer.decode(prompt) == RENDERED[kind][0]


def test_many_prompts_are_rendered_as_one_by_one():
    dialogue = Dialogue(tiny_tokenizer("no-system"), PROMPTS)
    texts = ["2+2?", "{question}", "und?", ""]
    trajectories = [Trajectory(Question("q", text), (answer(f" {text}"),)) for text in texts]
    for prompt in PROMPTS:
        rendered = dialogue.ask(prompt, trajectories)
        assert rendered == [ids for t in trajectories for ids in dialogue.ask(prompt, [t])]
    assert dialogue.ask("initial", []) == []


def test_a_prompt_of_a_users_own_may_name_every_answer_of_the_chain_and_the_reference():
    prompts = {"judge": [Message("user", "{answer_1}|{answer_2}|{initial_answer}|{{answer_3}}|{reference}")]}
    dialogue = Dialogue(tiny_tokenizer("qwen2"), prompts)
    chain = corrected(Question("q", "2+2?", ("4", "four")), answer("five"), answer("six "))
    (ids,) = dialogue.ask("judge", [chain])
    assert "five|six|six|{answer_3}|4<|im_end|>" in dialogue.tokenizer.decode(ids)
    with pytest.raises(UserError, match=r"judge has {answer_2}, which is not known where it is asked"):
        dialogue.ask("judge", [chain.upto(1)])
    lengths, answers = dialogue.lengths("judge", 3, [chain.question])
    assert answers == 3
    assert lengths == [len(ids) - len("fivesixsix")]


def test_prompts_that_are_missing_or_leave_out_their_subject_are_named():
    check_prompts(PROMPTS, ["initial", "correction"], "data.prompts")
    with pytest.raises(UserError, match=r"data\.prompts has no rationalization: the algorithm needs these"):
        check_prompts(PROMPTS, ["rationalization"], "data.prompts")
    with pytest.raises(UserError, match=r"data\.prompts has no judge"):
        check_prompts({"judge": []}, ["judge"], "data.prompts")
    hintless = {"rationalization": [Message("user", "{question}")]}
    with pytest.raises(UserError, match=r"data\.prompts\.rationalization has no \{reference\}"):
        check_prompts(hintless, [], "data.prompts")
    with pytest.raises(UserError, match=r"data\.prompts\.correction has no \{initial_answer\}"):
        check_prompts({"correction": [Message("user", "{question}")]}, [], "data.prompts")


@pytest.mark.parametrize("kind", RENDERED)
def test_a_correction_that_was_cut_teaches_no_end_of_turn(kind):
    tokenizer = tiny_tokenizer(kind)
    _, target = Dialogue(tokenizer, PROMPTS).example(example(tokenizer, "fou", finished=False))
    assert tokenizer.decode(target) == "fou"


def test_qwen_keeps_its_default_system_prompt_where_we_give_none():
    prompts = {"initial": [Message("user", "Q: {question}")]}
    tokenizer = tiny_tokenizer("qwen2")
    assert tokenizer.decode(initial_prompt(Dialogue(tokenizer, prompts), "2+2?")) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ: 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_drops_the_system_message_without_a_word_still_gets_it():
    tokenizer = tiny_tokenizer("phi3")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['role'] == 'system'", "false")
    text = tokenizer.decode(initial_prompt(Dialogue(tokenizer, PROMPTS), "2+2?"))
    assert text == "<|user|>\nBe brief.\n\nQ: 2+2?<|end|>\n<|assistant|>\n"


def test_completions_stop_at_the_end_of_turn_and_at_all_ends_of_the_model():
    tokenizer = tiny_tokenizer("phi3")
    config = GenerationConfig(eos_token_id=[7, 9])
    ends = {7, 9, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    assert set(Dialogue(tokenizer, PROMPTS, config).stop_ids) == ends


def test_a_template_without_special_tokens_ends_turns_with_the_eos_token():
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Dialogue(tokenizer, PROMPTS).end_of_turn == tokenizer.eos_token_id


def test_placeholders_in_questions_and_answers_stay_as_they_are():
    tokenizer = tiny_tokenizer("qwen2")
    prompt = correction_prompt(Dialogue(tokenizer, PROMPTS), "what is {initial_answer}?", "{question} {x}")
    assert "Q: what is {initial_answer}?\nA: {question} {x}<|im_end|>" in tokenizer.decode(prompt)


def test_a_tokenizer_without_chat_template_is_refused():
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Dialogue(tokenizer, PROMPTS)


def test_messages_that_the_template_refuses_are_named():
    prompts = {"initial": [Message("user", "Hello."), Message("user", "Q: {question}")]}
    with pytest.raises(UserError, match=r"refuses the messages .*roles must alternate"):
        initial_prompt(Dialogue(tiny_tokenizer("no-system"), prompts), "2+2?")


def test_the_papers_prompts_are_two_shot_for_corrections_only():
    raw = yaml.safe_load((ROOT / "configs/prompts/paper.yaml").read_text())
    roles = {name: [message["role"] for message in messages] for name, messages in raw.items()}
    assert roles["initial"] == ["system", "user"]
    assert roles["correction"] == ["system", "user", "assistant", "user", "assistant", "user"]
    prompts = {name: [Message(**message) for message in raw[name]] for name in raw}
    tokenizer = tiny_tokenizer("no-system")
    text = tokenizer.decode(correction_prompt(Dialogue(tokenizer, prompts), "who?", "me"))
    assert text.count("Write a correction if the initial answer is incorrect.</turn>") == 3
    assert "Final Answer: Ellen Page (now Elliot Page)</turn>" in text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_a_template_reaches_nothing_but_its_messages(template, reason):
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"the chat template of .* on? .*{reason}|refuses .*{reason}"):
        Dialogue(tokenizer, PROMPTS)
