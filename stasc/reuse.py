"""What M_0 says is the same in many runs of an ablation: a run may take it over from another one.

Two groups of stages come from M_0 alone: its evaluation (iteration 0), and the trajectories of iteration 1,
whatever the variant. A run takes a group over from one other run if that one asked the same questions and its
options are the same, but for those that come into play later. ``metrics.json`` is never taken over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stasc import algorithm
from stasc.errors import UserError
from stasc.run import Run, flatten
from stasc.trajectory import Question, Records

Asked = Literal["train", "test"]

# Options that come into play after M_0, or have no part in any result. All others must be equal.
_LATER = ("run_dir", "reuse", "ckpt_path", "weights_only", "model.", "trainer.")
_LATER += ("data.batch_size", "data.output", "data.predict", "data.training_prompts")
_LATER += ("data.prefix_sharing", "data.token_budget", "data.group_corrections")
_CHOICES = ("variant", "iterations", "epochs", "pair_all", "only_equal", "fixed_in_test")
# Those of our own systems; what the options of a user's own system do is not known.
_LATER_IN_OURS = {
    "train": (*_CHOICES, "rounds"),
    "test": (*_CHOICES, "rounds", "n_init", "n_corr"),
}


def done_by_others(
    run: Run, place: Path, config: dict[str, Any], questions: Mapping[str, Sequence[Question]]
) -> dict[Path, Path]:
    """Stages of M_0 that another run has done and this one would do again.

    What this run has begun to say itself goes on: a group of which it has a file is not taken over.

    Args:
        run: This run.
        place: Another run, or a folder of runs.
        config: Of this run.
        questions: Of this run, ``train`` and ``test``.

    Returns:
        For each stage's file in this run the file to copy.

    Raises:
        UserError: ``place`` is not a folder.
    """
    if not place.is_dir():
        raise UserError(f"reuse is {place}, which is not a folder: name a run, or a folder of runs.")
    options = flatten(config)
    zero, first = run.iteration(0), run.iteration(1)
    rounds = range(2, options.get("algorithm.init_args.rounds", 1) + 1)
    groups: dict[Asked, list[Path]] = {"test": [zero.test, zero.test_greedy, *map(zero.test_round, rounds)]}
    if options.get("algorithm.init_args.iterations"):
        groups["train"] = [first.initial, first.trajectories]
    found: dict[Path, Path] = {}
    for asked, stages in groups.items():
        if any(stage.exists() for stage in stages):
            continue
        origin, candidates = _origin(options, asked), []
        for said in sorted(place.glob(f"**/{stages[0].relative_to(run.folder)}")):
            other = Run(said.parents[1])
            if _origin(other.options(), asked) == origin and _questions(said) == questions[asked]:
                there = {stage: other.folder / stage.relative_to(run.folder) for stage in stages}
                candidates.append({stage: file for stage, file in there.items() if file.is_file()})
        found |= max(candidates, key=len, default={})
    return found


def _origin(options: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The options that M_0's answers to these questions follow from."""
    system = options.get("algorithm.class_path", "")
    ours = system.startswith(f"{algorithm.__name__}.")
    later = _LATER
    if ours:
        later += tuple(f"algorithm.init_args.{name}" for name in _LATER_IN_OURS[asked])
    origin = {
        name: value for name, value in options.items() if name == "model.base" or not name.startswith(later)
    }
    if ours and asked == "test":
        # All that a system has a say in is which answers are corrected.
        decides = getattr(algorithm, system.rpartition(".")[2]).asks_again
        origin["algorithm.class_path"] = decides.__qualname__
    return origin


def _questions(said: Path) -> list[Question]:
    return list(dict.fromkeys(record.question for record in Records(said)))
