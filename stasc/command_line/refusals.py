"""What jsonargparse refuses, in plain words: the option, where it is from, its value, what it may be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stasc.command_line.config_file import read_config
from stasc.house import OWN_PACKAGES, config_file
from stasc.users_code import blame

RENAMED = {
    "batch_size": "batches.size",
    "prefix_sharing": "batches.prefix_sharing",
    "token_budget": "batches.token_budget",
    "group_corrections": "batches.group_corrections",
    "test_sampling": "evaluation.sampling",
    "test_samples": "evaluation.samples",
    "test_greedy": "evaluation.greedy",
}
"""Options of ``data`` by the names that they had in version 0.1."""

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
"""What Python's types are called in a YAML file."""

_LONGEST = 100
"""Characters of a value that are shown."""


def plain_words(error: Exception, arguments: Sequence[str]) -> str:
    """A sentence for an error of jsonargparse.

    Args:
        error: Its message has several lines.
        arguments: Those of the command, which say whether and from which config the option is.
    """
    refusal = str(error)
    return _renamed(refusal) or _not_ours(refusal) or blame(error) or _plain(refusal, arguments)


def _plain(refusal: str, arguments: Sequence[str]) -> str:
    """The message without what only a programmer needs."""
    option = ".".join(re.findall(r'Parser key "([^"]+)":', refusal))
    if unknown := re.search(r"Subcommand '\w+' does not accept option '([^']+)'", refusal):
        return f"there is no option {unknown[1]}{_origin(unknown[1], arguments)}: see --help for all of them."
    if missing := re.search(r"the following arguments are required: \w+\.(\S+)$", refusal):
        return f"{missing[1]} is not set: give it in a config or on the command line."
    where = f"{option}{_origin(option, arguments)}" if option else "an option"
    if problem := re.search(r"Problem with given class_path '([^']+)':\s+([^\n]+)", refusal):
        class_path, reason = problem[1], problem[2].strip().rstrip(".")
        if not reason.startswith("Parser key"):
            return f"{f'{where}: ' if option else ''}{class_path} cannot be used ({reason})."
    own = re.search(r"^\s*- (?!Expected|Problem)(.+)$", refusal, re.MULTILINE)
    if own and (class_path := re.search(r"Given value: Namespace\(class_path='([^']+)'", refusal)):
        return f"{f'{where}: ' if option else ''}{class_path[1]} cannot be used ({own[1].strip()})."
    if wanted := re.search(r"not correspond to a subclass of (\w+)|an instantiatable class", refusal):
        given = re.search(r"(?:Import path (?=\S+ does not)|Given value: )(\S+)", refusal)
        needs = f"a subclass of {wanted[1]}" if wanted[1] else "one without abstract methods"
        return f"{where}: {given[1] if given else 'this class'} cannot be used: name {needs}."
    if "codec can't decode" in refusal:
        return f"{where}: the file is not UTF-8 text: save it as UTF-8."
    if wanted := re.findall(
        r"Expected an? (<class '[^']+'>|typing\.Literal\[[^]]*\]|dot import path)", refusal
    ):
        # Of a part of a value the message says what it got, and after that what the whole value is.
        given = re.findall(r"Got value: (.*)", refusal) or re.findall(
            r"(?:Given value|import path string): (.*)", refusal, re.DOTALL
        )
        value = f" cannot be {_short(given[-1])}" if given else " has a wrong value"
        kinds = [*_kinds(wanted), *(["the path of a file"] if "Expected a path" in refusal else [])]
        return f"{where}{value}: it must be {' or '.join(kinds)}."
    message = " ".join(re.sub(r'Parser key "[^"]+":', "", refusal).split())
    return f"{where}: {message}" if option else message


def _kinds(wanted: Sequence[str]) -> list[str]:
    """What values may be, each kind once, and null last."""
    kinds, choices = [], []
    for kind in wanted:
        if kind.startswith("typing.Literal"):
            choices += re.findall(r"'[^']*'|[^\s,\[\]]+", kind.removeprefix("typing.Literal"))
        elif kind.startswith("<class"):
            name = kind[8:-2].rpartition(".")[2]
            kinds.append(_KINDS.get(name, "a list" if name == "Iterable" else f"a {name}"))
        else:
            kinds.append("a class path")
    if "a number" in kinds:
        kinds = [kind for kind in kinds if kind != "a whole number"]
    if choices:
        kinds = [f"one of {', '.join(dict.fromkeys(choices))}", *(kind for kind in kinds if kind == "null")]
    return sorted(dict.fromkeys(kinds), key=lambda kind: kind == "null")


def _short(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def is_given(option: str, arguments: Sequence[str]) -> bool:
    """Whether an option, or one within it, was typed or is in a config."""
    typed = any(re.match(rf"--{re.escape(option)}(?![\w])", argument) for argument in arguments)
    return typed or bool(_origin(option, arguments))


def overridden(arguments: Sequence[str]) -> Iterator[str]:
    """A sentence for each option that a config behind it sets too: what stands later wins.

    Raises:
        UserError: A config cannot be read.
    """
    for place, path in _configs(arguments):
        config = read_config(path)
        for option in (argument.partition("=")[0] for argument in arguments[:place]):
            names = option.removeprefix("--").replace(".init_args.", ".").split(".")
            if option.startswith("--") and _has(config, names):
                yield f"{option} stands before --config {path}, which has it too and wins."


def _configs(arguments: Sequence[str]) -> Iterator[tuple[int, Path]]:
    """Where each config stands among the arguments, and its file."""
    for place, following in enumerate([*arguments[1:], ""][: len(arguments)]):
        name, _, value = arguments[place].partition("=")
        if name in ("-c", "--config"):
            yield place, Path(config_file(value or following))


def _origin(option: str, arguments: Sequence[str]) -> str:
    """Which of several configs an option is from, " (in FILE)"; "" if it was typed, or is in none."""
    names = option.split(".")
    typed = {argument.partition("=")[0].replace(".init_args.", ".") for argument in arguments}
    if any("--" + ".".join(names[:n]) in typed for n in range(1, len(names) + 1)):
        return ""
    for _, path in reversed(list(_configs(arguments))):
        if _has(read_config(path), names):
            return f" (in {path})"
    return ""


def _has(config: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether a config sets an option, or something that the option is in."""
    value: Any = config
    for name in names:
        if not isinstance(value, Mapping):
            return True
        if name not in value:
            value = value.get("init_args")
            if not isinstance(value, Mapping) or name not in value:
                return False
        value = value[name]
    return True


def _renamed(refusal: str) -> str | None:
    """A sentence for a refused option that has another name or place now; None if it is none of those."""
    if re.search(r"data\.reward.*'marker' is not accepted", refusal, re.DOTALL):
        return (
            "rewards have no marker any more: set data.answer to stasc.answers.AfterMarker with that marker, "
            "which holds for every reward."
        )
    for old, new in RENAMED.items():
        if re.search(rf"\b{old}\b", refusal):
            return f"data.{old} is called data.{new} now: change it in the config or on the command line."
    return None


def _not_ours(refusal: str) -> str | None:
    """A sentence for what one of our packages was asked for and does not have; None for other refusals."""
    package, name = rf"(?P<package>{'|'.join(OWN_PACKAGES)})", r"(?P<name>\w+)"
    for pattern in (
        f"module '{package}' has no attribute '{name}'",
        rf"No module named '{package}\.{name}",
        f"cannot import name '{name}' from '{package}'",
    ):
        if found := re.search(pattern, refusal):
            ours, missing = found["package"], found["name"]
            return (
                f"stasc's own package {ours} has no {missing}: if you mean a folder or file {ours} of yours, "
                "give it another name, also in the class path."
            )
    return None
