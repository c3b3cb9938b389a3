"""Fine-tuning: the schedule, what a step is made of, its gradient, and the same M_n on any devices."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, curves, demo_fit, tiny_model, tiny_tokenizer
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from data import demo
from stasc.likelihood import NegativeLogLikelihood
from stasc.module import CorrectionSFT, CosineWithWarmup
from stasc.packing import CorrectionBatches, Example
from stasc.pretrained import load_tokenizer
from stasc.prompting import Dialogue, Message, Prompts
from stasc.trajectory import Completion, Question, Trajectory, read_records

PROMPTS = Prompts([Message("user", "{question}")], [Message("user", "{question} {initial_answer}")])
Tensors = dict[str, Tensor]


class Recorder(Callback):
    """Writes weights, gradients before clipping, and more of each step to ``default_root_dir``."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        wrapped = trainer.strategy.model
        whole = nullcontext()
        if isinstance(wrapped, FullyShardedDataParallel):
            whole = FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True, writeback=False)
        with whole:
            named = {_plain(name): parameter for name, parameter in pl_module.named_parameters()}
            step = {
                "weights": {name: parameter.detach().clone() for name, parameter in named.items()},
                "gradients": {name: parameter.grad.clone() for name, parameter in named.items()},
                "buffers": {_plain(name): buffer.clone() for name, buffer in pl_module.named_buffers()},
                "states": len(optimizer.state),
                "processes": (type(wrapped).__name__, trainer.world_size),
            }
        if trainer.is_global_zero:
            torch.save(step, Path(trainer.default_root_dir) / f"step-{trainer.global_step:02d}.pt")


def _plain(name: str) -> str:
    for wrapper in ("_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("model.")


def recorded(folder: Path) -> list[dict]:
    return [torch.load(path) for path in sorted(folder.glob("step-*.pt"))]


def distance(found: Tensors, expected: Tensors, scale: Tensors | None = None) -> float:
    """Norm of the difference, relative to that of ``scale``; a tied lm_head counts once."""
    assert found.keys() == expected.keys()
    difference = math.sqrt(sum(float((found[name] - expected[name]).double().norm() ** 2) for name in found))
    return difference / math.sqrt(sum(float(t.double().norm() ** 2) for t in (scale or expected).values()))


def mean_loss(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """Mean over all correction tokens, one example after another, without padding."""
    losses = []
    for prompt, target in examples:
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(-logits.log_softmax(-1)[range(len(target)), target])
    return torch.cat(losses).mean()


def gradients(model: PreTrainedModel, examples: list[Example]) -> Tensors:
    model.zero_grad()
    mean_loss(model, examples).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------- the schedule


def test_the_schedule_warms_up_to_1_and_ends_near_0():
    schedule = CosineWithWarmup(100, 0.03)
    factors = [schedule(step) for step in range(100)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert schedule(100) == 0
    assert factors[51] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 1.0])
def test_even_a_single_step_learns(warmup_ratio):
    assert CosineWithWarmup(1, warmup_ratio)(0) >= 0.5


# ---------------------------------------------------------------- the steps of an epoch

KINDS = {
    "trees": {},
    "rows": {"prefix_sharing": False},
    "cut": {"token_budget": 130},
    "cut-rows": {"token_budget": 130, "prefix_sharing": False},
}
"""Prefix trees, padded rows, and both with more micro-batches where memory asks for them."""
PLACES = [(ranks, accumulate) for ranks in (1, 2) for accumulate in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    # Weights so small that the rounding of float32 stays small in gradients.
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", initializer_range=0.03)


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    return Dialogue(tiny_tokenizer("qwen2"), PROMPTS)


def dataset(dialogue: Dialogue, size: int) -> list[Trajectory]:
    """Corrections of very different lengths, some of them cut."""

    def said(text: str, finished: bool = True) -> Completion:
        return Completion(text, tuple(dialogue.tokenizer.encode(text)), finished)

    return [
        Trajectory(
            Question(f"{i}", f"{i}?", ()), 0, 0, said("?" * i), said(f"{i}" * (1 + i % 5), i % 3 > 0), 0, 1
        )
        for i in range(size)
    ]


def batches(
    dialogue: Dialogue, places: tuple[int, int], size: int, seed: int = 0, **options: object
) -> list[CorrectionBatches]:
    """One for each rank, in steps of 8."""
    ranks, accumulate = places
    shared = {"seed": seed, "ranks": ranks, "accumulate": accumulate, **options}
    return [
        CorrectionBatches(dataset(dialogue, size), dialogue.training_example, 8, rank=rank, **shared)
        for rank in range(ranks)
    ]


def targets_of_steps(of_ranks: list[CorrectionBatches]) -> list[Counter[int]]:
    """The tokens that each step learns, all ranks together."""
    steps = [Counter()]
    for of_all_ranks in zip(*of_ranks, strict=True):
        for batch in of_all_ranks:
            for token, count in zip(batch.targets.tolist(), batch.counts.tolist(), strict=True):
                steps[-1][token] += count
        (ends,) = {batch.ends_step for batch in of_all_ranks}
        if ends:
            steps.append(Counter())
    assert not steps.pop()
    return steps


@pytest.mark.parametrize("size", [1, 16, 17])
@pytest.mark.parametrize("places", PLACES)
def test_every_correction_is_learnt_once_in_an_epoch(dialogue, places, size):
    for sharing in (True, False):
        of_ranks = batches(dialogue, places, size, prefix_sharing=sharing)
        assert {len(of_rank) for of_rank in of_ranks} == {math.ceil(size / 8) * places[1]}
        steps = targets_of_steps(of_ranks)
        assert len(steps) == math.ceil(size / 8)
        learnt = [token for t in dataset(dialogue, size) for token in dialogue.training_example(t)[1]]
        assert sum(steps, Counter()) == Counter(learnt)
        assert steps == targets_of_steps(batches(dialogue, (1, 1), size))


def test_the_order_follows_from_the_seed_alone(dialogue):
    first = targets_of_steps(batches(dialogue, (1, 1), 17, seed=1))
    torch.rand(3)
    assert targets_of_steps(batches(dialogue, (1, 1), 17, seed=1)) == first
    assert targets_of_steps(batches(dialogue, (1, 1), 17, seed=2)) != first


def examples_of_steps(dialogue: Dialogue, size: int) -> list[list[Example]]:
    (whole,) = batches(dialogue, (1, 1), size)
    return [whole.examples(step) for step in range(whole.steps)]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("places", PLACES)
def test_the_places_add_up_to_the_gradient_of_the_mean(folder, dialogue, places, options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    likelihood = NegativeLogLikelihood(model)
    steps = iter(examples_of_steps(dialogue, 17))
    model.zero_grad()
    for of_all_ranks in zip(*batches(dialogue, places, 17, **options), strict=True):
        for batch in of_all_ranks:
            (likelihood(batch) / batch.step_tokens).backward()
        if batch.ends_step:
            found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            assert distance(found, gradients(model, next(steps))) < 1e-6
            model.zero_grad()
    assert next(steps, None) is None


# ---------------------------------------------------------------- under a real Trainer


def fit(
    folder: Path,
    dialogue: Dialogue,
    root: Path,
    learning_rate: float,
    options: dict[str, object] | None = None,
    **arguments: object,
) -> CorrectionSFT:
    """Train in steps of 8 on 17 corrections, which ``Recorder`` records in ``root``."""
    root.mkdir(exist_ok=True, parents=True)
    module = CorrectionSFT(str(folder), learning_rate=learning_rate)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=Recorder(),
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"devices": 1, **arguments},
    )
    places = trainer.world_size, trainer.accumulate_grad_batches
    of_rank = batches(dialogue, places, 17, **(options or {}))[trainer.global_rank]
    trainer.fit(module, DataLoader(of_rank, batch_size=None))
    assert trainer.global_step == of_rank.steps
    assert trainer.accumulate_grad_batches == places[1]
    return module


@pytest.mark.parametrize("strategy", ["one", "ddp", "fsdp"])
def test_the_optimiser_gets_the_gradient_of_the_mean(folder, dialogue, tmp_path, strategy):
    script = Path(__file__).parent / "fit_places.py"
    done = subprocess.run(
        [sys.executable, str(script), strategy, str(folder), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = examples_of_steps(dialogue, 17)
    for run in [f"{accumulate}-{kind}" for accumulate in (1, 2, 4) for kind in KINDS]:
        for step, examples in zip(recorded(tmp_path / run), expected, strict=True):
            model.load_state_dict(step["weights"], strict=False)
            assert distance(step["gradients"], gradients(model, examples)) < 1e-6


def test_bf16_mixed_keeps_float32_masters(folder, dialogue, tmp_path):
    module = fit(folder, dialogue, tmp_path, 7e-6, precision="bf16-mixed")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert moved(dict(module.model.named_parameters()), load_file(folder / "model.safetensors")) > 0.95


def moved(found: Tensors, before: Tensors) -> float:
    """Share of the weights that are others than before."""
    changed = sum(int((found[name] != before[name]).sum()) for name in before)
    return changed / sum(tensor.numel() for tensor in before.values())


# ---------------------------------------------------------------- whole runs, on one process and on two

LAYERS = "[transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer]"
STRATEGIES = {
    "one": ("--trainer.devices", 1),
    "ddp": ("--trainer.devices", 2, "--trainer.strategy", "ddp"),
    "fsdp": (
        *("--trainer.devices", 2, "--trainer.strategy.class_path", "cpu_fsdp.CPUFSDPStrategy"),
        *("--trainer.strategy.init_args.auto_wrap_policy", LAYERS),
        *("--trainer.strategy.init_args.activation_checkpointing_policy", LAYERS),
    ),
}


@pytest.fixture(scope="module")
def demo_run(stasc, tmp_path_factory):
    """Runs the demo with few questions and records its steps."""

    def run(strategy: str, *options: object, iterations: int = 2) -> Path:
        folder = tmp_path_factory.mktemp(strategy)
        done = stasc(
            *demo_fit(folder, train=40, test=2, iterations=iterations),
            *("--algorithm.epochs", 2, "--data.batch_size", 5, *STRATEGIES[strategy], *options),
            *("--trainer.gradient_clip_val", 0.5),  # less than most gradients
            *("--trainer.callbacks+=test_training.Recorder", "--trainer.default_root_dir", folder),
        )
        assert done.returncode == 0, done.stderr
        return folder

    return run


@pytest.fixture(scope="module")
def evolving(demo_run) -> Path:
    """EIE on one process."""
    return demo_run("one", "--algorithm.variant", "EIE")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def fixed(demo_run, request) -> Path:
    """EIF on two processes, each of which takes two micro-batches for a step, or three for memory."""
    options = ("--trainer.accumulate_grad_batches", 2, "--data.token_budget", 64)
    return demo_run(request.param, "--algorithm.variant", "EIF", *options)


@pytest.fixture(scope="module")
def m0(evolving, cache) -> Path:
    (folder,) = (path for path in cache.glob("demo-*") if path.is_dir())
    return folder


def weights(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


def box(run: Path, n: int) -> Path:
    return run / f"iteration-{n:02d}"


def steps_of(run: Path, n: int) -> list[dict]:
    """The recorded steps of an iteration."""
    counts = [json.loads((box(run, i) / "training.json").read_text())["training"]["steps"] for i in (1, 2)]
    steps = recorded(run)
    assert len(steps) == sum(counts)
    return steps[: counts[0]] if n == 1 else steps[counts[0] :]


def test_two_processes_learn_what_one_does(evolving, fixed, m0):
    for name in ("initial.jsonl", "trajectories.jsonl", "dataset.jsonl"):
        assert (box(evolving, 1) / name).read_bytes() == (box(fixed, 1) / name).read_bytes()
    ones, twos = steps_of(evolving, 1), steps_of(fixed, 1)
    assert ones[0]["processes"] == ("CorrectionSFT", 1)
    assert twos[0]["processes"] in [("DistributedDataParallel", 2), ("FullyShardedDataParallel", 2)]
    assert len(ones) == 6  # |D_1| is 12: steps of 5, 5 and 2 corrections, twice
    for one, two in zip(ones, twos, strict=True):
        assert distance(two["gradients"], one["gradients"]) < 1e-5
    before, after, again = (
        weights(path) for path in (m0, box(evolving, 1) / "model", box(fixed, 1) / "model")
    )
    way = {name: after[name] - before[name] for name in before}
    assert distance(again, after, scale=way) < 1e-4
    assert max(float((again[name] - after[name]).abs().max()) for name in before) < 1e-5


# ---------------------------------------------------------------- what could go wrong without a word


def test_evolving_finetuning_goes_on_and_fixed_begins_again(evolving, fixed, m0):
    for run, second_base in ((evolving, box(evolving, 1) / "model"), (fixed, m0)):
        for n, base in ((1, m0), (2, second_base)):
            first = steps_of(run, n)[0]
            assert distance(first["weights"], weights(base)) == 0
            assert first["states"] == 0
            assert moved(weights(box(run, n) / "model"), weights(base)) > 0.95


def test_every_iteration_has_the_whole_schedule(evolving, fixed):
    for run in (evolving, fixed):
        expected = []
        for n in (1, 2):
            steps = len(steps_of(run, n))
            expected += [2.5e-4 * CosineWithWarmup(steps, 0.03)(step) for step in range(steps)]
        found = curves(run)
        assert [rate for _, rate in found["step/learning_rate"]] == pytest.approx(expected)
        losses = [loss for _, loss in found["step/loss"]]
        assert len(losses) == len(expected)
        assert all(map(math.isfinite, losses))


def test_the_corrections_become_likelier(evolving, m0):
    dialogue = Dialogue(load_tokenizer(m0), demo.PROMPTS)
    examples = [dialogue.training_example(t) for t in read_records(box(evolving, 1) / "dataset.jsonl")]
    with torch.inference_mode():
        before, after = (
            float(mean_loss(AutoModelForCausalLM.from_pretrained(path), examples))
            for path in (m0, box(evolving, 1) / "model")
        )
    assert after < 0.9 * before


def test_fsdp_in_bf16_mixed_keeps_float32_masters_and_rotary_frequencies(demo_run, evolving, m0):
    options = ("--trainer.precision", "bf16-mixed", "--model.learning_rate", 7e-6)
    run = demo_run("fsdp", *options, iterations=1)
    first = recorded(run)[0]
    assert distance(first["weights"], weights(m0)) == 0
    assert moved(weights(box(run, 1) / "model"), weights(m0)) > 0.95
    assert distance(first["buffers"], recorded(evolving)[0]["buffers"]) == 0
