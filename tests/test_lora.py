"""LoRA and gradient checkpointing: what trains, what M_n is, and that two processes learn what one does."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import MANUAL, contents, demo_fit, tiny_model, tiny_tokenizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from safetensors.torch import load_file
from test_training import PROMPTS, batches, distance, recorded
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from stasc.errors import UserError
from stasc.prompting import Dialogue
from stasc.training.lora import LoRA
from stasc.training.module import CorrectionSFT
from stasc.training.weights import (
    empty_model,
    gather_weights,
    load_model,
    load_weights,
    log_probabilities,
    write_model,
)

Tensors = dict[str, Tensor]
SEQUENCE = [5, 80, 33, 33, 7, 120, 64]
TARGETS = {
    "all-linear": ("_proj.weight",),
    ("o_proj", "mlp.down_proj"): ("o_proj.weight", "mlp.down_proj.weight"),
}


@pytest.fixture(scope="module", params=["qwen2", "phi3"])
def folder(tmp_path_factory, request) -> Path:
    """M_0, with the output embedding tied to the input's (qwen2) and with one of its own (phi3)."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def trained(folder: Path, lora: LoRA) -> torch.nn.Module:
    """A model with trained adapters, held as a trainer's strategy holds it."""
    torch.manual_seed(0)
    wrapped = torch.nn.Module()
    wrapped.model = load_model(folder, lora).eval()
    for parameter in wrapped.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([SEQUENCE])).logits


def copied(module: torch.nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


# ---------------------------------------------------------------- adapters


def test_new_adapters_change_nothing_and_alone_can_train(folder):
    model = load_model(folder, LoRA(r=3))
    assert torch.equal(logits(model), logits(load_model(folder)))
    can = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert can == {name for name, _ in model.named_parameters() if ".lora_" in name} != set()
    assert {min(model.get_parameter(name).shape) for name in can} == {3}


def test_adapters_follow_from_the_seed_alone(qwen):
    def drawn(seed: int, before: int) -> tuple[Tensors, Tensor]:
        torch.manual_seed(seed)
        torch.rand(before)
        after = torch.get_rng_state()
        model = load_model(qwen, LoRA())
        return model.state_dict(), after != torch.get_rng_state()

    (first, _), (again, moved), (other, _) = drawn(1, 0), drawn(1, 7), drawn(2, 0)
    assert same(first, again)
    assert not moved.any()
    assert not same(first, other)


@pytest.mark.parametrize("targets", TARGETS)
def test_m_n_is_a_plain_model_with_the_outputs_of_the_adapted_one(folder, tmp_path, targets):
    lora = LoRA(r=4, alpha=6, dropout=0.3, target_modules=targets)
    wrapped = trained(folder, lora)
    before = copied(wrapped)
    gathered = gather_weights(wrapped, folder, lora)
    write_model(gathered, folder, tmp_path / "model", MANUAL)
    assert same(copied(wrapped), before)

    m_0, m_n = weights(folder), weights(tmp_path / "model")
    assert {name: t.shape for name, t in m_n.items()} == {name: t.shape for name, t in m_0.items()}
    for name in m_0:
        assert torch.equal(m_n[name], m_0[name]) != name.endswith(TARGETS[targets]), name
    layer = "model.layers.1.mlp.down_proj"
    b, a = (before[f"model.{layer}.lora_{matrix}.default.weight"] for matrix in "BA")
    torch.testing.assert_close(m_n[f"{layer}.weight"], m_0[f"{layer}.weight"] + 6 / 4 * b @ a)

    plain, adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), logits(wrapped.model)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == ("lm_head.weight" not in m_0)
    assert (adapted - logits(load_model(folder))).norm() > 0.1 * adapted.norm()
    assert (logits(plain) - adapted).norm() < 1e-5 * adapted.norm()
    expected = adapted[0, :-1].log_softmax(-1)[range(len(SEQUENCE) - 1), SEQUENCE[1:]]
    assert log_probabilities(gathered, folder, [SEQUENCE])[0] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_new_base_model_has_new_adapters(folder):
    lora = LoRA()
    wrapped = trained(folder, lora)
    load_weights(wrapped, folder, lora)
    assert torch.equal(logits(wrapped.model), logits(load_model(folder)))
    torch.manual_seed(0)
    assert same(wrapped.model.state_dict(), load_model(folder, lora).state_dict())


# ---------------------------------------------------------------- under a real Trainer


class Steps(Callback):
    """Writes whole weights and one process' gradients of each step to ``default_root_dir``."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named = dict(pl_module.named_parameters())
        step = {
            "weights": get_model_state_dict(trainer.strategy.model, options=whole),
            "gradients": {name: p.grad for name, p in named.items() if p.grad is not None},
            "optimised": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
            "wrapped": type(trainer.strategy.model).__name__,
            "iteration": getattr(trainer.datamodule, "iteration", None),
        }
        if trainer.is_global_zero:
            torch.save(step, Path(trainer.default_root_dir) / f"step-{trainer.global_step:02d}.pt")


def fit(folder: Path, root: Path, precision: str = "32-true", **model: object) -> CorrectionSFT:
    """One epoch of a few corrections on one device, recorded in ``root``."""
    module = CorrectionSFT(str(folder), learning_rate=1e-2, **model)
    (of_rank,) = batches(Dialogue(tiny_tokenizer("qwen2"), PROMPTS), (1, 1), 17)
    torch.manual_seed(0)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        callbacks=Steps(),
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(of_rank, batch_size=None))
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_only_adapters_train_and_in_float32(qwen, tmp_path, precision):
    module = fit(qwen, tmp_path, precision, lora=LoRA(r=2, target_modules=["v_proj"]))
    adapters = {name for name, parameter in module.named_parameters() if ".lora_" in name}
    assert len(adapters) == 4  # A and B of two layers
    steps = recorded(tmp_path)
    for step in steps:
        assert step["gradients"].keys() == adapters
        assert step["optimised"] == 2 * 2 * (64 + 32)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, steps[0]["weights"][name]) == (name not in adapters), name


@pytest.mark.parametrize("lora", [None, LoRA()])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(qwen, tmp_path, lora):
    kept = {}
    for checkpointing in (False, True):
        sizes = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        (root := tmp_path / str(checkpointing)).mkdir()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fit(qwen, root, lora=lora, gradient_checkpointing=checkpointing)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]
    for found, expected in zip(recorded(tmp_path / "True"), recorded(tmp_path / "False"), strict=True):
        assert distance(found["gradients"], expected["gradients"]) < 1e-6


# ---------------------------------------------------------------- whole runs, on one process and on two

LAYERS = "[transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer]"
FSDP = (
    *("--trainer.devices", 2, "--trainer.strategy.class_path", "cpu_fsdp.CPUFSDPStrategy"),
    *("--trainer.strategy.init_args.auto_wrap_policy", LAYERS),
    *("--trainer.strategy.init_args.activation_checkpointing_policy", LAYERS),
)


@pytest.fixture(scope="module")
def demo_run(stasc, tmp_path_factory):
    """Runs the demo with few questions and adapters, started once for each number of iterations."""

    def run(variant: str, *options: object, iterations: Sequence[int] = (2,)) -> Path:
        run = tmp_path_factory.mktemp("run")
        for n in iterations:
            done = stasc(
                *demo_fit(run, train=40, test=2, iterations=n),
                *("--algorithm.variant", variant, "--data.batches.size", 4, *options),
                *("--model.lora.r", 4, "--model.learning_rate", 0.01),
                *("--trainer.callbacks+=test_lora.Steps", "--trainer.default_root_dir", run),
            )
            assert done.returncode == 0, done.stderr
        return run

    return run


@pytest.fixture(scope="module")
def evolving(demo_run) -> Path:
    return demo_run("EIE")


@pytest.fixture(scope="module")
def fixed(demo_run) -> Path:
    return demo_run("EIF", "--model.gradient_checkpointing", "true")


@pytest.fixture(scope="module")
def resumed_fsdp(demo_run) -> Path:
    return demo_run("EIE", *FSDP, iterations=(1, 2))


@pytest.fixture(scope="module")
def m_0(evolving, cache) -> Path:
    (folder,) = (path for path in cache.glob("demo-*") if path.is_dir())
    return folder


def m(run: Path, n: int) -> Path:
    return run / f"iteration-{n:02d}/model"


def first_step(run: Path, n: int) -> dict:
    """What was recorded before the first step of an iteration."""
    return next(step for step in recorded(run) if step["iteration"] == n)


def adapters(step: dict, matrix: str) -> Tensors:
    return {name: tensor for name, tensor in step["weights"].items() if f".lora_{matrix}." in name}


@pytest.mark.slow
def test_every_m_n_is_m_0_but_for_the_layers_with_adapters(evolving, fixed, resumed_fsdp, m_0):
    for run, n in itertools.product((evolving, fixed, resumed_fsdp), (1, 2)):
        before, after = weights(m_0), weights(m(run, n))
        assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
        for name in before:
            assert torch.equal(after[name], before[name]) != name.endswith("_proj.weight"), name


@pytest.mark.slow
def test_evolving_keeps_its_adapters_and_fixed_draws_new_ones(evolving, fixed, resumed_fsdp, m_0):
    for run in (evolving, fixed, resumed_fsdp):
        assert not any(b.any() for b in adapters(first_step(run, 1), "B").values())
    assert same(adapters(first_step(fixed, 1), "A"), adapters(first_step(evolving, 1), "A"))
    assert not any(b.any() for b in adapters(first_step(fixed, 2), "B").values())
    for run in (evolving, resumed_fsdp):
        state = {name.removeprefix("model."): t for name, t in first_step(run, 2)["weights"].items()}
        merged = LoRA(r=4).merge(state, empty_model(m_0))
        assert all(torch.equal(merged[name], tensor) for name, tensor in weights(m(run, 1)).items())


@pytest.mark.slow
def test_two_processes_that_were_interrupted_learn_what_one_does(evolving, resumed_fsdp, m_0):
    assert first_step(resumed_fsdp, 1)["wrapped"] == "FullyShardedDataParallel"
    assert same(first_step(resumed_fsdp, 1)["weights"], first_step(evolving, 1)["weights"])
    before, one, two = weights(m_0), weights(m(evolving, 2)), weights(m(resumed_fsdp, 2))
    change = {name: one[name] - before[name] for name in one}
    assert distance(two, one, scale=change) < 1e-3


@pytest.mark.slow
def test_a_resume_ends_with_the_same_bytes(demo_run, evolving):
    assert contents(demo_run("EIE", iterations=(1, 2))) == contents(evolving)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("option", "value"), [("r", 0), ("alpha", 0), ("dropout", 1.0), ("target_modules", [])]
)
def test_impossible_values_are_refused(option, value):
    with pytest.raises(UserError, match=f"^model.lora.{option} is "):
        LoRA(**{option: value})


@pytest.mark.parametrize("name", ["query", "lm_head", "embed_tokens", "self_attn"])
def test_layers_that_cannot_have_adapters_are_refused(folder, name):
    module = CorrectionSFT(str(folder), lora=LoRA(target_modules=["o_proj", name]))
    with pytest.raises(UserError, match=f"names '{name}', and the model's linear layers are: .*o_proj"):
        module.check(SingleDeviceStrategy())


@pytest.mark.parametrize(
    ("model", "strategy", "sentence"),
    [
        ({"gradient_checkpointing": True}, {}, "activation_checkpointing_policy"),
        ({"lora": LoRA()}, {"use_orig_params": False}, "use_orig_params"),
    ],
)
def test_what_fsdp_does_another_way_is_refused(qwen, model, strategy, sentence):
    module = CorrectionSFT(str(qwen), **model)
    module.check(SingleDeviceStrategy())
    with pytest.raises(UserError, match=sentence):
        module.check(FSDPStrategy(**strategy))


def test_the_program_refuses_them_before_it_writes_anything(refused):
    for options, sentence in (
        (("--model.lora.r", 0), "stasc: model.lora.r is 0: it must be 1 or more."),
        (("--model.lora.target_modules", "[query]"), "stasc: model.lora.target_modules names 'query'"),
        ((*FSDP, "--model.gradient_checkpointing", "true"), "stasc: model.gradient_checkpointing is not for"),
    ):
        assert refused(*options).startswith(sentence)
