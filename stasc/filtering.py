"""Step 3 of Algorithm 1: which corrections are worth learning from."""

from __future__ import annotations

from collections.abc import Iterable

from stasc.algorithm import Algorithm
from stasc.trajectory import Trajectory


def improves(trajectory: Trajectory) -> bool:
    """Whether a trajectory is in D+: the correction earns more than the initial answer."""
    return trajectory.r2 > trajectory.r1


def stays_right(trajectory: Trajectory, threshold: float) -> bool:
    """Whether a trajectory is in D=: the correction keeps the reward of an answer that was right."""
    return trajectory.r2 == trajectory.r1 >= threshold


def select(trajectories: Iterable[Trajectory], algorithm: Algorithm) -> list[Trajectory]:
    """D_n: D+ under the Improving filter, D+ and D= under the Non-Decreasing one; the order is kept."""
    return [
        trajectory
        for trajectory in trajectories
        if improves(trajectory)
        or (not algorithm.improving_filter and stays_right(trajectory, algorithm.threshold))
    ]
