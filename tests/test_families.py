"""Families of models that have recipes: prompts, gradients, and an engine that samples what was trained."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import MANUAL, ROOT
from families import FAMILIES, Family

from stasc.errors import UserError
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message
from stasc.sampling import Request, Sampling, VLLMSampler
from stasc.sampling.probe import Probe
from stasc.training.batches import TokenizedExample, pack
from stasc.training.loss import NegativeLogLikelihood
from stasc.training.weights import gather_weights, load_model, log_probabilities, write_model
from stasc.trajectory import Question, Trajectory

PROMPTS = {
    "initial": [Message("user", "Q: {question}")],
    "correction": [
        Message("system", "Correct it."),
        Message("user", "Q: 1+1?\nA: 3"),
        Message("assistant", "2"),
        Message("user", "Q: {question}\nA: {initial_answer}"),
    ],
}
VALUES = {"question": "2+2?", "initial_answer": "five"}

# Written out by hand: an initial prompt without a system message, a correction prompt with one, and what ends
# the answer's turn.
RENDERED = {
    "smollm2": (
        "<|im_start|>system\nYou are SmolLM, a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ: 2+2?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nCorrect it.<|im_end|>\n<|im_start|>user\nQ: 1+1?\nA: 3<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nQ: 2+2?\nA: five<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ: 2+2?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nCorrect it.<|im_end|>\n<|im_start|>user\nQ: 1+1?\nA: 3<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nQ: 2+2?\nA: five<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": (
        "<|im_start|>user\nQ: 2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>system\nCorrect it.<|im_end|>\n<|im_start|>user\nQ: 1+1?\nA: 3<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nQ: 2+2?\nA: five<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "llama3.2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ: 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
        "Correct it.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ: 1+1?\nA: 3<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ: 2+2?\nA: five<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nQ: 2+2?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nCorrect it.\n\nQ: 1+1?\nA: 3<end_of_turn>\n"
        "<start_of_turn>model\n2<end_of_turn>\n<start_of_turn>user\nQ: 2+2?\nA: five<end_of_turn>\n"
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "phi3": (
        "<|user|>\nQ: 2+2?<|end|>\n<|assistant|>\n",
        "<|system|>\nCorrect it.<|end|>\n<|user|>\nQ: 1+1?\nA: 3<|end|>\n<|assistant|>\n2<|end|>\n"
        "<|user|>\nQ: 2+2?\nA: five<|end|>\n<|assistant|>\n",
        "<|end|>",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: family.make(root / name) for name, family in FAMILIES.items()}


def recipes(family: Family) -> list[dict]:
    found = [yaml.safe_load(path.read_text()) for path in ROOT.glob(f"configs/models/{family.recipes}.yaml")]
    assert found
    return found


def dialogue_of(name: str, folder: Path) -> Dialogue:
    """Of a folder, with the template options of the family's recipes."""
    (template,) = {
        str(r["model"].get("template")): r["model"].get("template") for r in recipes(FAMILIES[name])
    }.values()
    of = ModelFolder(folder)
    return Dialogue(of.tokenizer(), PROMPTS, of.generation_config(), template)


def examples_of(dialogue: Dialogue) -> list[TokenizedExample]:
    """Corrections that share a prompt, that share its beginning, and a first answer."""
    tokenizer, found = dialogue.tokenizer, []
    for prompt, initial, answer in [
        ("correction", "five", "four, I am sorry"),
        ("correction", "five", "four and no more"),
        ("correction", "one or two", "it is 4"),
        ("initial", "", "4"),
    ]:
        (ids,) = dialogue.render(prompt, [{**VALUES, "initial_answer": initial}])
        found.append(TokenizedExample(ids, [*tokenizer.encode(answer), dialogue.end_of_turn]))
    return found


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompts_are_what_the_family_knows(folders, name):
    dialogue = dialogue_of(name, folders[name])
    initial, correction, end = RENDERED[name]
    for prompt, expected in (("initial", initial), ("correction", correction)):
        (ids,) = dialogue.render(prompt, [VALUES])
        assert dialogue.tokenizer.decode(ids) == expected
        assert all(id_ < ModelFolder(folders[name]).config["vocab_size"] for id_ in ids)
    assert dialogue.tokenizer.decode([dialogue.end_of_turn]) == end
    ends = dialogue.tokenizer.convert_tokens_to_ids([end, FAMILIES[name].eos, *FAMILIES[name].ends])
    assert set(dialogue.stop_ids) == set(ends)


def test_a_template_that_asks_for_the_date_is_told_the_same_one_every_day():
    tokenizer = FAMILIES["llama3.2"].tokenizer()
    (ids,) = Dialogue(tokenizer, PROMPTS).render("initial", [VALUES])
    assert tokenizer.decode(ids) == RENDERED["llama3.2"][0]
    (ids,) = Dialogue(tokenizer, PROMPTS, template={"date_string": "1 May 2020"}).render("initial", [VALUES])
    assert tokenizer.decode(ids) == RENDERED["llama3.2"][0].replace("26 Jul 2024", "1 May 2020")


def test_without_its_option_qwen3_thinks():
    tokenizer = FAMILIES["qwen3"].tokenizer()
    (ids,) = Dialogue(tokenizer, PROMPTS).render("initial", [VALUES])
    assert tokenizer.decode(ids) + "<think>\n\n</think>\n\n" == RENDERED["qwen3"][0]


@pytest.mark.parametrize("option", ["enable_thinkin", "messages", "add_generation_prompt", "strftime_now"])
def test_an_option_that_the_template_does_not_have_is_refused(option):
    tokenizer = FAMILIES["qwen3"].tokenizer()
    with pytest.raises(UserError, match=f"model.template has '{option}', which is no option of the chat"):
        Dialogue(tokenizer, PROMPTS, template={option: True})


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_sharing_gives_the_gradient_of_one_example_at_a_time(folders, name):
    model = load_model(folders[name])
    examples = examples_of(dialogue_of(name, folders[name]))
    nll = NegativeLogLikelihood(model)
    assert nll.has_plain_head
    assert nll.supports_prefix_sharing
    losses = []
    for prompt, target, *_ in examples:
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(-logits.log_softmax(-1)[range(len(target)), target].sum())
    torch.stack(losses).sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    nll(pack(examples, 1, ends_step=True)).backward()
    for key, parameter in model.named_parameters():
        assert float((parameter.grad - expected[key]).norm() / expected[key].norm()) < 1e-5, key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_that_the_recipes_wrap_are_those_of_the_model(folders, name):
    model = load_model(folders[name])
    layers = {f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in model.model.layers}
    assert model.supports_gradient_checkpointing
    for recipe in recipes(FAMILIES[name]):
        strategy = recipe["trainer"]["strategy"]["init_args"]
        for policy in ("auto_wrap_policy", "activation_checkpointing_policy"):
            assert set(strategy.get(policy, layers)) == layers


# ---------------------------------------------------------------- the engine


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["smollm2", "qwen3", "llama3.2", "gemma3"]
)  # the paper's runs have the others
def test_the_engine_samples_from_what_was_trained(folders, name, tmp_path):
    m0, m1 = folders[name], tmp_path / "M_1"
    dialogue = dialogue_of(name, m0)
    prompts = dialogue.ask("initial", [Trajectory(Question(f"{i}", "?" * (1 + 30 * i))) for i in range(3)])
    trainer = torch.nn.Module()
    trainer.model = load_model(m0)
    nll = NegativeLogLikelihood(trainer.model)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3)
    before = Probe(prompts, log_probabilities(gather_weights(trainer, m0), m0, prompts))
    for _ in range(5):
        nll(pack(examples_of(dialogue), 1, ends_step=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = gather_weights(trainer, m0)
    write_model(weights, m0, m1, MANUAL)
    after = Probe(prompts, log_probabilities(weights, m0, prompts))
    engine = VLLMSampler(kv_cache_gib=0.1, log_level="WARNING")
    engine.start(m0, device=torch.device("cpu"), context=512, log=tmp_path / "engine.log")
    try:
        before.check(engine, m0)
        engine.load(m1)
        after.check(engine, m1)
        with pytest.raises(UserError, match="does not hold"):
            before.check(engine, m1)
        greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=24)
        asked = [Request(prompt, 1, 0) for prompt in prompts]
        drawn = dict(engine.sample(asked, greedy, dialogue.stop_ids))
    finally:
        engine.close()
    for i, prompt in enumerate(prompts):
        (draw,) = drawn[i]
        assert list(draw.token_ids) == greedily(m1, prompt, dialogue.stop_ids, greedy.max_tokens)


@torch.inference_mode()
def greedily(folder: Path, prompt: list[int], stop_ids: tuple[int, ...], max_tokens: int) -> list[int]:
    """The greedy completion, computed without cache, batch or generate."""
    model, ids = load_model(folder).eval(), list(prompt)
    while len(ids) < len(prompt) + max_tokens:
        token = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]
