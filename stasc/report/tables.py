"""What is behind the rewards: corrections, cost, settings, runs, curves and sizes of D_n."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import pandas as pd

from stasc.report.rewards import TURNS, spread
from stasc.report.runs import RunResult
from stasc.report.systems import Panel, System
from stasc.report.table import UNKNOWN, Column, Row, Table, interval, number, to_frame
from stasc.run import Run
from stasc.statistics import FEWEST_RUNS, FEWEST_SEEDS, correlation, standard_error
from stasc.texts import printable
from stasc.trajectory import TRANSITIONS

_LONGEST_VALUE = 100


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
            record |= spread(name, [further[name] for further in finals])
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
