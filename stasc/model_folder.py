"""Hugging Face model folders: found, read and loaded.

Sampling and training both read a model folder through this module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from stasc.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by their names."""

T = TypeVar("T")

_DTYPES = ("float32", "bfloat16", "float16")

_FILES_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a config.json, safetensors weights, and usually a tokenizer.

    Every call reads the files again; nothing is cached.
    """

    path: Path

    @classmethod
    def locate(cls, model: str, *, weights: bool = True) -> ModelFolder:
        """The folder of a model given as a path or as a hub id; the hub's is downloaded once.

        Args:
            model: The path or the id.
            weights: Whether the hub's weights are wanted, beside its config and tokenizer.

        Raises:
            UserError: There is no such folder or hub model.
        """
        folder = Path(model).expanduser()
        if (folder / "config.json").is_file():
            return cls(folder.resolve())
        if folder.is_dir():
            raise UserError(f"{folder} has no config.json: model.base must be a model folder or a hub id.")
        if model.startswith((".", "/", "~")):
            raise UserError(f"model.base {model} does not exist: it must be a model folder or a hub id.")
        wanted = [*_FILES_BESIDE_WEIGHTS, "stasc.yaml", "README.md", *(["*.safetensors"] if weights else [])]
        away = hub_is_away(HfApi().model_info, model)
        try:
            folder = snapshot_download(model, allow_patterns=wanted, local_files_only=away is not None)
        except Exception as error:  # the hub client raises a dozen unrelated types
            reason = away or str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"model.base '{model}' is not a folder here, and the Hugging Face hub did not give it "
                f"({reason})."
            ) from error
        return cls(Path(folder))

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            UserError: It is missing or damaged.
        """
        return self._json("config.json")

    @property
    def revision(self) -> str | None:
        """The hub's commit of which this is a snapshot; None for another folder."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    @property
    def dtype(self) -> str:
        """The dtype of the weights according to config.json, such as ``bfloat16``; float32 if it has none.

        Raises:
            UserError: It is none that a model can be trained in.
        """
        config = self.config
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        if dtype not in _DTYPES:
            raise UserError(
                f"{self.path / 'config.json'}: its dtype is {dtype}, and must be one of {', '.join(_DTYPES)}."
            )
        return dtype

    @property
    def context(self) -> int:
        """Tokens that the model can take.

        Raises:
            UserError: Its config does not say.
        """
        tokens = getattr(self.model_config(), "max_position_embeddings", None)
        if tokens is None:
            raise UserError(
                f"{self.path / 'config.json'} has no max_position_embeddings: add it, the number of tokens "
                "that the model can take."
            )
        if not isinstance(tokens, int) or tokens < 1:
            raise UserError(
                f"{self.path / 'config.json'}: max_position_embeddings is {tokens!r}, "
                "and must be a number of tokens."
            )
        return tokens

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in the dtype of the weights."""
        return getattr(torch, self.dtype).itemsize

    def weight_bytes(self) -> int:
        """Bytes of the weights in their dtype.

        Raises:
            UserError: See ``tensor_shapes``.
        """
        return self.number_bytes * sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def cache_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers; as if no layer had a sliding window."""
        config = self.model_config()
        heads = config.num_attention_heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * config.num_hidden_layers * key_value_heads * size * self.number_bytes

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows.

        Raises:
            UserError: Its config does not say.
        """
        tokens = getattr(self.model_config(), "vocab_size", None)
        if not isinstance(tokens, int) or tokens < 1:
            raise UserError(
                f"{self.path / 'config.json'}: vocab_size is {tokens!r}, and must be a number of tokens."
            )
        return tokens

    def model_config(self) -> PreTrainedConfig:
        """The config as transformers reads it.

        Raises:
            UserError: transformers cannot read it, or it is of no model that writes text after text.
        """
        content = self.config
        if (self.path / "adapter_config.json").exists():  # transformers would load the model that it names
            raise UserError(
                f"{self.path} has an adapter_config.json, so it is an adapter of a model: merge it into that "
                "model, and name the folder of the result."
            )
        path, kind = self.path / "config.json", content.get("model_type")
        if kind not in CONFIG_MAPPING and "auto_map" not in content:
            raise UserError(
                f"{path}: transformers has no architecture '{kind}': choose another model, or update it."
            )
        if content.get("quantization_config"):
            raise UserError(
                f"{path} has a quantization_config, and quantised weights cannot learn: choose the model "
                "that was quantised."
            )
        config = self._loaded(AutoConfig.from_pretrained, "config.json")
        if config.get_text_config() is not config:
            raise UserError(
                f"{path} is of a model of text and other things ({kind} with a text_config): choose one "
                "for text alone."
            )
        architectures = content.get("architectures") or []
        causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        names = [cls.__name__ for cls in (causal if isinstance(causal, tuple) else (causal,)) if cls]
        if not names or (architectures and not set(architectures) & set(names)):
            found = f"{kind} ({', '.join(map(str, architectures))})" if architectures else kind
            raise UserError(
                f"{path} is of a model that does not continue a text, {found}: choose a causal language "
                "model."
            )
        return config

    def model(self, dtype: torch.dtype, **options: bool) -> Any:
        """The model, loaded; ``options`` are those of ``from_pretrained``.

        Raises:
            UserError: Its config.json or generation_config.json is damaged.
        """
        self.generation_config()  # transformers reads it too, without a word on what is wrong
        return AutoModelForCausalLM.from_pretrained(
            self.path, config=self.model_config(), dtype=dtype, trust_remote_code=False, **options
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded.

        Raises:
            UserError: transformers cannot read it, or it has more tokens than the model.
        """
        self.model_config()  # the tokenizer's class follows from it
        for path in sorted(self.path.glob("*token*.json")):
            self._json(path.name)  # transformers does not say which one is broken

        def load(path: Path, **options: bool) -> PreTrainedTokenizerBase:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            if not tokenizer.encode("Why?", add_special_tokens=False):
                raise ValueError("it has no tokens for a text")
            return tokenizer

        tokenizer = self._loaded(load, "its tokenizer")
        if tokenizer.vocab_size > self.vocabulary:
            raise UserError(
                f"the tokenizer in {self.path} has {tokenizer.vocab_size} tokens, and its config.json a "
                f"vocab_size of {self.vocabulary}: they are not of one model."
            )
        return tokenizer

    def generation_config(self) -> GenerationConfig | None:
        """The generation config, or None if the folder has none.

        Raises:
            UserError: It is damaged, or its end tokens are no ids.
        """
        if not (self.path / (name := "generation_config.json")).exists():
            return None
        self._json(name)
        config = self._loaded(GenerationConfig.from_pretrained, name)
        ends = config.eos_token_id
        for end in ends if isinstance(ends, list) else [ends]:
            if end is not None and (type(end) is not int or end < 0):
                raise UserError(
                    f"{self.path / name}: eos_token_id is {ends!r}, and must be an id or a list of ids."
                )
        return config

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder that must hold a mapping."""
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._unreadable(name, error) from error
        if not isinstance(content, dict):
            raise self._unreadable(name, f"it holds a {type(content).__name__} and no mapping")
        return content

    def _loaded(self, load: Callable[..., T], name: str) -> T:
        """What transformers makes of a file."""
        options = {} if name == "generation_config.json" else {"trust_remote_code": False}
        try:
            return load(self.path, **options)
        except Exception as error:  # transformers lets through whatever a wrong value leads to
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{name} in {self.path} is read by Python code of its own (auto_map), which stasc "
                    "does not run: choose a model whose architecture and tokenizer transformers has."
                ) from error
            raise self._unreadable(name, error) from error

    def files_beside_weights(self) -> list[Path]:
        """Config, tokenizer, chat template and code: all that a fine-tuned model shares with its base."""
        found = [path for pattern in _FILES_BESIDE_WEIGHTS for path in sorted(self.path.glob(pattern))]
        return [path for path in found if not path.name.endswith(".index.json")]

    def weight_files(self) -> list[Path]:
        """The safetensors files, as the index names them if there is one."""
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            return [self.path / "model.safetensors"]
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{index} names {name}, which is no file of this folder: get it anew.")
        return [self.path / name for name in names]

    def tensor_shapes(self) -> Shapes:
        """Names and shapes of the weights, without tensors that follow from others.

        Raises:
            UserError: There are none, or a file is damaged.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path in self.weight_files():
                with safe_open(path, "np") as tensors:
                    names = tensors.keys()
                    shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            others = [path.name for kind in ("bin", "pt", "pth") for path in self.path.glob(f"*.{kind}")]
            advice = f"; {others[0]} could run code of its own: convert it" if others else ": get it anew"
            raise UserError(f"{self.path} has no usable safetensors weights ({error}){advice}.") from error
        if self.config.get("tie_word_embeddings") is True:
            shapes.pop("lm_head.weight", None)  # the embedding again, which some folders hold twice
        return {name: shape for name, shape in shapes.items() if not name.endswith(".rotary_emb.inv_freq")}

    def check_same_tensors(self, expected: Shapes) -> None:
        """Compare names and shapes of the weights with those of another model.

        An engine that is given other names loads the ones it knows and silently keeps its old weights for the
        rest.

        Raises:
            UserError: Names or shapes differ.
        """
        found = self.tensor_shapes()
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UserError(
                    f"{self.path} is not of the first model's architecture: {name} is "
                    f"{_shape(found.get(name))}, not {_shape(expected.get(name))}."
                )

    def identity(self) -> str:
        """32 hex digits that change when the weights are replaced, without reading the weights.

        They follow from the resolved path and from the name, size and modification time of config.json and of
        every safetensors file.

        Raises:
            UserError: The folder has no config.json.
        """
        digest = blake2b(str(self.path.resolve()).encode(), digest_size=16)
        try:
            for path in (self.path / "config.json", *sorted(self.path.glob("*.safetensors"))):
                status = path.stat()
                digest.update(f"\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
        except OSError as error:
            raise self._unreadable("config.json", error) from error
        return digest.hexdigest()

    def _unreadable(self, name: str, reason: object) -> UserError:
        text = " ".join(str(reason).split()) or type(reason).__name__
        return UserError(
            f"{self.path} is no model folder: {name} cannot be read ({text[:200]}): get it anew."
        )


def hub_is_away(info: Callable[..., object], name: str) -> str | None:
    """Why the Hugging Face hub does not answer, or None if it does; its client would try for half a minute.

    Args:
        info: A method of ``HfApi`` that asks for something once.
        name: What it is asked for.
    """
    try:
        info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):  # an answer, if not the one hoped for
        return None
    except Exception as error:  # the client's own types of connection errors are not public
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
