"""The rewards of systems: the paper's two tables, and tests of what differs between systems."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

import pandas as pd

from stasc.report.runs import RunResult
from stasc.report.systems import System, compared, grid
from stasc.report.table import UNKNOWN, Column, Row, Table, interval, number, to_frame
from stasc.statistics import FEWEST_SEEDS, Paired, holm, over_seeds, paired_test

TURNS = {"r1": "r(Y1)", "r2": "r(Y2)"}
_DIFFERENCE_INTERVAL = partial(interval, name="difference", form="+.3f")


def summarize(systems: Sequence[System]) -> pd.DataFrame:
    """What Tables 1 and 2 say of each system, over its counted runs; the index is the systems' names."""
    frame = to_frame(map(_summary, systems))
    frame.index = pd.Index([system.name for system in systems])
    return frame


def spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean of one value per seed and its interval, as three columns."""
    found = over_seeds(values)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _summary(system: System) -> dict[str, Any]:
    n_init, n_corr = system.sizes
    record: dict[str, Any] = {
        "source": "paper" if system.paper else "runs",
        "bench": system.bench,
        "system": system.label,
        "algorithm": system.algorithm,
        "uses_references": system.record.uses_references,
        "n_init": n_init if system.variant else None,
        "n_corr": n_corr if system.variant else None,
        "seeds": len(system.counted),
        "unfinished": sum(not run.finished for run in system.runs),
        "iterations": system.record.iterations,
        "final_iteration": system.final,
    }
    for turn in TURNS:
        # An iteration that was not tested is none to choose from; an unknown value of the paper's might be
        # the highest.
        curves = [
            {
                n: getattr(point, turn)
                for n, point in enumerate(run.points[: system.final + 1])
                if system.paper or point.rewards
            }
            for run in system.counted
        ]
        known = not any(None in curve.values() for curve in curves)
        best = [max(curve, key=curve.__getitem__) if known else None for curve in curves]
        record[f"m0_{turn}"] = over_seeds([curve[0] for curve in curves]).mean
        record |= spread(f"max_{turn}", [curve.get(n) for n, curve in zip(best, curves, strict=True)])
        deviations = [pstdev(curve.values()) for curve in curves] if known else None
        record[f"max_{turn}_deviation"] = fmean(deviations) if deviations else None
        record[f"max_{turn}_iterations"] = _iterations(best)
        record |= spread(f"final_{turn}", [curve[system.final] for curve in curves])
    chosen = [run.chosen for run in system.counted]
    rewards = [None if n is None else run.points[n].r2 for run, n in zip(system.counted, chosen, strict=True)]
    record |= spread("chosen_r2", rewards) | {"chosen_r2_iterations": _iterations(chosen)}
    record |= _delta(system)
    if system.paper or system.final == 0:
        return record | dict.fromkeys(Paired._fields)
    return record | _paired(system.counted, system.final, system.counted, 0)


def _delta(system: System) -> dict[str, float | None]:
    """r(Y2) less r(Y1) of the same model in the final iteration, tested over questions."""
    final = system.curves[system.curves["iteration"] == system.final]
    shown = {"delta": final["delta"].mean(), "repeated": final["repeated"].mean()}
    if system.paper:
        return shown | dict.fromkeys(("delta_low", "delta_high", "delta_p"))
    rewards = [run.points[system.final].rewards for run in system.counted]
    gains = [
        fmean(of_run[question][1] - of_run[question][0] for of_run in rewards)
        for question in sorted(rewards[0])
    ]
    test = paired_test(gains)._asdict()
    names = {"delta": "difference", "delta_low": "difference_low", "delta_high": "difference_high"}
    return shown | {name: test[key] for name, key in names.items()} | {"delta_p": test["p"]}


def _iterations(numbers: Sequence[int | None]) -> str | None:
    """The iterations of several runs, each once; None if one is unknown."""
    return None if None in numbers else " ".join(map(str, sorted(set(numbers))))


def _paired(runs: Sequence[RunResult], n: int, others: Sequence[RunResult], m: int) -> dict[str, Any]:
    """The paired test of r(y2) of M_n of some runs less that of M_m of others."""

    def means(runs: Sequence[RunResult], n: int) -> list[float]:
        ids = sorted(runs[0].points[n].rewards)
        return [fmean(run.points[n].rewards[question][1] for run in runs) for question in ids]

    pairs = zip(means(runs, n), means(others, m), strict=True)
    return paired_test([ours - theirs for ours, theirs in pairs])._asdict()


def _with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with p adjusted for all tests in it, beside p."""
    known = frame["p"].dropna()
    adjusted = pd.Series(holm(known.tolist()), known.index, dtype="Float64").reindex(frame.index)
    frame = frame.copy()
    frame.insert(frame.columns.get_loc("p") + 1, "p_holm", adjusted)
    return frame


def table1(systems: Sequence[System], summary: pd.DataFrame) -> Table:
    """Rewards by N_init and N_corr; ``summary`` is that of ``summarize``."""
    shown = [system for family in grid(systems) for system in family]
    title = "Table 1: numbers of initial answers and of corrections"
    return _rewards_table("table1", title, shown, summary, ("bench", "algorithm"))


def table2(systems: Sequence[System], summary: pd.DataFrame) -> Table:
    """Rewards by variant; ``summary`` is that of ``summarize``."""
    return _rewards_table("table2", "Table 2: variants", compared(systems), summary, ("bench",))


def _rewards_table(
    name: str, title: str, systems: Sequence[System], summary: pd.DataFrame, group_by: Sequence[str]
) -> Table:
    note = (
        "max: the highest of iterations 0 to N on the test questions, as in the paper: it may be that of M₀, "
        "and it is chosen on what it is measured on. ± is the population standard deviation over the "
        "iterations of a run, n the iteration. best by validation: the test reward of the iteration that is "
        "best on the validation questions. final: the last iteration. Δ: final r(Y2) less r(Y1) of the same "
        "model, whether a second look helps. [ ]: 95 % intervals, over seeds (t, from "
        f"{FEWEST_SEEDS} seeds on) and, for differences, over test questions (bootstrap). Bold: best of its "
        "group. p: paired sign-flip tests, of Δ and of r(y2) against M₀ of the same runs, over so many test "
        "questions (qu.)."
    )
    frame = _with_holm(summary.loc[[system.name for system in systems]])
    detail = partial(_best_detail, name="chosen_r2")
    chosen = Column("best by validation r(Y2)", "chosen_r2", ".3f", detail, bold=True)
    best, final = [], []
    for r, turn in TURNS.items():
        shown = partial(_best, name=f"max_{r}"), partial(_best_detail, name=f"max_{r}")
        best.append(Column(f"max {turn}", f"max_{r}", *shown, bold=True))
        shown = ".3f", partial(interval, name=f"final_{r}")
        final.append(Column(f"final {turn}", f"final_{r}", *shown, bold=True))
    columns = (
        Column("System", "system", detail=_choices),
        Column("Seeds", "seeds", detail=_progress),
        Column("M₀ r(Y2)", "m0_r2", ".3f"),
        *best,
        *final,
        *([chosen] if frame["chosen_r2"].notna().any() else []),
        Column("final Δ", "delta", "+.3f", _delta_detail),
        Column("final r(Y2) less M₀", "difference", _gain, _DIFFERENCE_INTERVAL),
        Column("p", "p", _p, _questions),
    )
    return Table(name, title, note, frame, columns, group_by)


def _choices(row: Row) -> str:
    """What the letters of a variant mean."""
    if pd.isna(row["n_init"]):
        return ""
    first, middle, last = row["algorithm"]
    models = {"E": "Mₙ₋₁", "F": "M₀"}
    kept = {"I": "improving", "N": "non-decreasing"}[middle]
    return f"answers {models[first]}, trains {models[last]}\n{kept} filter"


def _delta_detail(row: Row) -> str:
    """The interval of Delta and its p."""
    p = "" if pd.isna(row["delta_p"]) else f"p {_p(row, 'delta_p')}"
    return f"{interval(row, 'delta', '+.3f')}\n{p}".strip()


def _progress(row: Row) -> str:
    """How far the runs of a system got, unless all are finished."""
    final, iterations, unfinished = row["final_iteration"], row["iterations"], row["unfinished"]
    if final < iterations:
        known = "known to" if row["source"] == "paper" else "unfinished:"
        return f"{known} n = {final} of {iterations}"
    return f"+ {unfinished} unfinished" if unfinished else ""


def _best(row: Row, name: str) -> str:
    return UNKNOWN if pd.isna(row[name]) else f"{row[name]:.3f} ± {row[f'{name}_deviation']:.3f}"


def _best_detail(row: Row, name: str) -> str:
    if pd.isna(row[name]):
        return ""
    iterations = row[f"{name}_iterations"].split()
    at = f"n = {iterations[0]}" + (f" to {iterations[-1]}" if len(iterations) > 1 else "")
    return f"{at}\n{interval(row, name)}".strip()


def _gain(row: Row) -> str:
    """The difference that was tested; for the paper, which has no rewards by question, that of its means."""
    difference, final, base = row["difference"], row["final_r2"], row["m0_r2"]
    if row["source"] == "paper" and row["final_iteration"] > 0 and not (pd.isna(final) or pd.isna(base)):
        difference = final - base
    return number(difference, "+.3f")


def _p(row: Row, name: str = "p") -> str:
    return "< 0.001" if not pd.isna(row[name]) and row[name] < 0.001 else number(row[name], ".3f")


def _questions(row: Row) -> str:
    return "" if pd.isna(row["questions"]) else f"{row['questions']:,} qu."


def pairs_table(systems: Sequence[System]) -> Table:
    """Every two systems that can be paired, and a sentence on those that cannot."""
    records, unpaired = [], []
    for one, other in combinations([system for system in systems if not system.paper], 2):
        if one.test_set != other.test_set:
            continue
        seeds = {run.record.seed for run in one.counted} & {run.record.seed for run in other.counted}
        if not seeds:
            unpaired.append(f"{one.name} and {other.name}")
            continue
        runs, others = ([run for run in s.counted if run.record.seed in seeds] for s in (one, other))
        record = {"system": one.name, "minus": other.name, "seeds": len(seeds)}
        records.append(record | _paired(runs, one.final, others, other.final))
    note = (
        "Final r(Y2) of the first less that of the second, paired by test question over the seeds that both "
        "have; interval and test as in Table 2. Holm: p adjusted for all pairs of this table."
    )
    if unpaired:
        note += f" Not paired, for want of a common seed: {'; '.join(unpaired)}."
    columns = (
        Column("Pair", "system", lambda row: f"{row['system']} less {row['minus']}"),
        Column("Seeds", "seeds"),
        Column("Difference", "difference", "+.3f", _DIFFERENCE_INTERVAL),
        Column("p", "p", _p, _questions),
        Column("p (Holm)", "p_holm", partial(_p, name="p_holm")),
    )
    frame = _with_holm(to_frame(records)) if records else pd.DataFrame()
    return Table("pairs", "Pairs of systems", note, frame, columns)


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
