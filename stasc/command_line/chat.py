"""A model on the terminal: a question on each line, and what it answers and corrects."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils.logging import disable_progress_bar

from stasc.command_line.refusals import plain_words
from stasc.errors import UserError, check_text
from stasc.sampling import Sampler, TransformersSampler
from stasc.self_corrector import SelfCorrector
from stasc.texts import printable
from stasc.trajectory import Trajectory


def main(arguments: Sequence[str]) -> None:
    """Answer the lines of standard input to its end.

    Raises:
        UserError: An option is wrong, or the model's folder.
    """
    disable_progress_bar()  # of the weights that are loaded
    try:
        parser = ArgumentParser(
            prog="python -m stasc chat",
            description="Answers and corrects the questions that you type, one on each line, until Ctrl-D.",
            exit_on_error=False,
        )
        parser.add_argument("--model.base", type=str, required=True, help="The model: a folder or a hub id.")
        parser.add_argument(
            "--rounds",
            type=int | None,
            default=None,
            help="Corrections one after another (default: as the model's stasc.yaml has it).",
        )
        parser.add_argument("--seed_everything", type=int, default=42, help="What all draws follow from.")
        sampler = {"class_path": f"{TransformersSampler.__module__}.{TransformersSampler.__name__}"}
        parser.add_subclass_arguments(Sampler, "sampler", default=sampler)
        options = parser.instantiate(parser.parse_args(arguments))
        corrector = SelfCorrector.from_pretrained(
            options.model.base, options.sampler, options.seed_everything
        )
    except ArgumentError as mistake:
        raise UserError(plain_words(mistake, arguments)) from mistake
    try:
        _talk(corrector, options.rounds)
    finally:
        corrector.close()


def _talk(corrector: SelfCorrector, rounds: int | None) -> None:
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # whatever bytes come, and whatever the terminal can show
    prompt = "\nquestion: " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return
        if not question:
            continue
        try:
            check_text(question, "the question")
            print(_shown(corrector.ask(question, rounds)), flush=True)
        except UserError as mistake:  # a question that is too long: the next may be shorter
            print(f"stasc: {printable(str(mistake))}", file=sys.stderr, flush=True)


def _shown(trajectory: Trajectory) -> str:
    """The answers, without anything that a terminal would obey."""
    blocks = [
        f"{'initial answer' if answer.prompt == 'initial' else answer.prompt}: {answer.text.strip()}"
        for answer in trajectory.answers
    ]
    return printable("\n".join(blocks), keep="\n")
