"""The engine's memory: what fits beside training on real GPUs with real models, by their numbers."""

import re
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, tiny_model
from cpu_fsdp import CPUFSDPStrategy
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from transformers import Phi3Config, PreTrainedConfig, Qwen2Config

from stasc.errors import UserError
from stasc.memory import GIB, cache_bytes, engine_share, ran_out, training_bytes
from stasc.model_folder import ModelFolder
from stasc.sampling import VLLMSampler
from stasc.training.lora import LoRA
from stasc.training.module import CorrectionSFT

CONTEXT = 1500
FREE = {80: int(78.6 * GIB), 40: int(38.9 * GIB), 24: int(23.2 * GIB)}
"""What a GPU of so many GB has free beside a CUDA context."""


class Model(NamedTuple):
    weights: int
    config: PreTrainedConfig
    token: int


QWEN = Model(
    1_543_714_304,
    Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        dtype=torch.bfloat16,
    ),
    28_672,
)
PHI = Model(
    3_821_079_552,
    Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        pad_token_id=0,
        dtype=torch.bfloat16,
    ),
    393_216,
)


def cache(model: Model, gpu: int, **training: int) -> int:
    return cache_bytes(
        FREE[gpu] - training_bytes(0, model.weights, **training),
        alone=FREE[gpu],
        weights=2 * model.weights,
        vocabulary=model.config.vocab_size,
        token=model.token,
        sequences=256,
        context=CONTEXT,
        device="cuda",
    )


@pytest.mark.parametrize("model", [QWEN, PHI], ids=["qwen", "phi"])
def test_a_token_takes_what_the_config_says(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    assert ModelFolder(tmp_path).cache_bytes_per_token() == model.token


def test_a_small_model_gets_what_the_engine_can_use():
    full = 256 * CONTEXT * QWEN.token
    assert cache(QWEN, 80) == cache(QWEN, 80, gradients=True) == cache(QWEN, 80, shards=2) == full
    assert cache(QWEN, 40, shards=2) == full


@pytest.mark.parametrize(
    ("model", "gpu", "training", "gib"),
    [
        (QWEN, 40, {"gradients": True}, 8.3),  # DDP
        (PHI, 80, {}, 24.6),  # FSDP on one device
        (PHI, 80, {"shards": 2}, 46.0),
        (PHI, 40, {"shards": 2}, 6.3),
    ],
)
def test_a_large_one_gets_what_fits(model, gpu, training, gib):
    found = cache(model, gpu, **training)
    assert found / GIB == pytest.approx(gib, abs=0.05)
    held = training_bytes(0, model.weights, **training)
    assert found + held + 2 * model.weights + 4 * GIB < FREE[gpu]


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match=r"leaves 0\.0 GiB .* needs 7\.1 for its weights.*FSDPStrategy"):
        cache(PHI, 40)


def test_what_no_number_of_gpus_makes_fit_is_said():
    large = PHI._replace(weights=20_000_000_000)
    with pytest.raises(UserError, match=r"needs 37\.3 for its weights.*holds the whole model on one device"):
        cache(large, 40, shards=64)


WEIGHTS_AND_CACHE = {
    "Qwen2.5-0.5B": (494_032_768, 151_936, 2 * 24 * 2 * 64 * 2),
    "Qwen2.5-1.5B": (QWEN.weights, 151_936, QWEN.token),
    "Qwen2.5-3B": (3_085_938_688, 151_936, 2 * 36 * 2 * 128 * 2),
    "Phi-3-mini, 3.8B": (PHI.weights, 32_064, PHI.token),
    "Qwen2.5-7B": (7_615_616_512, 152_064, 2 * 28 * 4 * 128 * 2),
    "Qwen2.5-14B": (14_770_033_664, 152_064, 2 * 48 * 8 * 128 * 2),
    "Qwen2.5-32B": (32_763_876_352, 152_064, 2 * 64 * 8 * 128 * 2),
}
"""Of models: weights, vocabulary, and bytes of a token in the cache."""


@pytest.mark.parametrize(("heading", "lora"), [("All weights", False), ("Adapters", True)])
def test_the_table_of_models_and_gpus_in_the_documentation_is_computed(heading, lora):
    page = (ROOT / "docs/scale.md").read_text()
    table = re.search(rf"^\| {heading} .*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert [row[0] for row in rows] == list(WEIGHTS_AND_CACHE)
    for name, *cells in rows:
        weights, vocabulary, token = WEIGHTS_AND_CACHE[name]
        for place, cell in zip(head[1:], cells, strict=True):
            gpus, size = map(int, re.fullmatch(r"(\d+) x (\d+) GB", place).groups())
            frozen, trained = (weights, weights // 100) if lora else (0, weights)
            step = training_bytes(frozen, trained, shards=gpus, gradients=True)
            share = FREE[size] - training_bytes(frozen, trained, shards=gpus)
            working = {"vocabulary": vocabulary, "sequences": 256, "context": CONTEXT, "device": "cuda"}
            try:
                cache = cache_bytes(share, alone=FREE[size], weights=2 * weights, token=token, **working)
                fits = FREE[size] - step >= 4 * GIB
            except UserError:
                fits = False
            assert cell == (str(cache // (CONTEXT * token)) if fits else "-"), (name, place)


def test_adapters_have_no_moments_for_what_is_frozen():
    assert training_bytes(7_000, 10) == 4 * 7_000 + 12 * 10
    assert training_bytes(7_000, 10, gradients=True) == 4 * 7_000 + 16 * 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize(
    ("lora", "strategy", "shards"),
    [(None, DDPStrategy, 1), (LoRA(r=2), DDPStrategy, 1), (None, CPUFSDPStrategy, 2)],
    ids=["ddp", "lora", "fsdp"],
)
def test_training_holds_the_bytes_of_its_own_parameters(model, lora, strategy, shards):
    module = CorrectionSFT(str(model), lora=lora)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy(), barebones=True)
    trainer.strategy.connect(module)
    module.trainer = trainer
    told = module.training_bytes()
    trainer.training = True
    module.configure_model()
    weights = list(module.parameters())
    adam = torch.optim.AdamW([weight for weight in weights if weight.requires_grad])
    for weight in adam.param_groups[0]["params"]:
        weight.grad = torch.zeros_like(weight)
    adam.step()
    moments = [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    assert told == sum(tensor.nbytes for tensor in (*weights, *moments, *gradients)) // shards


def test_processes_share_the_memory_of_a_machine():
    alone, shared = (engine_share(torch.device("cpu"), 0, processes) for processes in (1, 2))
    assert shared == pytest.approx(alone / 2, rel=0.2)  # other programs come and go
    assert 0 < alone < shared + shared + 4 * GIB


def test_the_engine_chooses_within_its_memory_and_says_so(model, tmp_path, capsys):
    """That engines run with what is chosen, tests/test_sampling.py shows."""
    folder = ModelFolder(model)
    sequence = 64 * folder.cache_bytes_per_token()
    needed = folder.weight_bytes() + 256 * folder.config["vocab_size"] * 20
    sampler = VLLMSampler()
    sampler.memory = needed + 40 * sequence
    sampler.start(model, device=torch.device("cpu"), context=64, log=tmp_path / "log")
    sampler.close()
    assert "40 of the 256 completions" in capsys.readouterr().out
    sampler.memory = needed
    with pytest.raises(UserError, match=r"set sampler\.kv_cache_gib yourself"):
        sampler.start(model, device=torch.device("cpu"), context=64, log=tmp_path / "log")


def test_memory_that_ran_out_is_told_with_the_options_that_lower_it():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert ran_out(error.value).startswith(
        f"memory ran out (can't allocate memory: you tried to allocate {1 << 50} bytes. "
    )
    on_a_gpu = ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert on_a_gpu.startswith(
        "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB.): lower data."
    )
    assert ran_out(MemoryError()).startswith("memory ran out (MemoryError): lower data.batches.token_budget")
    assert ran_out(RuntimeError("shapes do not fit")) is None
