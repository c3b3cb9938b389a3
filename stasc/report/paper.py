"""The paper's curves, from a CSV file, in the form of runs."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

from stasc.errors import UserError
from stasc.report.runs import Point, RunResult, printable
from stasc.report.systems import CLASS, SIZES, VARIANT

_COLUMNS = ("model", "variant", "N_init", "N_corr", "iteration", "init_test", "corr_test", "n_filtered")


def read_paper(path: Path) -> list[RunResult]:
    """One run for each model, variant, N_init and N_corr of a file; an empty field stays unknown.

    The file's columns are model, variant, N_init, N_corr, iteration, init_test, corr_test and n_filtered;
    others are ignored. A row's ``n_filtered`` counts what is kept of the draws of M_n, that is |D_{n+1}|.

    Raises:
        UserError: The file cannot be read, or lacks a column, a number or an iteration.
    """
    curves: dict[tuple[str, str, int, int], dict[int, dict[str, float | None]]] = defaultdict(dict)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
                raise UserError(f"{path} has no column {missing[0]}: it needs {', '.join(_COLUMNS)}.")
            for row in rows:
                try:
                    key = (row["model"], row["variant"], int(row["N_init"]), int(row["N_corr"]))
                    values = {name: _known(row[name]) for name in ("init_test", "corr_test", "n_filtered")}
                    curves[key][int(row["iteration"])] = values
                except (TypeError, ValueError) as error:
                    raise UserError(f"{path}, line {rows.line_num}: {error}.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    longest: dict[str, int] = defaultdict(int)
    for (model, *_), curve in curves.items():
        longest[model] = max(longest[model], *curve)
    return [_run(path, key, curve, longest[key[0]]) for key, curve in curves.items()]


def _run(
    path: Path, key: tuple[str, str, int, int], curve: dict[int, dict[str, float | None]], planned: int
) -> RunResult:
    model, variant, n_init, n_corr = key
    if sorted(curve) != list(range(len(curve))):
        raise UserError(
            f"{path}: the iterations of {model} {variant} ({n_init}, {n_corr}) are not 0, 1, 2, ..."
        )
    points = tuple(
        Point(
            r1=curve[n]["init_test"],
            r2=curve[n]["corr_test"],
            size=curve[n - 1]["n_filtered"] if n else None,
        )
        for n in range(len(curve))
    )
    options = {CLASS: "STaSC", VARIANT: variant, SIZES[0]: n_init, SIZES[1]: n_corr, "model.base": model}
    return RunResult(printable(f"{model} {variant} ({n_init}, {n_corr})"), None, options, planned, points)


def _known(field: str) -> float | None:
    value = float(field) if field.strip() else math.nan
    return None if math.isnan(value) else value
