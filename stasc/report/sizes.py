"""Whether a larger D_n brings less: gains of iterations against sizes of D_n, and their correlation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from stasc.report.runs import RunResult
from stasc.report.statistics import FEWEST_RUNS, Correlation, correlation
from stasc.report.systems import Panel, System
from stasc.report.table import UNKNOWN, Cell, Table, interval, number


def gains(run: RunResult) -> list[tuple[float, float]]:
    """(|D_n|, r(Y2) of M_n less that of M_{n-1}) for each iteration n where all three are known."""
    return [
        (now.size, now.r2 - before.r2)
        for before, now in pairwise(run.points)
        if None not in (now.size, now.r2, before.r2)
    ]


def correlation_of(systems: Sequence[System]) -> Correlation | None:
    """Of |D_n| with the gain, over all iterations of all runs."""
    return correlation([gains(run) for system in systems for run in system.runs])


def correlation_table(panels: Sequence[Panel]) -> Table:
    """The correlation of |D_n| with the gain for kinds of variants, and without each variant in turn."""
    groups, records = [], []
    for panel in panels:
        rows = []
        for kind, systems in _kinds(panel).items():
            found = correlation_of(systems)
            if found is None:
                continue
            without = {
                left_out.algorithm: correlation_of([system for system in systems if system is not left_out])
                for left_out in systems
            }
            without = {variant: other for variant, other in without.items() if other}
            others = [f"{variant}: {number(other.r, '.2f')}" for variant, other in without.items()]
            rows.append(
                [
                    Cell(kind, ", ".join(system.algorithm for system in systems)),
                    Cell(str(found.runs)),
                    Cell(str(found.points)),
                    Cell(number(found.r, ".2f")),
                    Cell(interval(found, ".2f") or UNKNOWN),
                    Cell("", "\n".join(others)),
                ]
            )
            records += [
                {
                    "panel": panel.title,
                    "variants": kind,
                    "left_out": left_out,
                    "runs": one.runs,
                    "points": one.points,
                    "r": one.r,
                    "r_low": one.low,
                    "r_high": one.high,
                }
                for left_out, one in (("", found), *without.items())
            ]
        if rows:
            groups.append((panel.title, rows))
    note = (
        "Pearson's r of |Dₙ| with r(Y2) of Mₙ less that of Mₙ₋₁, over the iterations of all runs, and "
        "without each variant in turn. Interval: 95 %, bootstrap over whole runs, for the iterations of a "
        f"run are not independent; none with fewer than {FEWEST_RUNS} runs, and too narrow with few."
    )
    columns = ("Variants", "Runs", "Points", "r", "95 % interval", "r without")
    return Table("correlation", "Correlation of |Dₙ| with the gain", note, columns, groups, records)


def _kinds(panel: Panel) -> dict[str, list[System]]:
    """All variants of a panel, and by where they are fine-tuned from if there are both."""
    variants = [system for system in panel.systems if system.variant]
    kinds = {
        f"{word} fine-tuning": [system for system in variants if system.variant[2] == letter]
        for letter, word in (("E", "evolving"), ("F", "fixed"))
    }
    return {"all variants": variants} | (kinds if all(kinds.values()) else {})
