"""Both samplers, real, on tiny random models; one vLLM engine serves almost all tests."""

import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import stasc
from stasc.errors import UserError
from stasc.sampling import Request, Sampling, TransformersSampler, VLLMSampler
from stasc.sampling import vllm as handle

CONTEXT = 128
VOCABULARY = 300
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, top_p=0.9, max_tokens=24)
WARM = Sampling(temperature=0.8, top_p=0.9, max_tokens=24)

DEFAULTS = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "eos_token_id": 9}


def random_model(seed: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """``first`` has hidden defaults that would change every completion; ``plain`` is it without them."""
    root = tmp_path_factory.mktemp("some models")
    for name, seed in (("plain", 0), ("first", 0), ("second", 1), ("broken", 1)):
        random_model(seed).save_pretrained(root / name)
        (root / name / "generation_config.json").unlink()
    (root / "first" / "generation_config.json").write_text(json.dumps(DEFAULTS))
    tensors = load_file(root / "broken" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, root / "broken" / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def samplers(models):
    started = {"transformers": TransformersSampler(batch_size=16), "vllm": VLLMSampler(kv_cache_gib=0.1)}
    for sampler in started.values():
        sampler.start(models / "first", device=CPU, context=CONTEXT, log=models / "engine.log")
    yield started
    for sampler in started.values():
        sampler.close()


@pytest.fixture(params=["transformers", "vllm"])
def sampler(request, samplers, models):
    samplers[request.param].load(models / "first")
    return samplers[request.param]


@pytest.fixture
def vllm(samplers, models):
    samplers["vllm"].load(models / "first")
    return samplers["vllm"]


def requests(count: int, n: int = 1) -> list[Request]:
    generator = torch.Generator().manual_seed(count)
    prompts = [torch.randint(VOCABULARY, (4 + 3 * i % 50,), generator=generator) for i in range(count)]
    return [Request(prompt.tolist(), n, 1000 * i) for i, prompt in enumerate(prompts)]


def all_draws(sampler, requests, sampling, stop_ids=()):
    draws = dict(sampler.sample(requests, sampling, stop_ids))
    assert all(len(draws[i]) == request.n for i, request in enumerate(requests))
    return [draws[i] for i in range(len(requests))]


@functools.cache
def read(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.inference_mode()
def greedy(folder: Path, prompt: list[int], max_tokens: int) -> tuple[int, ...]:
    """The completion by its definition, without cache, batch or generate."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(read(folder)(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tuple(ids[len(prompt) :])


def worker_pid(sampler: VLLMSampler) -> int:
    return sampler._engine._process.pid


def test_greedy_is_the_argmax_whatever_the_generation_config_says(sampler, models):
    asked = requests(6, n=2)
    for request, draws in zip(asked, all_draws(sampler, asked, GREEDY), strict=True):
        assert draws == [(greedy(models / "plain", request.prompt_ids, GREEDY.max_tokens), False)] * 2


def test_draws_depend_on_prompt_and_seed_alone(sampler):
    asked = requests(24, n=3)
    expected = all_draws(sampler, asked, WARM, [5])
    assert all(len(set(draws)) > 1 for draws in expected)

    shuffled = random.Random(0).sample(range(24), 24)
    assert all_draws(sampler, [asked[i] for i in shuffled], WARM, [5]) == [expected[i] for i in shuffled]

    alone = [all_draws(sampler, [request], WARM, [5])[0] for request in asked[:4]]
    assert alone == expected[:4]

    children = [request._replace(n=1, seed=request.seed + j) for request in asked[:4] for j in range(3)]
    flat = [draw for draws in expected[:4] for draw in draws]
    assert [draw for (draw,) in all_draws(sampler, children, WARM, [5])] == flat


def test_generation_config_changes_no_draw(samplers, models):
    plain = TransformersSampler()
    plain.start(models / "plain", device=CPU, context=CONTEXT, log=models / "unused.log")
    samplers["transformers"].load(models / "first")
    asked = requests(4, n=2)
    assert all_draws(plain, asked, WARM) == all_draws(samplers["transformers"], asked, WARM)


def test_exactly_the_stop_ids_end_a_completion(sampler, models):
    request = requests(1)[0]
    tokens = greedy(models / "plain", request.prompt_ids, GREEDY.max_tokens)
    stop = tokens[10]
    at = tokens.index(stop)
    assert all_draws(sampler, [request], GREEDY, [stop, VOCABULARY - 1]) == [[(tokens[:at], True)]]
    assert all_draws(sampler, [request], GREEDY, []) == [[(tokens, False)]]

    just_enough = Sampling(0.0, 1.0, max_tokens=at + 1)
    assert all_draws(sampler, [request], just_enough, [stop]) == [[(tokens[:at], True)]]
    if at:
        one_less = Sampling(0.0, 1.0, max_tokens=at)
        assert all_draws(sampler, [request], one_less, [stop]) == [[(tokens[:at], False)]]


def test_first_tokens_follow_the_exact_distribution(sampler, models):
    prompt, n = requests(1)[0].prompt_ids, 3000
    with torch.inference_mode():
        logits = read(models / "plain")(torch.tensor([prompt])).logits[0, -1]
    probability, token = (logits / 0.7).softmax(-1).sort(descending=True)
    kept = probability.cumsum(-1) - probability < 0.8
    exact = torch.zeros(VOCABULARY).scatter(0, token[kept], probability[kept] / probability[kept].sum())
    assert 5 < kept.sum() < 150

    (draws,) = all_draws(sampler, [Request(prompt, n, 0)], Sampling(0.7, 0.8, max_tokens=1))
    drawn = torch.tensor([draw.token_ids[0] for draw in draws])
    frequency = torch.bincount(drawn, minlength=VOCABULARY) / n
    assert not frequency[exact == 0].any()
    deviation = (frequency - exact).abs() / (exact * (1 - exact) / n).sqrt().clamp(min=1e-9)
    assert deviation[exact > 0].max() < 4.5
    assert (frequency - exact).abs().sum() / 2 < 2 * (kept.sum() / n).sqrt() / 2


def test_new_weights(sampler, models):
    asked = requests(6)
    before = all_draws(sampler, asked, GREEDY)
    sampler.load(models / "second")
    after = all_draws(sampler, asked, GREEDY)
    assert after != before
    assert [tokens for ((tokens, _),) in after] == [
        greedy(models / "second", request.prompt_ids, GREEDY.max_tokens) for request in asked
    ]
    sampler.load(models / "first")
    assert all_draws(sampler, asked, GREEDY) == before


def test_missing_tensor_is_refused_and_the_old_weights_stay(sampler, models):
    asked = requests(3)
    before = all_draws(sampler, asked, GREEDY)
    with pytest.raises(UserError, match=r"broken.*model.layers.1.mlp.up_proj.weight is missing, not 96x64"):
        sampler.load(models / "broken")
    sampler.release()
    assert all_draws(sampler, asked, GREEDY) == before


@pytest.mark.parametrize(
    "request_", [Request([1] * 110, 1, 0), Request([], 1, 0), Request([VOCABULARY], 1, 0), Request([1], 0, 0)]
)
def test_impossible_requests_are_refused(sampler, request_):
    with pytest.raises(ValueError, match="request 1 has"):
        sampler.sample([*requests(1), request_], WARM, [])


def test_no_requests_no_draws(sampler):
    assert list(sampler.sample([], WARM, [])) == []


def test_training_process_is_left_alone(sampler, models):
    states = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), dict(os.environ)
    sampler.load(models / "second")
    all_draws(sampler, requests(3), WARM)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), torch.get_num_threads(), dict(os.environ)) == states[1:]
    assert "vllm" not in sys.modules


def test_a_killed_worker_costs_no_draw(vllm, caplog):
    asked = requests(300)
    expected = all_draws(vllm, asked, WARM, [5])
    pid = worker_pid(vllm)
    with caplog.at_level(logging.WARNING):
        stream = vllm.sample(asked, WARM, [5])
        draws = [next(stream)]
        os.kill(pid, signal.SIGKILL)
        draws += stream
    assert "The sampling engine died (exit status -9" in caplog.text
    assert len(draws) == len(asked)
    assert [dict(draws)[i] for i in range(len(asked))] == expected
    assert worker_pid(vllm) != pid


def test_dying_twice_in_a_row_is_told(models, monkeypatch):
    monkeypatch.setattr(handle, "_environment", lambda device: {"PYTHONHOME": "nowhere"})
    sampler = VLLMSampler()
    sampler.start(models / "first", device=CPU, context=CONTEXT, log=models / "dead.log")
    with pytest.raises(UserError, match=r"died twice.*dead\.log.*the same command goes on"):
        list(sampler.sample(requests(1), WARM, []))
    assert sampler._engine is None
    assert "encodings" in (models / "dead.log").read_text()


def test_too_much_memory_is_told(models):
    sampler = VLLMSampler(kv_cache_gib=10_000)
    sampler.start(models / "first", device=CPU, context=CONTEXT, log=models / "greedy.log")
    with pytest.raises(UserError, match=r"greedy\.log.*Lower kv_cache_gib \(now 10000\)"):
        sampler.load(models / "second")


def test_an_abandoned_stream_does_not_spoil_the_next(vllm):
    asked = requests(5)
    expected = all_draws(vllm, asked, GREEDY)
    stream = vllm.sample(requests(40), WARM, [])
    next(stream)
    stream.close()
    assert all_draws(vllm, asked, GREEDY) == expected


def test_no_vllm_is_told(models, monkeypatch):
    monkeypatch.setattr(handle.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\./setup\.sh.*--sampler TransformersSampler"):
        VLLMSampler().start(models / "first", device=CPU, context=CONTEXT, log=models / "unused.log")


PARENT = """
import sys, time, torch
from pathlib import Path
from stasc.sampling import Request, Sampling, VLLMSampler

sampler = VLLMSampler(kv_cache_gib=0.1)
sampler.start(Path(sys.argv[1]), device=torch.device("cpu"), context=64, log=Path(sys.argv[2]))
print(sampler._engine._process.pid, flush=True)
list(sampler.sample([Request([1, 2], 1, 0)], Sampling(max_tokens=2), []))
print("ready", flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("when", ["while it starts", "when it is ready"])
def test_the_worker_dies_with_its_parent(models, tmp_path, when):
    # Uninstalled, from the repository's root, in a path with a space.
    root = tmp_path / "a copy"
    shutil.copytree(Path(stasc.__file__).parent, root / "stasc")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, models / "first", tmp_path / "log"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(parent.stdout.readline())
    assert alive(pid)
    if when == "when it is ready":
        assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def test_environment_of_the_worker(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert handle._environment(torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7")
    environment = handle._environment(torch.device("cuda", 1))
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert not {"RANK", "MASTER_ADDR"} & environment.keys()
