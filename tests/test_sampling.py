"""Both samplers on tiny random models; almost all tests share one vLLM engine."""

import functools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import stasc
from stasc.errors import UserError
from stasc.run import NEVER, START, first_use
from stasc.sampling import Draw, Request, Sampler, Sampling, TransformersSampler, VLLMSampler
from stasc.sampling import vllm as vllm_module

pytestmark = pytest.mark.slow

CONTEXT = 128
VOCABULARY = 300
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, top_p=0.9, max_tokens=24)
WARM = Sampling(temperature=0.8, top_p=0.9, max_tokens=24)

GENERATION_CONFIG = {
    "do_sample": True,
    "top_k": 1,
    "repetition_penalty": 5.0,
    "temperature": 0.1,
    "eos_token_id": 9,
}


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
    """Model folders.

    ``first`` has a generation_config.json that would change every completion, and the weights of ``plain``,
    which has none. ``embedding`` differs from ``plain`` in the embedding, which is also the output layer.
    """
    root = tmp_path_factory.mktemp("some models")
    names = {"plain": 0, "first": 0, "embedding": 0, "second": 1, "incomplete": 1, "truncated": 1}
    for name, seed in names.items():
        random_model(seed).save_pretrained(root / name)
        (root / name / "generation_config.json").unlink()
    (root / "first" / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    weights = {name: root / name / "model.safetensors" for name in names}

    tensors = load_file(weights["embedding"])
    tensors |= {"model.embed_tokens.weight": load_file(weights["second"])["model.embed_tokens.weight"]}
    save_file(tensors, weights["embedding"], {"format": "pt"})

    tensors = load_file(weights["incomplete"])
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights["incomplete"], {"format": "pt"})

    os.truncate(weights["truncated"], weights["truncated"].stat().st_size - 1000)
    return root


@pytest.fixture(scope="module")
def samplers(models):
    started = {
        "transformers": TransformersSampler(batch_size=16),
        "vllm": VLLMSampler(log_level="WARNING"),
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_BATCH_INVARIANT", "1")  # would crash an engine on CPU
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
    """The greedy completion, computed without cache, batch or generate."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(read(folder)(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tuple(ids[len(prompt) :])


@torch.inference_mode()
def log_probabilities(folder: Path, ids: list[int], head: Path | None = None) -> torch.Tensor:
    """Log-probabilities under the model in ``folder``, with the output layer of ``head`` if given."""
    hidden = read(folder).model(torch.tensor([ids])).last_hidden_state[0, :-1]
    scores = (hidden @ read(head or folder).lm_head.weight.T).log_softmax(dim=-1)
    return scores[torch.arange(len(ids) - 1), ids[1:]]


def worker_pid(sampler: VLLMSampler) -> int:
    return sampler._engine._process.pid


def test_greedy_is_the_argmax_and_ignores_the_generation_config(sampler, models):
    asked = requests(6, n=2)
    for request, draws in zip(asked, all_draws(sampler, asked, GREEDY), strict=True):
        assert draws == [(greedy(models / "plain", request.prompt_ids, GREEDY.max_tokens), False)] * 2


def test_draws_depend_only_on_prompt_and_seed(sampler):
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


def test_only_the_stop_ids_end_a_completion(sampler, models):
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


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("incomplete", r"incomplete is not of.*model\.layers\.1\.mlp\.up_proj\.weight is missing, not 96x64"),
        ("truncated", r"truncated has no usable safetensors weights"),
    ],
)
def test_damaged_weights_are_refused_and_the_old_ones_stay_loaded(sampler, models, folder, reason):
    asked = requests(3)
    before = all_draws(sampler, asked, GREEDY)
    engine = getattr(sampler, "_engine", None)
    with pytest.raises(UserError, match=reason):
        sampler.load(models / folder)
    sampler.release()
    assert all_draws(sampler, asked, GREEDY) == before
    assert getattr(sampler, "_engine", None) is engine


def test_log_probabilities_match_the_model(sampler, models):
    prefix, *others = (request.prompt_ids * 10 for request in requests(4))
    sequences = [prefix[:70], *(prefix[:70] + ids[:20] for ids in others), [3], prefix[: CONTEXT - 1]]
    for folder in ("first", "second", "first"):
        sampler.load(models / folder)
        expected = [log_probabilities(models / folder, ids) for ids in sequences]
        all_draws(sampler, [Request(ids, 2, 0) for ids in sequences[:4]], WARM)  # fills the prefix cache
        for _ in range(2):
            found = sampler.log_probabilities(sequences)
            for actual, reference in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.tensor(actual), reference, atol=1e-4, rtol=0)


def test_log_probabilities_follow_new_weights(sampler, models):
    ids = requests(8)[7].prompt_ids
    sampler.load(models / "embedding")
    found = torch.tensor(sampler.log_probabilities([ids])[0])
    torch.testing.assert_close(found, log_probabilities(models / "embedding", ids), atol=1e-4, rtol=0)
    for stale in ("first", "embedding"):  # all weights are old, or only those of the output layer
        old = log_probabilities(models / stale, ids, head=models / "first")
        assert (found - old).abs().mean() > 1e-2


@pytest.mark.parametrize("sequence", [[], [VOCABULARY], [1] * CONTEXT])
def test_impossible_sequences_are_refused(sampler, sequence):
    with pytest.raises(ValueError, match="request 1 has"):
        sampler.log_probabilities([[1, 2], sequence])


def test_prompt_tokens_from_the_prefix_cache(samplers, vllm):
    generator, one_token = random.Random(0), Sampling(max_tokens=1)
    unrelated = [Request(generator.choices(range(VOCABULARY), k=100), 3, 0) for _ in range(20)]
    all_draws(vllm, unrelated, one_token)
    assert vllm.prefix_hits == 0

    prefix = generator.choices(range(VOCABULARY), k=96)  # three blocks
    shared = [Request(prefix + generator.choices(range(VOCABULARY), k=4), 3, 0) for _ in range(20)]
    all_draws(vllm, shared, one_token)
    assert vllm.prefix_hits == pytest.approx(19 / 20 * 96 / 100)
    all_draws(vllm, shared, replace(GREEDY, max_tokens=1))
    assert vllm.prefix_hits == pytest.approx(96 / 100)
    assert list(vllm.sample([], WARM, [])) == []
    assert vllm.prefix_hits is None

    all_draws(samplers["transformers"], shared[:2], one_token)
    assert samplers["transformers"].prefix_hits is None


@pytest.mark.parametrize(
    "request_", [Request([1] * 110, 1, 0), Request([], 1, 0), Request([VOCABULARY], 1, 0), Request([1], 0, 0)]
)
def test_impossible_requests_are_refused(sampler, request_):
    with pytest.raises(ValueError, match="request 1 has"):
        sampler.sample([*requests(1), request_], WARM, [])


def test_no_requests_give_no_draws(sampler):
    assert list(sampler.sample([], WARM, [])) == []


def test_sampling_leaves_the_state_of_the_training_process_unchanged(sampler, models):
    states = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), dict(os.environ)
    sampler.load(models / "second")
    all_draws(sampler, requests(3), WARM)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), torch.get_num_threads(), dict(os.environ)) == states[1:]
    assert "vllm" not in sys.modules


def test_a_killed_worker_loses_no_draws(vllm, caplog):
    asked = requests(300)
    expected = all_draws(vllm, asked, WARM, [5])
    pid = worker_pid(vllm)
    with caplog.at_level(logging.WARNING):
        stream = vllm.sample(asked, WARM, [5])
        draws = [next(stream)]
        os.kill(pid, signal.SIGKILL)
        draws += stream
    assert "The sampling engine died (exit status -9, as when Linux has no memory left; see" in caplog.text
    assert len(draws) == len(asked)
    assert [dict(draws)[i] for i in range(len(asked))] == expected
    assert worker_pid(vllm) != pid


def test_a_worker_that_dies_twice_in_a_row_is_reported(models, monkeypatch):
    monkeypatch.setattr(vllm_module, "_environment", lambda device: {"PYTHONHOME": "nowhere"})
    sampler = VLLMSampler()
    sampler.start(models / "first", device=CPU, context=CONTEXT, log=models / "dead.log")
    with pytest.raises(UserError, match=r"died twice.*dead\.log.*run the same command again to resume"):
        list(sampler.sample(requests(1), WARM, []))
    assert sampler._engine is None
    assert "encodings" in (models / "dead.log").read_text()


def test_an_engine_that_finds_no_shared_memory_says_where_to_make_room(models, tmp_path):
    alone = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if subprocess.run([*alone, *mount], check=False, capture_output=True).returncode:
        pytest.skip("this machine gives no file systems of their own to users")
    start = f"""
from pathlib import Path
import torch
from stasc.errors import UserError
from stasc.sampling import Request, Sampling, VLLMSampler
sampler = VLLMSampler(0.01)
sampler.start(Path({str(models / "first")!r}), device=torch.device("cpu"), context=64, log=Path("engine.log"))
try:
    list(sampler.sample([Request([1], 1, 0)], Sampling(max_tokens=4), []))
except UserError as error:
    print(error)
"""
    full = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full"
    command = [*alone, "sh", "-c", f'{full}; exec "$0" -c "$1"', sys.executable, start]
    environment = os.environ | {"PYTHONPATH": str(Path(stasc.__file__).parents[1])}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert not ended.returncode, ended.stderr
    assert "No space left on device; see " in ended.stdout
    assert "engine.log). Make room in /dev/shm (of a container: --shm-size) or in " in ended.stdout


@pytest.mark.parametrize(("gib", "advice"), [(1e6, "Lower"), (5e-5, "Raise")])
def test_an_impossible_cache_size_is_reported(models, tmp_path, gib, advice):
    sampler = VLLMSampler(kv_cache_gib=gib)
    sampler.start(models / "first", device=CPU, context=CONTEXT, log=tmp_path / "cache.log")
    pid = worker_pid(sampler)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=rf"cache\.log.*{advice} kv_cache_gib \(now {re.escape(f'{gib:g}')}\)"
    ):
        sampler.load(models / "second")
    assert time.monotonic() - began < 60  # mostly the start of the engine
    assert not session(pid)


def test_closing_a_stream_early_does_not_affect_the_next_one(vllm):
    asked = requests(5)
    sequences = [request.prompt_ids for request in asked]
    expected = all_draws(vllm, asked, GREEDY), vllm.log_probabilities(sequences)
    stream = vllm.sample(requests(40), WARM, [])
    next(stream)
    stream.close()
    assert vllm.log_probabilities(sequences) == expected[1]
    assert all_draws(vllm, asked, GREEDY) == expected[0]


def test_missing_vllm_is_reported(models, monkeypatch):
    monkeypatch.setattr(vllm_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\./setup\.sh.*--sampler TransformersSampler"):
        VLLMSampler().start(models / "first", device=CPU, context=CONTEXT, log=models / "unused.log")


PARENT = """
import signal, sys, torch
from pathlib import Path
from stasc.sampling import Request, Sampling, VLLMSampler

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run with SIGINT ignored
sampler = VLLMSampler(kv_cache_gib=0.1)
sampler.start(Path(sys.argv[1]), device=torch.device("cpu"), context=64, log=Path(sys.argv[2]))
print(sampler._engine._process.pid, flush=True)
while True:
    for _ in sampler.sample([Request([1, i], 5, 0) for i in range(200)], Sampling(max_tokens=60), []):
        print("sampling", flush=True)
"""


def session(leader: int) -> list[int]:
    """The living processes of a session; each worker leads its own session."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, session_id, *_ = stat.read_text().rpartition(")")[2].split()
            if state != "Z" and int(session_id) == leader:
                living.append(int(stat.parent.name))
    return living


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (signal.SIGKILL, "starting"),
        (signal.SIGKILL, "sampling"),
        (signal.SIGINT, "sampling"),
    ],
)
def test_the_worker_ends_with_its_parent(models, tmp_path, how, when):
    # The worker must find a copy of stasc that is not installed, in a path with a space.
    root = tmp_path / "a copy"
    shutil.copytree(Path(stasc.__file__).parent, root / "stasc")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TMPDIR"] = str(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, models / "first", tmp_path / "log"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    worker = int(parent.stdout.readline())
    assert session(worker)
    if when == "sampling":
        assert parent.stdout.readline() == "sampling\n"
    os.killpg(parent.pid, how)  # Ctrl-C goes to the whole foreground process group
    output, _ = parent.communicate(timeout=30)
    # Of an interrupt Python's status is 1 where something has run code at its end.
    assert parent.returncode in ((-how, 1) if how == signal.SIGINT else (-how,))
    assert ("KeyboardInterrupt" in output) == (how == signal.SIGINT)
    deadline = time.monotonic() + 30
    while session(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not session(worker)
    assert not [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]


def test_the_worker_does_not_look_into_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    places = vllm_module._environment(CPU)["PYTHONPATH"].split(os.pathsep)
    assert str(tmp_path) not in places
    assert str(Path(stasc.__file__).parents[1]) in places


def test_environment_of_the_worker(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert vllm_module._environment(torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7")
    environment = vllm_module._environment(torch.device("cuda", 1))
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert environment["TRITON_F32_DEFAULT"] == "ieee"
    assert not {"RANK", "MASTER_ADDR", "HF_TOKEN"} & environment.keys()


def test_the_config_overrides_the_environment(models, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = SimpleNamespace(name="a GPU", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    launched = []
    monkeypatch.setattr(
        vllm_module, "_Engine", lambda options, environment, log: launched.append(environment)
    )
    for sampler in (VLLMSampler(1.0), VLLMSampler(1.0, log_level="DEBUG", batch_invariant=True)):
        sampler.start(
            models / "first", device=torch.device("cuda", 0), context=CONTEXT, log=models / "unused.log"
        )
    names = "VLLM_BATCH_INVARIANT", "VLLM_LOGGING_LEVEL"
    assert [[environment[name] for name in names] for environment in launched] == [
        ["0", "INFO"],
        ["1", "DEBUG"],
    ]


def test_log_level(vllm, models):
    assert all_draws(vllm, requests(1), WARM)
    log = (models / "engine.log").read_text()
    assert " WARNING " in log
    assert " INFO " not in log


def test_batch_invariance_is_refused_on_unsupported_devices(models, monkeypatch):
    sampler = VLLMSampler(batch_invariant=True)
    with pytest.raises(UserError, match=r"batch_invariant.*On CPU, float32 draws do not depend"):
        sampler.start(models / "first", device=CPU, context=CONTEXT, log=models / "unused.log")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"batch_invariant.*8\.0 or more.*7\.5"):
        sampler.start(
            models / "first", device=torch.device("cuda", 0), context=CONTEXT, log=models / "unused.log"
        )
    assert sampler._engine is None
    assert not (models / "unused.log").exists()


def test_identity(samplers, models):
    class CustomSampler(TransformersSampler):
        pass

    assert samplers["transformers"].identity == "stasc.sampling.transformers.TransformersSampler cpu float32"
    assert samplers["vllm"].identity == "stasc.sampling.vllm.VLLMSampler cpu float32"
    assert VLLMSampler(batch_invariant=True).identity == "stasc.sampling.vllm.VLLMSampler batch_invariant"
    custom = CustomSampler(batch_size=1)
    custom.start(models / "first", device=CPU, context=CONTEXT, log=models / "unused.log")
    assert custom.identity.endswith("CustomSampler cpu float32")
    assert custom.identity != samplers["transformers"].identity


def test_options_that_never_change_draws():
    options = {
        VLLMSampler(): ("kv_cache_gib", "log_level", "batch_invariant"),
        TransformersSampler(): ("batch_size",),
    }
    for sampler, names in options.items():
        assert all(first_use(sampler.first_uses, name, 1, 2) is NEVER for name in names)
        assert first_use(sampler.first_uses, "another", 1, 2) is START


def test_the_example_of_a_custom_sampler():
    code = Sampler.__doc__[Sampler.__doc__.index("    class EchoSampler") :]
    namespace = {"Sampler": Sampler, "Draw": Draw, "Path": Path, "torch": torch}
    exec(compile(textwrap.dedent(code), "example", "exec", dont_inherit=True), namespace)
    sampler = namespace["EchoSampler"]()
    sampler.start(Path("unused"), device=CPU, context=CONTEXT, log=Path("unused"))
    request = Request([7, 8, 9], 2, 0)
    assert list(sampler.sample([request], Sampling(max_tokens=2), [])) == [(0, [Draw((7, 8), False)] * 2)]
    assert sampler.log_probabilities([[7, 8, 9]]) == [[0.0, 0.0]]
    assert sampler.identity.endswith("EchoSampler cpu")
