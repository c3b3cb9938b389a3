"""The tables of a report: the paper's two, and what stands behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from stasc.report.runs import TRANSITIONS, RunResult, mean_curve
from stasc.report.statistics import (
    Estimate,
    Maximum,
    Paired,
    holm,
    maximum,
    over_seeds,
    paired_test,
    standard_error,
)
from stasc.report.systems import System, compared, grid
from stasc.report.table import UNKNOWN, Cell, Table, interval, number

TURNS = {"r1": "r(Y1)", "r2": "r(Y2)"}


@dataclass(frozen=True)
class Best:
    """The maximum over iterations of each seed, summarised over seeds."""

    estimate: Estimate
    deviation: float
    iterations: tuple[int, ...]


class Summary:
    """What Tables 1 and 2 say of a system, over its counted runs; None where it is unknown."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.base = {turn: estimate(system.counted, turn, 0) for turn in TURNS}
        self.best = {turn: _best(system, turn) for turn in TURNS}
        self.final = {turn: estimate(system.counted, turn, system.final) for turn in TURNS}
        self.against_base = _against_base(system)


def estimate(runs: Sequence[RunResult], turn: str, n: int) -> Estimate | None:
    """Of ``r1`` or ``r2`` in iteration ``n``; None where a run's is unknown."""
    values = [getattr(run.points[n], turn) for run in runs]
    return None if None in values else over_seeds(values)


def _best(system: System, turn: str) -> Best | None:
    maxima: list[Maximum | None] = [
        maximum([getattr(point, turn) for point in run.points[: system.final + 1]]) for run in system.counted
    ]
    if None in maxima:
        return None
    return Best(
        over_seeds([one.value for one in maxima]),
        fmean(one.deviation for one in maxima),
        tuple(sorted({one.iteration for one in maxima})),
    )


def _rewards(runs: Sequence[RunResult], n: int) -> dict[str, float]:
    """For each test question the mean of r(y2) over runs and samples."""
    return {
        key: fmean(run.points[n].rewards[key][1] for run in runs) for key in sorted(runs[0].points[n].rewards)
    }


def _differences(ours: dict[str, float], theirs: dict[str, float]) -> list[float]:
    return [ours[key] - theirs[key] for key in ours]


def _against_base(system: System) -> Paired | None:
    if system.paper or system.final == 0:
        return None
    runs = system.counted
    return paired_test(_differences(_rewards(runs, system.final), _rewards(runs, 0)))


# ---------------------------------------------------------------- Tables 1 and 2

_COLUMNS = (
    *("System", "Seeds", "M₀ r(Y2)", "max r(Y1)", "max r(Y2)", "final r(Y1)", "final r(Y2)"),
    *("final r(Y2) less M₀", "p"),
)
_NOTE = (
    "max: the highest of iterations 0 to N, so it may be that of M₀; ± is the population standard "
    "deviation over the iterations of a run, as in the paper, and n the iteration of the maximum. final: "
    "the last iteration. [ ]: 95 % intervals, over seeds (t) and, for the difference, over test questions "
    "(bootstrap); a single seed has none. Bold: best of its group. p: paired sign-flip test of r(y2) "
    "against M₀ of the same runs, over so many test questions (qu.)."
)


def table1(systems: Sequence[System]) -> Table:
    """Rewards by N_init and N_corr."""
    families = [(f"{family[0].bench}, {family[0].algorithm}", family) for family in grid(systems)]
    return _rewards_table("table1", "Table 1: numbers of initial answers and of corrections", families)


def table2(systems: Sequence[System]) -> Table:
    """Rewards by variant."""
    shown = compared(systems)
    benches = {
        bench: [s for s in shown if s.bench == bench] for bench in dict.fromkeys(s.bench for s in shown)
    }
    return _rewards_table("table2", "Table 2: variants", list(benches.items()))


def _rewards_table(name: str, title: str, groups: Sequence[tuple[str, Sequence[System]]]) -> Table:
    summaries = [(heading, [Summary(system) for system in group]) for heading, group in groups]
    tested = [s for _, group in summaries for s in group if s.against_base]
    adjusted = dict(zip(map(id, tested), holm([s.against_base.p for s in tested]), strict=True))
    records = [_summary_record(s, adjusted.get(id(s))) for _, group in summaries for s in group]
    return Table(name, title, _NOTE, _COLUMNS, [(h, _summary_rows(g)) for h, g in summaries], records)


def _summary_rows(summaries: Sequence[Summary]) -> list[list[Cell]]:
    def top(value: Callable[[Summary], Estimate | None]) -> float | None:
        fair = [s for s in summaries if not s.system.uses_references]
        means = [round(found.mean, 3) for s in fair if (found := value(s))]
        return max(means) if len(means) > 1 else None

    tops = {
        turn: (top(lambda s, t=turn: s.best[t] and s.best[t].estimate), top(lambda s, t=turn: s.final[t]))
        for turn in TURNS
    }
    return [
        [
            Cell(s.system.label, _choices(s.system)),
            Cell(_seeds(s.system), _progress(s.system)),
            Cell(number(s.base["r2"] and s.base["r2"].mean)),
            *(_best_cell(s.best[turn], tops[turn][0]) for turn in TURNS),
            *(_mean_cell(s.final[turn], tops[turn][1]) for turn in TURNS),
            *(_difference_cells(s.against_base) if s.against_base else [_gain_cell(s), Cell(UNKNOWN)]),
        ]
        for s in summaries
    ]


def _choices(system: System) -> str:
    if not system.variant:
        return ""
    where = {"E": "Mₙ₋₁", "F": "M₀"}
    first, middle, last = system.variant
    kept = {"I": "improving", "N": "non-decreasing"}[middle]
    return f"answers {where[first]}, trains {where[last]}\n{kept} filter"


def _seeds(system: System) -> str:
    return "1" if system.paper else str(len(system.counted))


def _progress(system: System) -> str:
    planned = system.runs[0].planned
    if system.paper and system.final < planned:
        return f"known to n = {system.final} of {planned}"
    if not system.counted[0].finished:
        return f"unfinished: n = {system.final} of {planned}"
    unfinished = len(system.runs) - len(system.counted)
    return f"+ {unfinished} unfinished" if unfinished else ""


def _best_cell(best: Best | None, top: float | None) -> Cell:
    if best is None:
        return Cell(UNKNOWN)
    first, last = best.iterations[0], best.iterations[-1]
    at = f"n = {first}" if first == last else f"n = {first} to {last}"
    mean = best.estimate.mean
    details = "\n".join(filter(None, (at, interval(best.estimate))))
    return Cell(f"{mean:.3f} ± {best.deviation:.3f}", details, round(mean, 3) == top)


def _mean_cell(found: Estimate | None, top: float | None = None) -> Cell:
    if found is None:
        return Cell(UNKNOWN)
    return Cell(f"{found.mean:.3f}", interval(found), round(found.mean, 3) == top)


def _gain_cell(summary: Summary) -> Cell:
    """The paper's gain, which no test can be made of."""
    base, final = summary.base["r2"], summary.final["r2"]
    if base is None or final is None or summary.system.final == 0:
        return Cell(UNKNOWN)
    return Cell(number(final.mean - base.mean, "+.3f"))


def _difference_cells(paired: Paired) -> list[Cell]:
    return [
        Cell(number(paired.difference, "+.3f"), interval(paired, "+.3f")),
        Cell(_p(paired.p), f"{paired.questions:,} qu."),
    ]


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _summary_record(summary: Summary, p_holm: float | None) -> dict[str, Any]:
    system = summary.system
    n_init, n_corr = system.sizes
    record: dict[str, Any] = {
        "source": "paper" if system.paper else "runs",
        "bench": system.bench,
        "system": system.label,
        "n_init": n_init if system.variant else None,
        "n_corr": n_corr if system.variant else None,
        "seeds": len(system.counted),
        "unfinished": sum(not run.finished for run in system.runs),
        "iterations": system.runs[0].planned,
        "final_iteration": system.final,
    }
    for turn in TURNS:
        best = summary.best[turn]
        record[f"m0_{turn}"] = summary.base[turn] and summary.base[turn].mean
        record |= _spread(f"max_{turn}", best and best.estimate)
        record[f"max_{turn}_deviation"] = best and best.deviation
        record[f"max_{turn}_iterations"] = best and " ".join(map(str, best.iterations))
        record |= _spread(f"final_{turn}", summary.final[turn])
    return record | _paired_record(summary.against_base, p_holm)


def _spread(name: str, found: Estimate | None) -> dict[str, float | None]:
    return {
        name: found and found.mean,
        f"{name}_low": found and found.low,
        f"{name}_high": found and found.high,
    }


def _paired_record(paired: Paired | None, p_holm: float | None) -> dict[str, Any]:
    return {
        "difference": paired and paired.difference,
        "difference_low": paired and paired.low,
        "difference_high": paired and paired.high,
        "p": paired and paired.p,
        "p_holm": p_holm,
        "questions": paired and paired.questions,
    }


# ---------------------------------------------------------------- pairs of systems


def pairs_table(systems: Sequence[System]) -> Table:
    """Every two systems that can be paired, and a sentence on those that cannot."""
    found: list[tuple[System, System, int, Paired]] = []
    strangers = []
    for one, other in combinations([s for s in systems if not s.paper], 2):
        if one.test_set != other.test_set:
            continue
        seeds = [run.seed for run in one.counted if run.seed in {run.seed for run in other.counted}]
        if not seeds:
            strangers.append(f"{one.name} and {other.name}")
            continue
        rewards = (
            _rewards([run for run in system.counted if run.seed in seeds], system.final)
            for system in (one, other)
        )
        found.append((one, other, len(seeds), paired_test(_differences(*rewards))))
    adjusted = holm([paired.p for *_, paired in found])
    note = (
        "Final r(Y2) of the first less that of the second, paired by test question over the seeds that both "
        "have; interval and test as in Table 2. Holm: p adjusted for all pairs of this table."
    )
    if strangers:
        note += f" Not paired, for want of a common seed: {'; '.join(strangers)}."
    rows = [
        [
            Cell(f"{one.name} less {other.name}"),
            Cell(str(seeds)),
            *_difference_cells(paired),
            Cell(_p(p_holm)),
        ]
        for (one, other, seeds, paired), p_holm in zip(found, adjusted, strict=True)
    ]
    records = [
        {"system": one.name, "minus": other.name, "seeds": seeds} | _paired_record(paired, p_holm)
        for (one, other, seeds, paired), p_holm in zip(found, adjusted, strict=True)
    ]
    columns = ("Pair", "Seeds", "Difference", "p", "p (Holm)")
    return Table("pairs", "Pairs of systems", note, columns, [("", rows)], records)


def unlike_test_sets(systems: Sequence[System]) -> str:
    """A sentence on systems that were tested on other questions than others; empty if there are none."""
    groups: dict[Any, list[str]] = {}
    for system in systems:
        if not system.paper:
            groups.setdefault(system.test_set, []).append(system.name)
    if len(groups) < 2:
        return ""
    named = " | ".join(", ".join(names) for names in groups.values())
    return f"Systems are not paired across different test sets, of which there are {len(groups)}: {named}."


# ---------------------------------------------------------------- what stands behind


def further_table(systems: Sequence[System]) -> Table:
    """Greedy rewards, several samples and several rounds, where runs have them."""
    measured = {}
    for system in systems:
        shared = set.intersection(*(set(run.points[system.final].further) for run in system.counted))
        if shared:
            measured[system.name] = {
                key: over_seeds([run.points[system.final].further[key] for run in system.counted])
                for key in shared
            }
    keys = sorted({key for found in measured.values() for key in found})
    rows = [
        [Cell(name), *(_further_cell(key, found.get(key)) for key in keys)]
        for name, found in measured.items()
    ]
    records = [
        {"system": name} | {key: found[key].mean if key in found else None for key in keys}
        for name, found in measured.items()
    ]
    note = (
        "Of the final iteration, means over seeds with 95 % intervals. greedy: one answer at temperature "
        "0; pass@k: whether one of k samples is right; majority: the answer that most samples give; r(Y3) "
        "and on: further rounds of correction."
    )
    columns = ("System", *map(_further_title, keys))
    return Table("further", "Other ways to answer", note, columns, [("", rows)], records)


def _further_title(key: str) -> str:
    kind, _, name = key.partition(".")
    how, _, turn = name.rpartition("_")
    how = {"pass": "pass@k"}.get(how, how) if kind == "samples" else kind.replace("rounds", "round")
    return "k" if name == "k" else f"{how} r(Y{turn[1:]})"


def _further_cell(key: str, found: Estimate | None) -> Cell:
    return Cell(f"{found.mean:g}") if found and key == "samples.k" else _mean_cell(found)


def runs_table(systems: Sequence[System]) -> Table:
    """Every run, finished or not."""
    rows, records = [], []
    for system in systems:
        for run in system.runs if not system.paper else ():
            point = run.points[-1]
            errors = [standard_error([pair[turn] for pair in point.rewards.values()]) for turn in (0, 1)]
            done = f"{run.last} of {run.planned}"
            rows.append(
                [
                    Cell(run.name),
                    Cell(system.name),
                    Cell(str(run.seed)),
                    Cell(done, "" if run.finished else "unfinished"),
                    Cell(str(len(point.rewards))),
                    *(
                        Cell(f"{value:.3f}", "" if error is None else f"SE {error:.3f}")
                        for value, error in zip((point.r1, point.r2), errors, strict=True)
                    ),
                ]
            )
            records.append(
                {
                    "run": run.name,
                    "system": system.name,
                    "seed": run.seed,
                    "last_iteration": run.last,
                    "iterations": run.planned,
                    "test_questions": len(point.rewards),
                    "r1": point.r1,
                    "r1_se": errors[0],
                    "r2": point.r2,
                    "r2_se": errors[1],
                }
            )
    note = "The last evaluated iteration of each run. SE: standard error over test questions."
    columns = ("Run", "System", "Seed", "Iterations", "Test questions", "r(Y1)", "r(Y2)")
    return Table("runs", "Runs", note, columns, [("", rows)], records)


def curves_table(systems: Sequence[System]) -> Table:
    """r(Y1), r(Y2) and |D_n| over iterations, means over seeds; its CSV has every run."""
    titles = TURNS | {"size": "|Dₙ|"}
    last = max(run.last for system in systems for run in system.runs)
    groups = []
    for name, title in titles.items():
        rows = []
        for system in systems:
            curve = {n: fmean(values) for n, values in mean_curve(system.runs, name)}
            if curve:
                shown = (f"{curve[n]:.0f}" if name == "size" else f"{curve[n]:.3f}" for n in curve)
                by_n = dict(zip(curve, shown, strict=True))
                heading = f"{system.bench}: {system.label}" if system.paper else system.name
                rows.append([Cell(heading), *(Cell(by_n.get(n, UNKNOWN)) for n in range(last + 1))])
        groups.append((title, rows))
    records = [
        {
            "source": "paper" if system.paper else "runs",
            "bench": system.bench,
            "system": system.label,
            "run": run.name,
            "seed": run.seed,
            "iteration": n,
            "r1": point.r1,
            "r2": point.r2,
            "dataset_size": point.size,
        }
        | {key: point.transitions.get(key) for key in TRANSITIONS}
        for system in systems
        for run in system.runs
        for n, point in enumerate(run.points)
    ]
    note = "Means over the seeds that have the iteration."
    columns = ("System", *(f"n = {n}" for n in range(last + 1)))
    return Table("curves", "All curves", note, columns, groups, records)
