"""Fine-tuning in whole runs of the demo, on one process and on two."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents, curves, demo_fit, stasc_environment
from safetensors.torch import load_file
from test_training import Tensors, distance, moved, recorded, step_loss
from transformers import AutoModelForCausalLM

from callbacks.curves import tag
from data import demo
from stasc.model_folder import ModelFolder
from stasc.prompting import Dialogue
from stasc.training.batches import TokenizedExample
from stasc.training.module import CosineWithWarmup
from stasc.trajectory import Records

pytestmark = pytest.mark.slow

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
            *("--algorithm.epochs", 2, "--data.batches.size", 5, *STRATEGIES[strategy], *options),
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
    options = ("--trainer.accumulate_grad_batches", 2, "--data.batches.token_budget", 64)
    return demo_run(request.param, "--algorithm.variant", "EIF", *options)


@pytest.fixture(scope="module")
def m0(evolving, cache) -> Path:
    (folder,) = (path for path in cache.glob("demo-*") if path.is_dir())
    return folder


def weights(model: Path) -> Tensors:
    return load_file(model / "model.safetensors")


def iteration(run: Path, n: int) -> Path:
    return run / f"iteration-{n:02d}"


def steps_of(run: Path, n: int) -> list[dict]:
    """The recorded steps of an iteration."""
    counts = [
        json.loads((iteration(run, i) / "training.json").read_text())["training"]["steps"] for i in (1, 2)
    ]
    steps = recorded(run)
    assert len(steps) == sum(counts)
    return steps[: counts[0]] if n == 1 else steps[counts[0] :]


def test_two_processes_learn_what_one_does(evolving, fixed, m0):
    for name in ("initial.jsonl", "trajectories.jsonl", "dataset.jsonl"):
        assert (iteration(evolving, 1) / name).read_bytes() == (iteration(fixed, 1) / name).read_bytes()
    ones, twos = steps_of(evolving, 1), steps_of(fixed, 1)
    assert ones[0]["processes"] == ("CorrectionSFT", 1)
    assert twos[0]["processes"] in [("DistributedDataParallel", 2), ("FullyShardedDataParallel", 2)]
    assert len(ones) == 6  # |D_1| is 12: steps of 5, 5 and 2 corrections, twice
    for one, two in zip(ones, twos, strict=True):
        assert distance(two["gradients"], one["gradients"]) < 1e-5
    before, after, again = (
        weights(path) for path in (m0, iteration(evolving, 1) / "model", iteration(fixed, 1) / "model")
    )
    change = {name: after[name] - before[name] for name in before}
    assert distance(again, after, scale=change) < 1e-4
    assert max(float((again[name] - after[name]).abs().max()) for name in before) < 1e-5


def test_evolving_continues_from_the_last_model_and_fixed_from_m_0(evolving, fixed, m0):
    for run, second_base in ((evolving, iteration(evolving, 1) / "model"), (fixed, m0)):
        for n, base in ((1, m0), (2, second_base)):
            first = steps_of(run, n)[0]
            assert distance(first["weights"], weights(base)) == 0
            assert first["states"] == 0
            assert moved(weights(iteration(run, n) / "model"), weights(base)) > 0.95


def test_sigterm_does_nothing_but_end_a_process(evolving, fixed):
    """Lightning's handler would begin to talk to the other ranks, in the midst of what they do."""
    for run in (evolving, fixed):
        assert {step["on_sigterm"] for step in recorded(run)} == {"stasc.ending"}


def test_every_iteration_has_the_whole_schedule(evolving, fixed):
    for run in (evolving, fixed):
        expected = []
        for n in (1, 2):
            steps = len(steps_of(run, n))
            expected += [2.5e-4 * CosineWithWarmup(steps, 0.03)(step) for step in range(steps)]
        found = curves(run)
        assert [rate for _, rate in found[tag("step/learning_rate")]] == pytest.approx(expected)
        losses = [loss for _, loss in found[tag("step/loss")]]
        assert len(losses) == len(expected)
        assert all(map(math.isfinite, losses))


def test_training_makes_the_corrections_more_likely(evolving, m0):
    dialogue = Dialogue(ModelFolder(m0).tokenizer(), demo.PROMPTS)
    records = Records(iteration(evolving, 1) / "dataset.jsonl")
    examples = [TokenizedExample(*dialogue.example(example)) for example in records]
    with torch.inference_mode():
        before, after = (
            float(step_loss(AutoModelForCausalLM.from_pretrained(path), examples))
            for path in (m0, iteration(evolving, 1) / "model")
        )
    assert after < 0.9 * before


def test_fsdp_in_bf16_mixed_keeps_float32_masters_and_rotary_frequencies(demo_run, evolving, m0):
    options = ("--trainer.precision", "bf16-mixed", "--model.learning_rate", 7e-6)
    run = demo_run("fsdp", *options, iterations=1)
    first = recorded(run)[0]
    assert distance(first["weights"], weights(m0)) == 0
    assert moved(weights(iteration(run, 1) / "model"), weights(m0)) > 0.95
    assert distance(first["buffers"], recorded(evolving)[0]["buffers"]) == 0


def test_fsdp_goes_on_with_the_same_bytes_where_a_process_was_killed_and_d_n_was_empty(
    stasc, cache, tmp_path
):
    """Killed with Adam's moments in the checkpoint; D_2 is empty, and twice it starts again after that."""

    def fit(name: str, *options: object) -> list[str]:
        run = tmp_path / name
        arguments = (*demo_fit(run, train=40, test=2, iterations=3), "--data.batches.size", 5)
        reward = ("--data.reward", "users_own.PaysNothingInIteration2", "--data.reward.run", run)
        arguments += ("--algorithm.epochs", 2, "--algorithm.variant", "EIE", *reward, *STRATEGIES["fsdp"])
        return list(map(str, (*arguments, *options)))

    def ending(name: str, hook: str, epochs_done: int, **options: int) -> tuple[str, str]:
        init_args = {"hook": hook, "epochs_done": epochs_done, **options}
        return "--trainer.callbacks", json.dumps(
            [{"class_path": f"users_own.{name}", "init_args": init_args}]
        )

    killed = stasc(*fit("stopped", *ending("Kill", "on_train_batch_end", 1, rank=1)))
    assert killed.returncode == 128 + 9
    sentence = (
        "process 2 of 2 was ended by SIGKILL (was memory full? lower data.batches.token_budget, or "
        "sampler.kv_cache_gib); run the same command again to go on."
    )
    assert killed.stderr == f"\nstasc: {sentence}\n"
    checkpoint = tmp_path / "stopped/checkpoints/last.ckpt"
    assert checkpoint.stat().st_size > 3 * 1_000_000  # weights, and both moments of Adam
    runs = [fit("stopped", *ending("Fail", "on_train_epoch_start", epochs)) for epochs in (3, 4)]
    runs += [fit("stopped"), fit("undisturbed")]
    several = subprocess.run(
        [sys.executable, ROOT / "tests/fit_again.py"],
        cwd=ROOT,
        env=stasc_environment(cache) | {"OMP_WAIT_POLICY": "PASSIVE", "RUNS": json.dumps(runs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert several.returncode == 0, several.stderr
    assert several.stdout.count("going on in") == 3
    assert checkpoint.stat().st_size < 10_000  # M_3 has its folder
    assert several.stderr.count("Fail._end of yours failed") == 4, several.stderr  # two times, both processes
    stopped, undisturbed = (contents(tmp_path / name) for name in ("stopped", "undisturbed"))
    for of_run in (stopped, undisturbed):  # whose cards name the option of the reward
        assert all(of_run.pop(f"iteration-0{n}/model/README.md") for n in (1, 2, 3))
    assert stopped == undisturbed
    trained = [
        json.loads((tmp_path / f"stopped/iteration-0{n}/training.json").read_text()) for n in (1, 2, 3)
    ]
    assert [bool(of_n["dataset"]["size"]) for of_n in trained] == [True, False, True]
