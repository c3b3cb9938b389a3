"""The paper's curves, from a CSV file, in the form of runs."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from stasc.errors import UserError
from stasc.report.runs import Point, RunResult
from stasc.report.systems import BASE, SIZES
from stasc.run import SystemRecord
from stasc.texts import printable

_CURVE = ["model", "variant", "N_init", "N_corr"]
_VALUES = ["init_test", "corr_test", "n_filtered"]
_BOUNDS = {"iteration": (0, math.inf), "init_test": (0, 1), "corr_test": (0, 1), "n_filtered": (0, math.inf)}
"""What numbers may be; those not listed are 1 or more."""


def read_paper(path: Path) -> list[RunResult]:
    """One run for each model, variant, N_init and N_corr of a file; an empty field stays unknown.

    The file's columns are model, variant, N_init, N_corr, iteration, init_test, corr_test and n_filtered;
    others are ignored. A row's ``n_filtered`` counts what is kept of the draws of M_n, that is |D_{n+1}|.

    Raises:
        UserError: The file cannot be read, has no rows or one twice, or lacks a column, a number or an
            iteration.
    """
    try:
        frame = pd.read_csv(path, dtype=str, skip_blank_lines=False, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split()).rstrip('.')}.") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path} has rows with more fields than its first line names: name them all.")
    frame = frame.replace("", None)
    frame = frame[frame.notna().any(axis=1)]  # without blank lines, and the others keep their numbers
    names = [*_CURVE, "iteration", *_VALUES]
    if missing := [name for name in names if name not in frame]:
        raise UserError(f"{path} has no column {missing[0]}: it needs {', '.join(names)}.")
    if frame.empty:
        raise UserError(f"{path} has no rows: leave --paper out, or give a file with curves.")
    for name in names:
        texts = frame[name]
        if name not in ("model", "variant"):
            frame[name] = numbers = pd.to_numeric(texts, errors="coerce")
            least, most = _BOUNDS.get(name, (1, math.inf))
            whole = name in ("init_test", "corr_test") or (numbers % 1 == 0)
            frame[name] = numbers.where(numbers.between(least, most) & (numbers < math.inf) & whole)
        for row, text in texts[frame[name].isna() & (texts.notna() | (name not in _VALUES))].items():
            given = "is missing" if pd.isna(text) else f"cannot be {text!r}"
            raise UserError(f"{path}, line {row + 2}: {name} {given}.")
    for row in frame.index[frame.duplicated([*_CURVE, "iteration"])]:
        raise UserError(
            f"{path}, line {row + 2}: this row's curve and iteration were there before: remove one."
        )
    # As many iterations were planned for a model as its longest curve has.
    planned = frame.groupby("model")["iteration"].max()
    runs = []
    for (model, variant, *sizes), curve in frame.groupby(_CURVE, sort=False):
        curve = curve.sort_values("iteration")
        name = f"{model} {variant} ({', '.join(map(str, map(int, sizes)))})"
        if curve["iteration"].tolist() != list(range(len(curve))):
            raise UserError(f"{path}: the iterations of {name} are not 0, 1, 2, ...")
        rewards = curve["init_test"], curve["corr_test"]
        values = zip(*rewards, curve["n_filtered"].shift(), strict=True)
        points = tuple(Point(*(None if pd.isna(value) else value for value in point)) for point in values)
        options = {BASE: model, **dict(zip(SIZES, map(int, sizes), strict=True))}
        record = SystemRecord(printable(variant), int(planned[model]), 1.0, False, 0, options)
        runs.append(RunResult(printable(name), record, points))
    return runs
