"""Hugging Face model folders: found, and read without loading the weights.

Sampling and training both read a model folder through this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from stasc.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by their names."""

_FILES_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a config.json, safetensors weights, and usually a tokenizer.

    Every call reads the files again; nothing is cached.
    """

    path: Path

    @classmethod
    def locate(cls, model: str) -> ModelFolder:
        """The folder of a model given as a path or as a hub id; the hub's is downloaded once.

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
        wanted = ["*.safetensors", *_FILES_BESIDE_WEIGHTS]
        try:
            return cls(Path(snapshot_download(model, allow_patterns=wanted)))
        except Exception as error:  # the hub client raises a dozen unrelated types
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"model.base '{model}' is not a folder here, and the Hugging Face hub did not give it "
                f"({reason})."
            ) from error

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            UserError: It is missing or damaged.
        """
        try:
            return json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._no_config(error) from error

    @property
    def revision(self) -> str | None:
        """The hub's commit of which this is a snapshot; None for another folder."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    @property
    def dtype(self) -> str:
        """The dtype of the weights according to config.json, such as ``bfloat16``; float32 if it has none."""
        config = self.config
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")

    @property
    def context(self) -> int:
        """Tokens that the model can take.

        Raises:
            UserError: Its config does not say.
        """
        tokens = getattr(AutoConfig.from_pretrained(self.path), "max_position_embeddings", None)
        if tokens is None:
            raise UserError(
                f"{self.path / 'config.json'} has no max_position_embeddings: add it, the number of tokens "
                "that the model can take."
            )
        return tokens

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded."""
        return AutoTokenizer.from_pretrained(self.path)

    def generation_config(self) -> GenerationConfig | None:
        """The generation config, or None if the folder has none."""
        present = (self.path / "generation_config.json").is_file()
        return GenerationConfig.from_pretrained(self.path) if present else None

    def files_beside_weights(self) -> list[Path]:
        """Config, tokenizer, chat template and code: all that a fine-tuned model shares with its base."""
        found = [path for pattern in _FILES_BESIDE_WEIGHTS for path in sorted(self.path.glob(pattern))]
        return [path for path in found if not path.name.endswith(".index.json")]

    def tensor_shapes(self) -> Shapes:
        """Names and shapes of the weights, without tensors that follow from others.

        Raises:
            UserError: There are none, or a file is damaged.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            index = self.path / "model.safetensors.index.json"
            names = ["model.safetensors"]
            if index.is_file():
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            for name in names:
                with safe_open(self.path / name, "np") as tensors:
                    shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"{self.path} has no usable safetensors weights ({error}).") from error
        if self.config.get("tie_word_embeddings"):
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
            raise self._no_config(error) from error
        return digest.hexdigest()

    def _no_config(self, error: Exception) -> UserError:
        return UserError(f"{self.path} is no model folder: config.json cannot be read ({error}).")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
