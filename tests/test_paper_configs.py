"""The paper's two configurations: its numbers, and whole runs of the very files on tiny models and vLLM.

Only what a small machine lacks is overridden: model and data paths, devices, accelerator and strategy; and
the number of iterations and the memory of the engine's cache, so that it ends soon.
"""

import json
import math
import random
import re
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, curves, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks.curves import tag
from stasc.prompting import Dialogue, Message, Prompts
from stasc.training.batches import TokenizedExample, pack
from stasc.training.loss import NegativeLogLikelihood
from stasc.trajectory import Records

pytestmark = pytest.mark.slow

NATURAL_QUESTIONS = ROOT.parent / "shared/data/nq"
OWN_QUESTIONS = [
    ("what is the capital of portugal", ["Lisbon"]),
    ("who wrote the play hamlet", ["William Shakespeare", "Shakespeare"]),
    ("which planet is closest to the sun", ["Mercury"]),
    ("how many sides does a hexagon have", ["six", "6"]),
    ("what metal is liquid at room temperature", ["mercury", "quicksilver"]),
    ("who painted the mona lisa", ["Leonardo da Vinci"]),
    ("what is the longest river in south america", ["Amazon"]),
    ("in what year did the second world war end", ["1945"]),
    ("what gas do plants take in from the air", ["carbon dioxide", "CO2"]),
    ("who discovered penicillin", ["Alexander Fleming"]),
    ("what language is spoken in brazil", ["Portuguese"]),
    ("which ocean lies between africa and australia", ["Indian Ocean"]),
]
SIZES = {"train": 12, "test": 8}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """A folder with train.jsonl and test.jsonl in the layout of the paper's data."""
    folder = tmp_path_factory.mktemp("questions")
    own = [
        json.dumps({"question_id": f"own_{i}", "question_text": text, "reference": references})
        for i, (text, references) in enumerate(OWN_QUESTIONS)
    ]
    for split, size in SIZES.items():
        real = NATURAL_QUESTIONS / f"{split}.jsonl"
        lines = real.read_text().splitlines() if real.is_file() else own
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:size]) + "\n")
    return folder


def paper_prompts() -> Prompts:
    raw = yaml.safe_load((ROOT / "configs/prompts/paper.yaml").read_text())
    return {name: [Message(**message) for message in raw[name]] for name in raw}


def parrot(folder: Path, kind: str, questions: Path) -> Path:
    """A bfloat16 model that answers every prompt with a random choice of the training references.

    So any answer is right now and then, and some corrections improve. What never varies in the prompts is
    one token, as are the references, which makes the paper's long prompts cheap.
    """
    prompts = paper_prompts()
    contents = [message.content for message in (*prompts["initial"], *prompts["correction"])]
    constant = [phrase for content in contents for phrase in re.split(r"{\w+}", content) if phrase]
    rows = [json.loads(line) for line in (questions / "train.jsonl").read_text().splitlines()]
    references = [f" {row['reference'][0]}" for row in rows]
    phrases = list(dict.fromkeys([*constant, "Final Answer:", *references]))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(folder, kind, phrases=phrases)).train()
    dialogue = Dialogue(AutoTokenizer.from_pretrained(folder), prompts)
    rng = random.Random(0)

    def answer() -> str:
        return "Final Answer:" + "".join(r for r in references if rng.random() < 0.4)

    def example() -> TokenizedExample:
        text = rng.choice(rows)["question_text"]
        values = [{"question": text, "initial_answer": answer()}]
        (prompt,) = rng.choice([dialogue.render(name, values) for name in ("initial", "correction")])
        return TokenizedExample(prompt, [*dialogue.tokenizer.encode(answer()), dialogue.end_of_turn])

    loss = NegativeLogLikelihood(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        examples = [example() for _ in range(8)]
        tokens = sum(len(example.target) for example in examples)
        (loss(pack(examples, tokens, ends_step=True)) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- the numbers

CONFIGS = {
    "qwen_eif": ("EIF", 5, "Qwen/Qwen2.5-1.5B-Instruct"),
    "phi3_eie": ("EIE", 1, "microsoft/Phi-3-mini-4k-instruct"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_holds_the_papers_numbers(stasc, name):
    printed = stasc("fit", "--config", f"configs/{name}.yaml", "--print_config")
    assert printed.returncode == 0, printed.stderr
    config = yaml.safe_load(printed.stdout)
    variant, n_init, base = CONFIGS[name]
    assert config["algorithm"]["class_path"] == "stasc.algorithm.STaSC"
    assert config["algorithm"]["init_args"] == {
        "variant": variant,
        "pair_all": False,
        "only_equal": False,
        "fixed_in_test": False,
        "iterations": 10,
        "n_init": n_init,
        "n_corr": 5,
        "epochs": 1,
        "threshold": 1.0,
        "rounds": 1,
    }
    model = {"base": base, "learning_rate": 7e-6, "weight_decay": 0.1, "warmup_ratio": 0.03}
    assert config["model"] == config["model"] | model
    assert config["model"]["lora"] is None
    data, trainer = config["data"], config["trainer"]
    assert (
        data["sampling"]
        == data["evaluation"]["sampling"]
        == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 256}
    )
    assert data["reward"] == {"class_path": "stasc.reward.InAccuracy"}
    assert (data["batches"]["size"], data["evaluation"]["samples"], data["training_prompts"]) == (8, 1, None)
    assert trainer["accumulate_grad_batches"] == 1
    assert (trainer["accelerator"], trainer["devices"], trainer["precision"]) == ("gpu", 2, "bf16-mixed")
    assert (trainer["gradient_clip_val"], trainer["gradient_clip_algorithm"]) == (1.0, None)
    assert trainer["strategy"]["class_path"] == "lightning.pytorch.strategies.FSDPStrategy"
    assert config["sampler"]["class_path"] == "stasc.sampling.VLLMSampler"


# ---------------------------------------------------------------- the runs

ON_CPU = {
    "qwen_eif": (
        "qwen2",
        5,
        ["--trainer.devices", 2, "--trainer.strategy.class_path", "cpu_fsdp.CPUFSDPStrategy"],
    ),
    "phi3_eie": ("phi3", 1, ["--trainer.devices", 1, "--trainer.strategy", "auto"]),
}


@pytest.mark.parametrize("name", ON_CPU)
def test_the_configuration_runs_end_to_end(stasc, questions, tmp_path, name):
    kind, n_init, devices = ON_CPU[name]
    m0, run = parrot(tmp_path / "M_0", kind, questions), tmp_path / "run"
    paths = [f"--data.{split}.init_args.path={questions / split}.jsonl" for split in SIZES]
    done = stasc(
        *("fit", "--config", f"configs/{name}.yaml", "--run_dir", run, "--model.base", m0, *paths),
        *("--trainer.accelerator", "cpu", *devices),
        *("--algorithm.iterations", 2, "--sampler.init_args.kv_cache_gib", 0.2),
    )
    assert done.returncode == 0, done.stderr
    assert (run / "config.yaml").is_file()
    for n in (0, 1, 2):
        folder = run / f"iteration-{n:02d}"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["iteration"], metrics["test"]["count"]) == (n, SIZES["test"])
        assert len(Records(folder / "test.jsonl")) == SIZES["test"]
        if n > 0:
            check_rollout(folder, n_init)
            check_model(folder / "model", m0)
    found = curves(run)
    assert [step for step, _ in found[tag("test/r2")]] == [0, 1, 2]
    assert [step for step, _ in found[tag("dataset/size")]] == [1, 2]
    assert all(math.isfinite(loss) for _, loss in found[tag("step/loss")])


def test_the_configuration_runs_as_it_was_released(stasc, questions, tmp_path):
    m0, run = parrot(tmp_path / "M_0", "qwen2", questions), tmp_path / "run"
    paths = [f"--data.{split}.init_args.path={questions / split}.jsonl" for split in SIZES]
    done = stasc(
        *("fit", "--config", "configs/qwen_eif.yaml", "--config", "configs/reference/as_released.yaml"),
        *("--run_dir", run, "--model.base", m0, *paths, "--algorithm.variant", "FNF"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.strategy", "auto"),
        *("--algorithm.iterations", 1, "--sampler.init_args.kv_cache_gib", 0.2),
    )
    assert done.returncode == 0, done.stderr
    folder, kept = run / "iteration-01", Counter()
    draws = list(Records(folder / "trajectories.jsonl"))
    answers = {(t.question.id, t.path[0]): t for t in draws}.values()
    for first, second in product(answers, draws):
        if first.question == second.question and first.reward(1) == second.reward(2) == 1:
            kept[first.question.id, first.after(1).text, second.after(2).token_ids] += 1
    dataset = [example.trajectory for example in Records(folder / "dataset.jsonl")]
    assert Counter((t.question.id, t.after(1).text, t.after(2).token_ids) for t in dataset) == kept
    assert any(t.reward(1) < t.reward(2) for t in draws)  # of which none is kept
    by_m0, by_m1 = (Records(run / f"iteration-0{n}/test.jsonl") for n in (0, 1))
    assert [t.upto(1) for t in by_m0] == [t.upto(1) for t in by_m1]
    check_model(folder / "model", m0)


def check_rollout(folder: Path, n_init: int) -> None:
    """All files of an iteration's steps 1 to 3."""
    trajectories = list(Records(folder / "trajectories.jsonl"))
    assert len(Records(folder / "initial.jsonl")) == SIZES["train"] * n_init
    assert len(trajectories) == SIZES["train"] * n_init * 5
    kept = [t.learn() for t in trajectories if t.reward(2) > t.reward(1)]
    assert kept
    assert list(Records(folder / "dataset.jsonl")) == kept
    draws = defaultdict(set)
    for t in trajectories:
        assert t.after(2).finished
        draws[t.question.id, t.path[0]].add(t.after(2).token_ids)
    assert len(draws) == SIZES["train"] * n_init
    assert all(len(different) > 1 for different in draws.values())


def check_model(folder: Path, m0: Path) -> None:
    """M_n goes wherever M_0 went, and has learnt something."""
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    beside = {"README.md", "stasc.yaml"}  # the card, and how M_n is asked
    assert {path.name for path in folder.iterdir()} == {path.name for path in m0.iterdir()} | beside
    for path in m0.iterdir():
        if path.suffix != ".safetensors":
            assert (folder / path.name).read_bytes() == path.read_bytes()
    found, before = (load_file(path / "model.safetensors") for path in (folder, m0))
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    assert any(not torch.equal(found[name], before[name]) for name in found)
