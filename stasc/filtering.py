"""Step 3 of Algorithm 1: which corrections are worth learning from, and of which answer they are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import groupby

from stasc.trajectory import Trajectory


def improves(trajectory: Trajectory) -> bool:
    """Whether a trajectory is in D+: the correction earns more than the initial answer."""
    return trajectory.r2 > trajectory.r1


def stays_right(trajectory: Trajectory, threshold: float) -> bool:
    """Whether a trajectory is in D=: the correction keeps the reward of an answer that was right."""
    return trajectory.r2 == trajectory.r1 >= threshold


def pair_all(trajectories: Iterable[Trajectory]) -> Iterator[Trajectory]:
    """Every initial answer of a question with every correction of that question, whichever it was made for.

    The paper writes a correction of an answer; its release pairs them all. ``k`` is then the number of the
    correction within the question. The trajectories of a question must stand together.
    """
    for _, group in groupby(trajectories, key=lambda trajectory: trajectory.question.id):
        own = list(group)
        answers = {trajectory.j: trajectory for trajectory in own}
        for answer in answers.values():
            for k, corrected in enumerate(own):
                yield dataclasses.replace(answer, k=k, correction=corrected.correction, r2=corrected.r2)
