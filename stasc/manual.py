"""A model's manual: how it is asked, as a file in its folder that people and our tools read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from stasc.errors import UserError
from stasc.prompting import Message, check_prompts
from stasc.run import write_lines
from stasc.sampling import Sampling

_FILE = "stasc.yaml"

_HEAD = """\
# How this model is asked, for people and for stasc: SelfCorrector, chat, predict, test and validate.
# {question} stands for the question, {initial_answer} for the answer that is to be corrected.
"""


@dataclass(frozen=True)
class Manual:
    """How a model is asked: as it was in the evaluation of the run that made it.

    Args:
        turns: Names of the prompts that are sent one after another.
        prompts: The messages of each prompt.
        sampling: How answers are drawn.
        answer: The class path, and perhaps ``init_args``, of what finds the answer in a completion.
        template: Options of the chat template.
    """

    turns: list[str]
    prompts: dict[str, list[Message]]
    sampling: Sampling
    answer: dict[str, Any]
    template: dict[str, Any] | None = None

    @classmethod
    def of_run(cls, config: Mapping[str, Any], turns: Sequence[str]) -> Manual:
        """The manual of the models that a run makes.

        Args:
            config: Of the run.
            turns: Names of the prompts that its system sends in evaluation.
        """
        data = config["data"]
        prompts = {
            name: [Message(**message) for message in data["prompts"][name]] for name in data["prompts"]
        }
        sampling = Sampling(**data["evaluation"]["sampling"])
        return cls(list(turns), prompts, sampling, data["answer"], config["model"]["template"])

    @classmethod
    def read(cls, folder: Path) -> Manual:
        """The manual in a model folder.

        Raises:
            UserError: There is none, or it has a mistake.
        """
        path = folder / _FILE
        if not path.is_file():
            raise UserError(
                f"{folder} has no {_FILE}, which says how the model is asked: take a model that a run wrote, "
                "or copy that file from one and change it."
            )
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            fields = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError("it must name turns, prompts, sampling and answer")
            manual = cls(**vars(parser.instantiate(parser.parse_object(fields))))
        except (
            *(OSError, ValueError, TypeError, RecursionError),
            *(yaml.YAMLError, ArgumentError, UserError),
        ) as error:
            raise UserError(f"{path} has a mistake: {' '.join(str(error).split())}") from error
        if not manual.turns:
            raise UserError(f"{path} has no turns: name the prompts that are sent one after another.")
        check_prompts(manual.prompts, manual.turns, f"{path}: prompts")
        return manual

    @classmethod
    def find(cls, folder: Path) -> Manual | None:
        """The manual in a model folder, or None if it has none."""
        return cls.read(folder) if (folder / _FILE).exists() else None

    def write(self, folder: Path) -> None:
        """Write the file into a model folder; the same manual always gives the same bytes."""
        text = yaml.dump(asdict(self), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
        write_lines(folder / _FILE, (_HEAD + text).rstrip("\n").split("\n"))

    @property
    def names_code(self) -> bool:
        """Whether it has answers found by a class that did not come with this program."""
        return not str(self.answer.get("class_path")).startswith("stasc.answers.")

    @property
    def options(self) -> dict[str, Any]:
        """What it says, as options of the command line."""
        fields = asdict(self)
        return {
            "data.prompts": fields["prompts"],
            "data.evaluation.sampling": fields["sampling"],
            "data.answer": self.answer,
            "model.template": self.template,
        }


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    if not text.replace("\n", "").isprintable():
        style = '"'  # YAML would read some separators as plain line ends
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
