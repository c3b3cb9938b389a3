"""Config files, checked before jsonargparse reads them: UTF-8 text, a mapping, and no key twice."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from stasc.errors import UserError, check_text

MOST_VALUES = 1_000_000
"""Values that a file may have once its aliases are written out; far more than any config needs."""

MOST_BYTES = 1 << 24
"""Size that a file may have; more than any config needs, and some devices never end."""


_SECRETS = ("api_key", "api_token", "token", "password", "secret")
"""Options of loggers, in the end, whose values nobody should read in a run folder."""

_SECRET = re.compile(r"://[^/\s:@]+:[^/\s@]+@|\bhf_[A-Za-z0-9]{30,}")
"""A URL with a password, and a token of the Hugging Face hub."""


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: The file, or one that it names, cannot be read or holds a key twice, or it is no mapping;
            the message names the file, and the line where there is one.
    """
    content = _read(path)
    options = content.items() if isinstance(content, dict) else ()
    if not any(value is not None for _, value in options) or not all(isinstance(n, str) for n, _ in options):
        has = "is empty" if content is None else "has no options"
        raise UserError(f"the config {path} {has}: write one option a line, such as run_dir: runs/mine.")
    check_named_files(content, path.parent)
    return content


def check_named_files(values: Any, folder: Path = Path()) -> None:
    """Read the YAML files that options name, such as prompts.

    Args:
        values: What options say: texts, and lists and mappings of them.
        folder: Where relative paths begin.

    Raises:
        UserError: One cannot be read, or holds a key twice.
    """
    if isinstance(values, str):
        if values.endswith((".yaml", ".yml")) and (path := folder / values).is_file():
            _read(path)
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            check_named_files(value, folder)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the file {path} is not UTF-8 text: save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the config {path} cannot be read ({reason}): name a YAML file.") from error
    if len(text) > MOST_BYTES:
        raise UserError(f"the config {path} has more than {MOST_BYTES:,} bytes: name a YAML file.")
    return _parse(text, path)


def _parse(text: str, path: Path) -> Any:
    """What YAML says, without what a parser takes without a word, or does not come back from."""
    try:
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
        if root is not None:
            _count(root, path, {})
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: this is not YAML that can be read here ({problem}).") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
    except RecursionError as error:
        raise UserError(f"{path} nests too deeply: write it with fewer brackets.") from error


def check_value(option: str, value: Any) -> None:
    """Find values that no option can have, whatever its type.

    Raises:
        UserError: There is a nan, a text that no file could have as its name, or a password.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            check_value(f"{option}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            check_value(option, inner)
    elif isinstance(value, float) and math.isnan(value):
        raise UserError(f"{option} is nan: give a number.")
    elif isinstance(value, str):
        check_text(value, option)
        if _SECRET.search(value) or (value and option.rpartition(".")[2] in _SECRETS):
            raise UserError(
                f"{option} has a password or token, which would stand in config.yaml: leave it out, and set "
                "the environment variable that its service reads."
            )


def _count(node: yaml.Node, path: Path, counted: dict[int, int]) -> int:
    """How many values a node stands for; 0 in ``counted`` marks a node that is being counted."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise UserError(f"{path}, line {node.start_mark.line + 1}: this value contains itself.")
        return counted[id(node)]
    counted[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise UserError(f"{path}, line {line}: '{key.value}' is there twice: remove one of them.")
            seen.add(key.value)
    size = 1 + sum(_count(child, path, counted) for child in children)
    if size > MOST_VALUES:
        line = node.start_mark.line + 1
        raise UserError(f"{path}, line {line}: its aliases stand for more than {MOST_VALUES:,} values.")
    counted[id(node)] = size
    return size
