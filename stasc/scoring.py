"""From trajectories to the figures of an evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from statistics import fmean, stdev

from stasc.filtering import improves
from stasc.reward import SelfCorrection, after_marker, normalize
from stasc.trajectory import Completion, Trajectory

FINAL_ANSWER = "Final Answer:"
"""What the prompts ask to put before an answer."""


def figures(
    rounds: Sequence[Iterable[Trajectory]], greedy: Iterable[Trajectory] | None, threshold: float
) -> dict[str, dict[str, float]]:
    """All that an evaluation tells.

    Args:
        rounds: The trajectories of each round of corrections.
        greedy: Those that were drawn greedily, if any were.
        threshold: t, the reward from which on an answer is right.

    Returns:
        ``test``: mean rewards, their standard errors and the transitions of the first round. ``samples``:
        what several samples of a question do together. ``rounds``: the mean reward of every turn, if there
        is more than one correction. ``greedy``: as ``test``.
    """
    trajectories, *later = map(list, rounds)
    test = scores(trajectories, threshold)
    found = {"test": test | standard_errors(trajectories)}
    if any(t.j for t in trajectories):
        found["samples"] = over_samples(trajectories, threshold)
    if later:
        rewards = [test["r1"], test["r2"], *(fmean(t.r2 for t in turn) for turn in later)]
        found["rounds"] = {f"r{turn}": reward for turn, reward in enumerate(rewards, start=1)}
    if greedy is not None:
        found["greedy"] = scores(greedy, threshold)
    return found


def scores(trajectories: Iterable[Trajectory], threshold: float) -> dict[str, float]:
    """Mean rewards r1 and r2, the four transitions, and their count."""
    # All of them are here: there is nothing to synchronise.
    metric = SelfCorrection(threshold, sync_on_compute=False)
    pairs = ((t.r1, t.r2) for t in trajectories)
    while some := list(islice(pairs, 4096)):  # of a file that may be long
        metric.update(*zip(*some, strict=True))
    return {name: value.item() for name, value in metric.compute().items()}


def sizes(dataset: Iterable[Trajectory]) -> dict[str, int]:
    """|D_n|, and how much of it improves or just does not decrease."""
    gains = Counter(map(improves, dataset))
    return {"size": gains.total(), "improving": gains[True], "non_decreasing": gains[False]}


def standard_errors(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Of the mean rewards, over questions: samples of one question are not independent.

    Nothing for a single question.
    """
    means = [(fmean(t.r1 for t in own), fmean(t.r2 for t in own)) for own in _by_question(trajectories)]
    if len(means) < 2:
        return {}
    r1, r2 = (stdev(of_turn) / math.sqrt(len(means)) for of_turn in zip(*means, strict=True))
    return {"r1_se": r1, "r2_se": r2}


def over_samples(trajectories: Iterable[Trajectory], threshold: float) -> dict[str, float]:
    """What the k samples of a question can do together, as means over questions, for both turns.

    ``pass_r1`` and ``pass_r2``: whether at least one of the k is right (pass@k). ``majority_r1`` and
    ``majority_r2``: the reward of the answer that most samples give.
    """
    questions = _by_question(trajectories)
    turns = {
        "r1": [[(t.initial, t.r1) for t in own] for own in questions],
        "r2": [[(t.correction, t.r2) for t in own] for own in questions],
    }
    passed = {
        f"pass_{turn}": fmean(any(reward >= threshold for _, reward in own) for own in answers)
        for turn, answers in turns.items()
    }
    voted = {f"majority_{turn}": fmean(map(_voted, answers)) for turn, answers in turns.items()}
    return {"k": len(questions[0]), **passed, **voted}


def _by_question(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    return [list(own) for _, own in groupby(trajectories, key=lambda t: t.question.id)]


def _voted(answers: Sequence[tuple[Completion, float]]) -> float:
    """The reward of the most frequent answer; of the first drawn among equals."""
    said = [tuple(normalize(_final(completion.text))) for completion, _ in answers]
    winner, _ = Counter(said).most_common(1)[0]
    return answers[said.index(winner)][1]


def _final(text: str) -> str:
    """What a completion concludes with, or all of it where it does not say so."""
    return after_marker(text, FINAL_ANSWER) or text
