"""What a model folder holds, read without loading it, because engines do not notice what is missing."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stasc.errors import UserError


def read_config(folder: Path) -> dict[str, object]:
    """The config.json of a model folder."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no model folder: config.json cannot be read ({error}).") from error


def model_dtype(folder: Path) -> str:
    """The dtype that a model folder asks for, or float32."""
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a model folder, without what the others determine.

    Raises:
        UserError: There are none, or a file is damaged.
    """
    shapes = {}
    try:
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            with safe_open(folder / name, "pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} has no usable safetensors weights ({error}).") from error
    if read_config(folder).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)  # the embedding again, and some write it
    return {name: shape for name, shape in shapes.items() if not name.endswith(".rotary_emb.inv_freq")}


def check_same_tensors(expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuse weights that an engine holding ``expected`` would take in part, keeping old ones for the rest.

    Raises:
        UserError: Names or shapes differ.
    """
    found = tensor_shapes(folder)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{folder} is not of the first model's architecture: {name} is {_shape(found.get(name))}, "
                f"not {_shape(expected.get(name))}."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
