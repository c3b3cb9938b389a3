"""The metrics of an evaluation and of a training set, from trajectories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from itertools import groupby, islice, takewhile
from operator import eq
from statistics import fmean
from typing import Any

from stasc.answers import FinalAnswer, after_marker
from stasc.filtering import improves
from stasc.reward import SelfCorrection, normalize
from stasc.statistics import paired_test, standard_error
from stasc.trajectory import Answer, Example, Question, Trajectory


def answer_metrics(trajectories: Sequence[Trajectory], threshold: float) -> dict[str, float]:
    """How good initial answers and corrections are: mean rewards, their errors, transitions, and Delta."""
    rewards = reward_metrics(trajectories, threshold)
    return rewards | standard_errors(trajectories) | correction_metrics(trajectories)


def evaluation_metrics(
    rounds: Sequence[Iterable[Trajectory]],
    greedy: Iterable[Trajectory] | None,
    threshold: float,
    answer: FinalAnswer,
    marker: str | None,
) -> dict[str, dict[str, float]]:
    """All metrics of an evaluation on the test questions.

    Args:
        rounds: The trajectories after the first correction, after the second, and so on.
        greedy: Those that were drawn greedily, if any were.
        threshold: t, the reward from which on an answer is right.
        answer: Finds the answer in a completion.
        marker: What comes before the final answer in it, for the majority vote.

    Returns:
        ``test``: `answer_metrics` of the first round. ``samples``: pass@k and majority vote, if there are
        several samples of a question. ``rounds``: the mean reward of every turn, if there is more than one
        correction. ``greedy``: as ``test``, without standard errors.
    """
    trajectories, *later = map(list, rounds)
    metrics = {"test": answer_metrics(trajectories, threshold)}
    if any(trajectory.answers[0].number for trajectory in trajectories):
        metrics["samples"] = sample_metrics(trajectories, threshold, answer, marker)
    if later:
        means = (fmean(t.reward(turn) for t in after) for turn, after in enumerate(later, start=3))
        rewards = [metrics["test"]["r1"], metrics["test"]["r2"], *means]
        metrics["rounds"] = {f"r{turn}": reward for turn, reward in enumerate(rewards, start=1)}
    if greedy is not None:
        metrics["greedy"] = reward_metrics(greedy, threshold)
    return metrics


def chosen(iterations: Sequence[dict[str, Any]]) -> int:
    """The iteration, by its metrics, whose r(Y2) on the validation questions is best; the first of equals."""
    return max(range(len(iterations)), key=lambda n: iterations[n]["validation"]["r2"])


def reward_metrics(trajectories: Iterable[Trajectory], threshold: float) -> dict[str, float]:
    """Mean rewards r1 and r2, the four transitions between them, and the number of trajectories."""
    # Every process has all of them: there is nothing to synchronise.
    metric = SelfCorrection(threshold, sync_on_compute=False)
    pairs = ((t.reward(1), t.reward(2)) for t in trajectories)
    while chunk := list(islice(pairs, 4096)):  # of a file that may be long
        metric.update(*zip(*chunk, strict=True))
    return {name: value.item() for name, value in metric.compute().items()}


def sampled(trajectories: Iterable[Trajectory], first: int = 1) -> dict[str, int]:
    """How many answers and tokens were sampled for trajectories, which are in the order of their draws.

    Args:
        trajectories: Those of a question one after another; their first answers may be the same draws.
        first: The first turn that counts, where those before it were sampled for an earlier iteration.
    """
    before, answers, tokens = Trajectory(Question("", "")), 0, 0
    for trajectory in trajectories:
        shared = 0  # a path that is not behind the one before belongs to a question that is asked once more
        if trajectory.question.id == before.question.id and trajectory.path > before.path:
            shared = sum(1 for _ in takewhile(bool, map(eq, trajectory.path, before.path)))
        new = trajectory.answers[max(shared, first - 1) :]
        answers += len(new)
        tokens += sum(len(answer.token_ids) + answer.finished for answer in new)
        before = trajectory
    return {"answers": answers, "tokens": tokens}


def dataset_sizes(dataset: Iterable[Example]) -> dict[str, int]:
    """|D_n|, and how many of its examples are of improving trajectories and of others."""
    counts = Counter(improves(example.trajectory) for example in dataset)
    return {"size": counts.total(), "improving": counts[True], "non_decreasing": counts[False]}


def standard_errors(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Standard errors of the mean rewards r1 and r2, over questions: samples of one are not independent.

    Empty for a single question.
    """
    groups = _by_question(trajectories)
    r1, r2 = ([fmean(t.reward(turn) for t in group) for group in groups] for turn in (1, 2))
    return {"r1_se": standard_error(r1), "r2_se": standard_error(r2)} if len(groups) > 1 else {}


def correction_metrics(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Whether corrections are better than the answers that they correct, and how much they change them.

    Returns:
        ``delta``: r(Y2) - r(Y1), the accuracy gained by a second look (SCoRe's delta(t1, t2), Kumar et al.,
        2024). ``delta_se`` and ``delta_p``: its standard error, and the two-sided p of a paired sign-flip
        test, both over questions. ``repeated``: the share of corrections with the same words as the answer
        before. ``edited``: how far the others are from it, from 0 to 1: the share of the words of both that
        the longest common blocks leave out. What cannot be computed is left out: the error for a single
        question, the last two without corrections or without changes.
    """
    groups = _by_question(trajectories)
    differences = [fmean(t.reward(2) - t.reward(1) for t in group) for group in groups]
    metrics = {"delta": fmean(differences), "delta_p": paired_test(differences).p}
    if len(groups) > 1:
        metrics["delta_se"] = standard_error(differences)
    corrections = [t for group in groups for t in group if t.turn > 1]
    if corrections:
        metrics["repeated"] = fmean(t.repeats for t in corrections)
    if edits := [_edit(t) for t in corrections if not t.repeats]:
        metrics["edited"] = fmean(edits)
    return metrics


def _edit(trajectory: Trajectory) -> float:
    words = (trajectory.after(turn).text.split() for turn in (1, 2))
    return 1 - SequenceMatcher(None, *words, autojunk=False).ratio()


def why_empty(trajectories: Iterable[Trajectory], threshold: float) -> str:
    """What there was to select from, where nothing was selected: a clause with counts."""
    initial, corrections, changed, improving = {}, 0, 0, 0
    for trajectory in trajectories:
        initial[trajectory.question.id, trajectory.path[:1]] = trajectory.reward(1) >= threshold
        if trajectory.turn > 1:
            corrections += 1
            changed += not trajectory.repeats
            improving += trajectory.reward(2) > trajectory.reward(1)
    return (
        f"{sum(initial.values())} of {len(initial)} initial answers were right, {changed} of {corrections} "
        f"corrections changed their answer, {improving} improved it"
    )


def sample_metrics(
    trajectories: Iterable[Trajectory], threshold: float, answer: FinalAnswer, marker: str | None
) -> dict[str, float]:
    """What the k samples of a question achieve together, as means over questions, for both turns.

    ``pass_r1`` and ``pass_r2``: whether at least one of the k is right (pass@k). ``majority_r1`` and
    ``majority_r2``: the reward of the answer that most samples give.
    """

    def vote(completion: str) -> tuple[str, ...]:
        """The words of the answer, or of the whole completion where there is none."""
        found = answer.find(completion)
        return tuple(normalize((after_marker(found, marker) if marker else "") or found or completion))

    questions = _by_question(trajectories)
    metrics: dict[str, float] = {"k": len(questions[0])}
    for turn in (1, 2):
        samples = [[t.after(turn) for t in group] for group in questions]
        passed = (any(sample.reward >= threshold for sample in of_one) for of_one in samples)
        metrics[f"pass_r{turn}"] = fmean(passed)
        metrics[f"majority_r{turn}"] = fmean(_majority(of_one, vote) for of_one in samples)
    return metrics


def _by_question(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    return [list(group) for _, group in groupby(trajectories, key=lambda t: t.question.id)]


def _majority(samples: Sequence[Answer], vote: Callable[[str], tuple[str, ...]]) -> float:
    """The reward of the most frequent vote; of the first drawn among equals."""
    votes = [vote(sample.text) for sample in samples]
    winner, _ = Counter(votes).most_common(1)[0]
    return samples[votes.index(winner)].reward
