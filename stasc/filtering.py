"""Step 3 of Algorithm 1: which corrections are worth learning from, and which answer each is paired with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import groupby

from stasc.trajectory import Trajectory


def improves(trajectory: Trajectory) -> bool:
    """Whether a trajectory is in D+: its last answer is a correction with a higher reward."""
    turn = trajectory.turn
    return turn > 1 and trajectory.reward(turn) > trajectory.reward(turn - 1)


def stays_right(trajectory: Trajectory, threshold: float) -> bool:
    """Whether a trajectory is in D=: its last answer is a correction of a right one, and as good."""
    turn = trajectory.turn
    return turn > 1 and trajectory.reward(turn) == trajectory.reward(turn - 1) >= threshold


def pair_all(trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """Every initial answer of a question with every correction of that question, whichever it was made for.

    The paper pairs a correction with the answer it was made for; its release pairs them all. The number of a
    correction is then counted within the question. The trajectories of a question must be adjacent.
    """
    for _, group in groupby(trajectories, key=lambda trajectory: trajectory.question.id):
        members = list(group)
        initial_answers = {trajectory.answers[0].number: trajectory.answers[0] for trajectory in members}
        for initial in initial_answers.values():
            for k, member in enumerate(members):
                correction = dataclasses.replace(member.answers[1], number=k)
                yield Trajectory(member.question, (initial, correction))
