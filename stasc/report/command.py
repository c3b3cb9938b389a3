"""``python -m stasc report RUN...``: from run folders to a folder of tables, figures and a page."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pandas as pd

from stasc.errors import UserError
from stasc.report import figures, rewards, tables
from stasc.report.browser import embed, sampled
from stasc.report.figures import FigureGroup
from stasc.report.page import GENERATOR, Sections, page
from stasc.report.paper import read_paper
from stasc.report.runs import read_runs
from stasc.report.systems import System, group_runs, panels
from stasc.report.table import Table, markdown
from stasc.statistics import FEWEST_SEEDS, RESAMPLES, verdict

PAGE = "index.html"

METHOD = (
    "A system is all runs whose configurations differ in nothing but the seed, and in where and how they "
    "were carried out. Tables 1 and 2 are about its finished runs; if none is finished, about what all of "
    "them have reached.",
    "Intervals over seeds are t intervals of the mean of one value per run. They say how far another seed "
    f"may be. It takes {FEWEST_SEEDS} seeds: with two the interval would go 12.7 standard errors to each "
    "side.",
    "Paired tests: for each test question, the mean of r(y2) over the samples and seeds that both sides "
    f"have, and its difference. p is two-sided and comes from {RESAMPLES:,} random flips of the signs of "
    "these differences, which for rewards of 0 and 1 and one seed is McNemar's test; the interval is a "
    f"percentile bootstrap over questions, {RESAMPLES:,} resamples. Questions are paired by id, and only "
    "between runs with the very same test set. The test is of the final iteration: a maximum over "
    "iterations is chosen by looking at the test set. It says whether these models differ on questions "
    "like these, and nothing about other seeds.",
    "An answer is right if its reward is at least the run's threshold.",
    "All draws of this report have fixed seeds: the same runs give the same bytes.",
)
PAPER_METHOD = (
    "Curves marked paper are recomputed from the file given by --paper: one run each, without intervals or "
    "tests, and a maximum is given only if all iterations are known. The size of Dₙ is that file's "
    "n_filtered one row before, which counts what was kept of the draws of Mₙ₋₁. Where r(Y1) of a variant "
    "with Fixed initialisation is constant there, its initial answers on the test set were those of M₀; "
    "here each Mₙ answers for itself, unless a run sets algorithm.fixed_in_test."
)


class _Parser(ArgumentParser):
    """Reports mistakes in arguments as ``UserError``."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python -m stasc report --help).")


def main(arguments: Sequence[str]) -> None:
    """Write the report.

    Raises:
        UserError: An argument is wrong, or see ``report``.
    """
    parser = _Parser("python -m stasc report", description="Tables, figures and a page from run folders.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, or folder with runs in it"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("--paper", type=Path, metavar="FILE", help="CSV file of the paper's curves")
    parser.add_argument(
        "--trajectories",
        type=int,
        default=5,
        metavar="K",
        help="on the page for each run, iteration, split and transition, at most (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.out == Path():
        raise UserError("--out is empty, or this folder: name a folder for the report.")
    if options.trajectories < 0:
        raise UserError(f"--trajectories is {options.trajectories}: it must be 0 or more.")
    for line in report(options.runs, options.out, options.paper, options.trajectories):
        print(line)


def report(places: Sequence[Path], out: Path, paper: Path | None, at_most: int) -> list[str]:
    """Write the report.

    Args:
        places: Run folders, or folders that they lie under.
        out: The folder to write to: a new one, an empty one, or that of an earlier report.
        paper: CSV file of the paper's curves.
        at_most: Trajectories on the page for each run, iteration, split and transition.

    Returns:
        Lines to print: what was found, and where the report is.

    Raises:
        UserError: There is no run, a file cannot be read, or ``out`` holds something else.
    """
    _check_is_ours(out)
    runs, just_begun = read_runs(places)
    ours = group_runs(runs)
    systems = ours + (group_runs(read_paper(paper), paper=True) if paper else [])
    shown = panels(systems)
    trajectories = embed(ours, at_most)
    summary = rewards.summarize(systems)
    sections: Sections = {
        "Results": [
            rewards.table2(systems, summary),
            rewards.table1(systems, summary),
            rewards.pairs_table(systems),
            tables.corrections_table(systems),
            tables.cost_table(systems),
            tables.further_table(systems),
        ],
        "Curves": [
            figures.initialization(shown, "E"),
            figures.initialization(shown, "F"),
            figures.best_variants(shown),
            figures.deltas(shown),
        ],
        "What was learnt from": [
            figures.dataset_sizes(shown),
            figures.gains_of_sizes(shown),
            tables.correlation_table(shown),
        ],
        "Transitions": [figures.transitions(systems)],
        "Runs": [
            tables.settings_table(systems),
            tables.runs_table(systems, out),
            tables.curves_table(systems),
        ],
        "Method": [*METHOD, *([PAPER_METHOD] if paper else [])],
    }
    sections = {title: full for title, blocks in sections.items() if (full := list(filter(None, blocks)))}
    lead, notes, sample = _lead(ours, summary), _notes(ours, just_begun), sampled(trajectories, at_most)
    # The page first: should the rest fail, it shows that the folder is a report's.
    files: dict[str, str | bytes] = {PAGE: page(lead, notes, sections, trajectories, sample)}
    files["report.md"] = _markdown([*lead, *notes, f"{sample} (The page is {PAGE}.)"], sections)
    for block in (block for blocks in sections.values() for block in blocks):
        if isinstance(block, Table):
            files[f"{block.name}.csv"] = block.csv()
        elif isinstance(block, FigureGroup):
            for picture in block.pictures:
                files[f"figures/{picture.name}.svg"] = picture.svg
                files[f"figures/{picture.name}.png"] = picture.png
    _write(out, files)
    return [*lead, *notes, f"report  {out / PAGE}, {out / 'report.md'}, *.csv, figures/"]


def _lead(systems: Sequence[System], summary: pd.DataFrame) -> list[str]:
    """How many runs there are, and which system is the best of each bench."""
    runs = sum(len(system.runs) for system in systems)
    lead = [f"{_count(runs, 'run')} of {_count(len(systems), 'system')}."]
    fair = summary[(summary["source"] == "runs") & ~summary["uses_references"]]
    for bench, rows in fair.groupby("bench", sort=False):
        best = rows.loc[rows["final_r2"].idxmax()]
        lead.append(
            f"{bench}: the highest final r(Y2) is that of {best['system']}, {best['final_r2']:.3f} "
            f"(M_0 {best['m0_r2']:.3f}; iteration {best['final_iteration']}; "
            f"{_count(best['seeds'], 'seed')})."
        )
        model = f"{bench}: {best['system']}, M_{best['final_iteration']}"
        repeated = None if pd.isna(best["repeated"]) else best["repeated"]
        lead.append(verdict(model, best["delta"], best["delta_p"], repeated))
    return lead


def _notes(systems: Sequence[System], just_begun: Sequence[str]) -> list[str]:
    """What a reader must not miss: unfinished runs, and what cannot be compared."""
    notes = [
        f"{run.name} is unfinished: iteration {run.last} of {run.record.iterations}."
        for system in systems
        for run in system.runs
        if not run.finished
    ]
    notes += [f"{name} has begun and has not evaluated M_0 yet: it is left out." for name in just_begun]
    return [*notes, *filter(None, [rewards.unlike_test_sets(systems)])]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _markdown(lead: Sequence[str], sections: Sections) -> str:
    parts = ["# STaSC report", *map(markdown, lead)]
    for title, blocks in sections.items():
        parts.append(f"## {title}")
        for block in blocks:
            if isinstance(block, Table):
                parts.append(block.markdown())
            elif isinstance(block, FigureGroup):
                pictures = (f"![{markdown(p.alt)}](figures/{p.name}.png)" for p in block.pictures)
                parts += [f"### {markdown(block.title)}", markdown(block.caption), "\n".join(pictures)]
            else:
                parts.append(markdown(block))
    return "\n\n".join(parts) + "\n"


def _check_is_ours(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        index = out / PAGE
        if not index.is_file() or GENERATOR not in index.read_text(encoding="utf-8", errors="replace")[:1000]:
            raise UserError(f"{out} holds other things than a report: choose another --out.")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out.")


def _write(out: Path, files: dict[str, str | bytes]) -> None:
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error}.") from error
