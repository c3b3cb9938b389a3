"""The tables of a report: the paper's two, and what is behind them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any
from urllib.parse import quote

import pandas as pd

from stasc.report.runs import RunResult
from stasc.report.systems import Panel, System, compared, grid
from stasc.report.table import UNKNOWN, Column, Row, Table, interval, number, to_frame
from stasc.run import Run
from stasc.statistics import (
    FEWEST_RUNS,
    FEWEST_SEEDS,
    Paired,
    correlation,
    holm,
    over_seeds,
    paired_test,
    standard_error,
)
from stasc.texts import printable
from stasc.trajectory import TRANSITIONS

TURNS = {"r1": "r(Y1)", "r2": "r(Y2)"}
_LONGEST_VALUE = 100
_DIFFERENCE_INTERVAL = partial(interval, name="difference", form="+.3f")

# ---------------------------------------------------------------- Tables 1 and 2


def summarize(systems: Sequence[System]) -> pd.DataFrame:
    """What Tables 1 and 2 say of each system, over its counted runs; the index is the systems' names."""
    frame = to_frame(map(_summary, systems))
    frame.index = pd.Index([system.name for system in systems])
    return frame


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
        record |= _spread(f"max_{turn}", [curve.get(n) for n, curve in zip(best, curves, strict=True)])
        deviations = [pstdev(curve.values()) for curve in curves] if known else None
        record[f"max_{turn}_deviation"] = fmean(deviations) if deviations else None
        record[f"max_{turn}_iterations"] = _iterations(best)
        record |= _spread(f"final_{turn}", [curve[system.final] for curve in curves])
    chosen = [run.chosen for run in system.counted]
    rewards = [None if n is None else run.points[n].r2 for run, n in zip(system.counted, chosen, strict=True)]
    record |= _spread("chosen_r2", rewards) | {"chosen_r2_iterations": _iterations(chosen)}
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


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """The mean of one value per seed and its interval, as three columns."""
    found = over_seeds(values)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


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


# ---------------------------------------------------------------- pairs of systems


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


# ---------------------------------------------------------------- what is behind them


def corrections_table(systems: Sequence[System]) -> Table:
    """What the corrections of the final model do to its first answers, beside those of M_0."""
    records = []
    for system in systems:
        if system.paper:
            continue
        record: dict[str, Any] = {"bench": system.bench, "system": system.name}
        for prefix, n in (("", system.final), ("m0_", 0)):
            points = [run.points[n] for run in system.counted]
            counts = [sum(point.transitions.values()) for point in points]
            values: dict[str, list[float | None]] = {
                name: [point.transitions[name] / count for point, count in zip(points, counts, strict=True)]
                for name in TRANSITIONS
            }
            values |= {name: [getattr(point, name) for point in points] for name in ("repeated", "edited")}
            for name, of_runs in values.items():
                known = [value for value in of_runs if value is not None]
                record[f"{prefix}{name}"] = fmean(known) if known else None
        records.append(record)

    def share(name: str, title: str, form: str = ".1%") -> Column:
        shown = partial(_number, name=name, form=form)
        return Column(title, name, shown, lambda row: f"M₀ {_number(row, f'm0_{name}', form)}")

    note = (
        "Of the final iteration, on the test questions; means over seeds, and below them those of M₀. Shares "
        "of all answers that were wrong and became right, and so on; of corrections that repeat the answer "
        "word by word; and of the words that the others change, where there are others."
    )
    columns = (
        Column("System", "system"),
        *(share(name, name.replace("_to_", " > ")) for name in TRANSITIONS),
        share("repeated", "repeated"),
        share("edited", "edited", ".2f"),
    )
    title = "What corrections change"
    return Table("corrections", title, note, to_frame(records), columns)


def cost_table(systems: Sequence[System]) -> Table:
    """What the training of the systems took."""
    records = []
    for system in systems:
        runs = [run for run in system.counted if run.last]
        if system.paper or not runs:
            continue
        record: dict[str, Any] = {"bench": system.bench, "system": system.name, "iterations": system.final}
        for name in ("answers", "tokens", "steps"):
            known = [[point.work.get(name) for point in run.points[1:]] for run in runs]
            record[name] = None if any(None in of_run for of_run in known) else fmean(map(sum, known))
        record["learnt"] = fmean(sum(point.size for point in run.points[1:]) for run in runs)
        hours = [run.hours for run in runs]
        record["hours"] = None if None in hours else fmean(hours)
        records.append(record)
    note = (
        "Of a whole run, as means over seeds. Answers and tokens: sampled from the training questions. "
        "Learnt: trajectories, those of every iteration. Hours: of all processes together, with evaluation "
        "and the engine's start, up to the last iteration of each start; compare them on like machines only."
    )
    columns = (
        Column("System", "system"),
        Column("Answers", "answers", ",.0f"),
        Column("Tokens", "tokens", ",.0f"),
        Column("Learnt", "learnt", ",.0f"),
        Column("Optimiser steps", "steps", ",.0f"),
        Column("Hours", "hours", ".3g"),
    )
    return Table("cost", "What training took", note, to_frame(records), columns)


def _number(row: Row, name: str, form: str) -> str:
    return number(row[name], form)


def further_table(systems: Sequence[System]) -> Table:
    """Greedy rewards, several samples and several rounds, where runs have them."""
    records = []
    for system in systems:
        finals = [run.points[system.final].further for run in system.counted]
        record = {"system": system.name}
        for name in sorted(set.intersection(*map(set, finals))):
            record |= _spread(name, [further[name] for further in finals])
        if len(record) > 1:
            records.append(record)
    note = (
        f"Of the final iteration: means over seeds, 95 % intervals from {FEWEST_SEEDS} seeds on. greedy: "
        "one answer at temperature 0; pass@k: whether one of k samples is right; majority: the answer that "
        "most samples give; r(Y3) and on: further rounds of correction."
    )
    frame = to_frame(records)
    names = sorted(name.removesuffix("_low") for name in frame if name.endswith("_low"))
    columns = (Column("System", "system"), *map(_further_column, names))
    return Table("further", "Other ways to answer", note, frame, columns)


def _further_column(name: str) -> Column:
    if name == "samples.k":
        return Column("k", name, "g")
    kind, metric = name.split(".")
    how, _, turn = metric.rpartition("_")
    how = {"": kind.removesuffix("s"), "pass": "pass@k"}.get(how, how)
    return Column(f"{how} r(Y{turn[1:]})", name, ".3f", partial(interval, name=name))


def settings_table(systems: Sequence[System]) -> Table:
    """The options whose values differ between systems, and which system has which."""
    ours = [system for system in systems if not system.paper]
    records = []
    for option in sorted({name for system in ours for name in system.options}):
        having: dict[str, list[str]] = {}
        for system in ours:
            value = json.dumps(system.options[option], ensure_ascii=False) if option in system.options else ""
            having.setdefault(value, []).append(system.name)
        if len(having) > 1:
            name = option.replace(".init_args", "").removesuffix(".class_path")
            records += [
                {
                    "option": name,
                    "number": number,
                    "value": printable(value) or None,
                    "systems": "; ".join(names),
                }
                for number, (value, names) in enumerate(having.items(), start=1)
            ]

    def shown(row: Row) -> str:
        value = number(row["value"])
        return value if len(value) <= _LONGEST_VALUE else f"no. {row['number']}"

    columns = (Column("Value", "value", shown), Column("Systems", "systems"))
    note = (
        "Options that are not the same in all systems; a variant's letters are in its name. Values that are "
        "too long for the table are numbered; settings.csv has them in full."
    )
    return Table("settings", "Settings that differ", note, to_frame(records), columns, ("option",))


def runs_table(systems: Sequence[System], out: Path) -> Table:
    """Every run, finished or not, with a link from the report in ``out`` to its config."""
    records = []
    for system in systems:
        for run in system.runs if not system.paper else ():
            point = next(point for point in reversed(run.points) if point.rewards)
            errors = [standard_error([pair[turn] for pair in point.rewards.values()]) for turn in (0, 1)]
            records.append(
                {
                    "run": run.name,
                    "system": system.name,
                    "seed": run.record.seed,
                    "last_iteration": run.last,
                    "iterations": system.record.iterations,
                    "test_questions": len(point.rewards),
                    "r1": point.r1,
                    "r1_se": errors[0],
                    "r2": point.r2,
                    "r2_se": errors[1],
                    "config": _config(run, out),
                }
            )

    def iterations(row: Row) -> str:
        return f"{row['last_iteration']} of {row['iterations']}"

    def unfinished(row: Row) -> str:
        return "unfinished" if row["last_iteration"] < row["iterations"] else ""

    def error(row: Row, name: str) -> str:
        return "" if pd.isna(row[name]) else f"SE {row[name]:.3f}"

    columns = (
        Column("Run", "run"),
        Column("System", "system"),
        Column("Seed", "seed"),
        Column("Iterations", "last_iteration", iterations, unfinished),
        Column("Test questions", "test_questions"),
        *(Column(turn, r, ".3f", partial(error, name=f"{r}_se")) for r, turn in TURNS.items()),
        Column(
            "Config",
            "config",
            lambda row: number(row["config"]).rpartition("/")[2],
            link=lambda row: "" if pd.isna(row["config"]) else quote(row["config"]),
        ),
    )
    note = "The last tested iteration of each run. SE: standard error over test questions."
    return Table("runs", "Runs", note, to_frame(records), columns)


def _config(run: RunResult, out: Path) -> str | None:
    """Where the run's config lies, as seen from the report; None where it was removed."""
    config = Run(run.folder).config
    return Path(os.path.relpath(config, out.resolve())).as_posix() if config.is_file() else None


def curves_table(systems: Sequence[System]) -> Table:
    """r(Y1), r(Y2) and |D_n| over iterations, means over seeds; its CSV has every run."""
    frame = pd.concat({system.name: system.curves for system in systems}).convert_dtypes()
    titles = TURNS | {"dataset_size": "|Dₙ|"}
    long = frame.assign(name=frame.index.get_level_values(0)).rename(columns=titles)
    long = long.melt(["name", "iteration"], list(titles.values()), "metric")
    means = long.pivot_table("value", ["metric", "name"], "iteration", sort=False).dropna(how="all")

    def mean(row: Row, n: int) -> str:
        return number(row[n], ".0f" if row["metric"] == titles["dataset_size"] else ".3f")

    iterations = [Column(f"n = {n}", n, partial(mean, n=n)) for n in sorted(means.columns)]
    note = "Means over the seeds that have the iteration."
    columns = (Column("System", "name"), *iterations)
    return Table("curves", "All curves", note, frame, columns, ("metric",), means.reset_index())


# ---------------------------------------------------------------- |D_n| and gain


def correlation_table(panels: Sequence[Panel]) -> Table:
    """The correlation of |D_n| with the gain for kinds of variants, and without each variant in turn."""
    frame = to_frame(record for panel in panels for record in _correlations(panel))

    def without(row: Row) -> str:
        others = frame[(frame["panel"] == row["panel"]) & (frame["variants"] == row["variants"])]
        others = others.dropna(subset="left_out").to_dict("records")
        return "\n".join(f"{other['left_out']}: {number(other['r'], '.2f')}" for other in others)

    note = (
        "Pearson's r of |Dₙ| with r(Y2) of Mₙ less that of Mₙ₋₁, over the iterations of all runs, and "
        "without each variant in turn. Interval: 95 %, bootstrap over whole runs, for the iterations of a "
        f"run are not independent; none with fewer than {FEWEST_RUNS} runs, and too narrow with few."
    )
    columns = (
        Column("Variants", "variants", detail=lambda row: row["systems"]),
        Column("Runs", "runs"),
        Column("Points", "points"),
        Column("r", "r", ".2f"),
        Column("95 % interval", "r_low", lambda row: interval(row, "r", ".2f") or UNKNOWN),
        Column("r without", "left_out", lambda row: "", without),
    )
    shown = frame if frame.empty else frame[frame["left_out"].isna()]
    title = "Correlation of |Dₙ| with the gain"
    return Table("correlation", title, note, frame, columns, ("panel",), shown)


def _correlations(panel: Panel) -> Iterator[dict[str, Any]]:
    """Those of all variants, and of those with one kind of fine-tuning if there are both."""
    variants = [system for system in panel.systems if system.variant]
    evolving, fixed = ([system for system in variants if system.variant[2] == letter] for letter in "EF")
    kinds = {"all variants": variants}
    if evolving and fixed:
        kinds |= {"evolving fine-tuning": evolving, "fixed fine-tuning": fixed}
    for kind, systems in kinds.items():
        for left_out in (None, *systems):
            kept = [system for system in systems if system is not left_out]
            if found := correlation([run.gains for system in kept for run in system.runs]):
                yield {
                    "panel": panel.title,
                    "variants": kind,
                    "systems": ", ".join(system.algorithm for system in kept),
                    "left_out": left_out and left_out.algorithm,
                    **found._asdict(),
                }
