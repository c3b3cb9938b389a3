"""Fine-tuning: the schedule, the steps of an epoch, and their gradient on any number of processes."""

import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model, tiny_tokenizer
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from stasc.prompting import Dialogue, Message
from stasc.run import NEVER, START, TRAINING, first_use
from stasc.training.batches import CorrectionBatches, TokenizedExample
from stasc.training.loss import NegativeLogLikelihood
from stasc.training.module import CorrectionSFT, CosineWithWarmup
from stasc.trajectory import Answer, Example, Question, Trajectory

PROMPTS = {
    "initial": [Message("user", "{question}")],
    "correction": [Message("user", "{question} {initial_answer}")],
}
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
                "on_sigterm": signal.getsignal(signal.SIGTERM).__module__,
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


def step_loss(model: PreTrainedModel, examples: list[TokenizedExample]) -> Tensor:
    """Weighted loss over the number of target tokens, one example at a time, without padding."""
    losses = []
    for prompt, target, weight, _ in examples:
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(-weight * logits.log_softmax(-1)[range(len(target)), target])
    return torch.cat(losses).mean()


def gradients(model: PreTrainedModel, examples: list[TokenizedExample]) -> Tensors:
    model.zero_grad()
    step_loss(model, examples).backward()
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
    "weighted": {"token_budget": 130, "weights": (1.0, -0.5, 0.0, 2.0, 0.25)},
    "weighted-rows": {"prefix_sharing": False, "weights": (-1.0, 0.0, 3.0)},
}
"""Prefix trees, padded rows, both with a budget that asks for more micro-batches, and with weights."""
DIVISIONS = [(ranks, accumulate) for ranks in (1, 2) for accumulate in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    # Weights so small that the rounding of float32 stays small in gradients.
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", initializer_range=0.03)


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    return Dialogue(tiny_tokenizer("qwen2"), PROMPTS)


def dataset(dialogue: Dialogue, size: int, weights: Sequence[float] = (1.0,)) -> list[Example]:
    """Corrections of very different lengths, some of them cut at the token limit."""

    def answer(prompt: str, text: str, finished: bool, reward: float) -> Answer:
        return Answer(prompt, 0, text, tuple(dialogue.tokenizer.encode(text)), finished, reward)

    trajectories = [
        Trajectory(
            Question(f"{i}", f"{i}?"),
            (
                answer("initial", "?" * i, True, 0.0),
                answer("correction", f"{i}" * (1 + i % 5), i % 3 > 0, 1.0),
            ),
        )
        for i in range(size)
    ]
    return [t.learn(weight=weights[i % len(weights)]) for i, t in enumerate(trajectories)]


def batches(
    dialogue: Dialogue,
    division: tuple[int, int],
    size: int,
    seed: int = 0,
    weights: Sequence[float] = (1.0,),
    **options: object,
) -> list[CorrectionBatches]:
    """One for each rank, in steps of 8; ``division`` is the number of ranks and the accumulation."""
    ranks, accumulate = division
    shared = {"seed": seed, "ranks": ranks, "accumulate": accumulate, **options}
    return [
        CorrectionBatches(dataset(dialogue, size, weights), dialogue.example, 8, rank=rank, **shared)
        for rank in range(ranks)
    ]


def targets_of_steps(of_ranks: list[CorrectionBatches]) -> list[Counter[int]]:
    """The tokens that each step learns, all ranks together."""
    steps = [Counter()]
    for of_all_ranks in zip(*of_ranks, strict=True):
        for batch in of_all_ranks:
            for token, weight in zip(batch.targets.tolist(), batch.weights.tolist(), strict=True):
                steps[-1][token] += weight  # 1 for each example that learns it
        (ends,) = {batch.ends_step for batch in of_all_ranks}
        if ends:
            steps.append(Counter())
    assert not steps.pop()
    return steps


@pytest.mark.parametrize("size", [1, 16, 17])
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_correction_is_learnt_once_in_an_epoch(dialogue, division, size):
    for sharing in (True, False):
        of_ranks = batches(dialogue, division, size, prefix_sharing=sharing)
        assert {len(of_rank) for of_rank in of_ranks} == {math.ceil(size / 8) * division[1]}
        steps = targets_of_steps(of_ranks)
        assert len(steps) == math.ceil(size / 8)
        learnt = [token for example in dataset(dialogue, size) for token in dialogue.example(example)[1]]
        assert sum(steps, Counter()) == Counter(learnt)
        assert steps == targets_of_steps(batches(dialogue, (1, 1), size))


def test_the_order_follows_from_the_seed_alone(dialogue):
    first = targets_of_steps(batches(dialogue, (1, 1), 17, seed=1))
    torch.rand(3)
    assert targets_of_steps(batches(dialogue, (1, 1), 17, seed=1)) == first
    assert targets_of_steps(batches(dialogue, (1, 1), 17, seed=2)) != first


def examples_of_steps(dialogue: Dialogue, weights: Sequence[float] = (1.0,)) -> list[list[TokenizedExample]]:
    """The steps of an epoch of 17 examples."""
    (whole,) = batches(dialogue, (1, 1), 17, weights=weights)
    return [whole.examples(step) for step in range(whole.steps)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("division", DIVISIONS)
def test_the_gradient_of_a_step_does_not_depend_on_its_division(folder, dialogue, division, kind):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    loss = NegativeLogLikelihood(model)
    steps = iter(examples_of_steps(dialogue, KINDS[kind].get("weights", (1.0,))))
    model.zero_grad()
    for of_all_ranks in zip(*batches(dialogue, division, 17, **KINDS[kind]), strict=True):
        for batch in of_all_ranks:
            (loss(batch) / batch.step_tokens).backward()
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
    division = trainer.world_size, trainer.accumulate_grad_batches
    of_rank = batches(dialogue, division, 17, **(options or {}))[trainer.global_rank]
    trainer.fit(module, DataLoader(of_rank, batch_size=None))
    assert trainer.global_step == of_rank.steps
    assert trainer.accumulate_grad_batches == division[1]
    return module


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one", "ddp", "fsdp"])
def test_the_optimiser_gets_the_gradient_of_the_step(folder, dialogue, tmp_path, strategy):
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
    for kind, options in KINDS.items():
        expected = examples_of_steps(dialogue, options.get("weights", (1.0,)))
        for accumulate in (1, 2, 4):
            for step, examples in zip(recorded(tmp_path / f"{accumulate}-{kind}"), expected, strict=True):
                model.load_state_dict(step["weights"], strict=False)
                assert distance(step["gradients"], gradients(model, examples)) < 1e-6


@pytest.mark.parametrize("kind", ["trees", "weighted"])
def test_the_logged_loss_is_that_of_the_whole_step(folder, dialogue, tmp_path, kind):
    module = fit(folder, dialogue, tmp_path, 1e-3, KINDS[kind], accumulate_grad_batches=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses, tokens = [], []
    expected = examples_of_steps(dialogue, KINDS[kind].get("weights", (1.0,)))
    for step, examples in zip(recorded(tmp_path), expected, strict=True):
        model.load_state_dict(step["weights"], strict=False)
        with torch.no_grad():
            losses.append(float(step_loss(model, examples)))
        tokens.append(sum(len(example.target) for example in examples))
    assert float(module.trainer.callback_metrics["step/loss"]) == pytest.approx(losses[-1], rel=1e-4)
    mean = sum(loss * size for loss, size in zip(losses, tokens, strict=True)) / sum(tokens)
    assert float(module.epoch_loss.compute()) == pytest.approx(mean, rel=1e-4)


def test_bf16_mixed_keeps_float32_masters(folder, dialogue, tmp_path):
    module = fit(folder, dialogue, tmp_path, 7e-6, precision="bf16-mixed")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert moved(dict(module.model.named_parameters()), load_file(folder / "model.safetensors")) > 0.95


def moved(found: Tensors, before: Tensors) -> float:
    """Share of the weights that are others than before."""
    changed = sum(int((found[name] != before[name]).sum()) for name in before)
    return changed / sum(tensor.numel() for tensor in before.values())


# ---------------------------------------------------------------- evaluation, and where options matter


@pytest.mark.parametrize("loop", ["test", "validate"])
def test_metrics_are_logged_as_they_come(folder, tmp_path, loop):
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False)
    metrics = {"r1": 0.25, "r2": 0.5, "wrong_to_right": 3.0}
    loader = DataLoader([metrics], batch_size=None)
    assert getattr(trainer, loop)(CorrectionSFT(str(folder)), loader, verbose=False) == [metrics]


def test_options_matter_from_their_first_use(folder):
    module = CorrectionSFT(str(folder))
    for option in ("learning_rate", "weight_decay", "warmup_ratio", "lora", "lora.r", "lora.target_modules"):
        assert first_use(module.first_uses, option, 1, 2) is TRAINING
    for option in ("gradient_checkpointing", "attention"):
        assert first_use(module.first_uses, option, 1, 2) is NEVER
    for option in ("base", "an_option_of_a_subclass"):
        assert first_use(module.first_uses, option, 1, 2) is START
