"""``python -m stasc report RUN...``: from run folders to a folder of tables, figures and a page."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from stasc.errors import UserError
from stasc.report import figures, sizes, tables
from stasc.report.browser import embed
from stasc.report.figures import FigureGroup
from stasc.report.page import GENERATOR, Block, Parts, page, sampled
from stasc.report.paper import read_paper
from stasc.report.runs import read_runs
from stasc.report.statistics import RESAMPLES
from stasc.report.systems import System, group_runs, panels
from stasc.report.table import Table, markdown

PAGE = "index.html"

METHOD = (
    "A system is all runs whose configurations differ in nothing but the seed, and in where and how they "
    "were carried out. Tables 1 and 2 are about its finished runs; if none is finished, about what all of "
    "them have reached.",
    "Intervals over seeds are t intervals of the mean of one value per run. They say how far another seed "
    "may be.",
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
    """Mistakes in arguments are a user's like others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python -m stasc report --help).")


def main(arguments: Sequence[str]) -> None:
    """Write the report; a user's mistake ends in one sentence on standard error and status 2."""
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
    try:
        options = parser.parse_args(arguments)
        if options.trajectories < 0:
            raise UserError(f"--trajectories is {options.trajectories}: it must be 0 or more.")
        for line in report(options.runs, options.out, options.paper, options.trajectories):
            print(line)
    except UserError as mistake:
        print(f"stasc: {' '.join(str(mistake).split())}", file=sys.stderr)
        sys.exit(2)


def report(places: Sequence[Path], out: Path, paper: Path | None, at_most: int) -> list[str]:
    """Write the report and say what was found.

    Args:
        places: Run folders, or folders that they lie under.
        out: The folder to write to: a new one, an empty one, or that of an earlier report.
        paper: CSV file of the paper's curves.
        at_most: Trajectories on the page for each run, iteration, split and transition.

    Raises:
        UserError: There is no run, a file cannot be read, or ``out`` holds something else.
    """
    _check_is_ours(out)
    runs, just_begun = read_runs(places)
    ours = group_runs(runs)
    systems = ours + (group_runs(read_paper(paper), paper=True) if paper else [])
    shown = panels(systems)
    ordered = [(run, f"{system.name}, seed {run.seed}") for system in ours for run in system.runs]
    trajectories = embed([run for run, _ in ordered], [name for _, name in ordered], at_most)
    parts: Parts = {
        "Results": [
            tables.table2(systems),
            tables.table1(systems),
            tables.pairs_table(systems),
            tables.further_table(systems),
        ],
        "Curves": [
            figures.initialization(shown, "E"),
            figures.initialization(shown, "F"),
            figures.best_variants(shown),
        ],
        "What was learnt from": [
            figures.dataset_sizes(shown),
            figures.gains_of_sizes(shown),
            sizes.correlation_table(shown),
        ],
        "Transitions": [figures.transitions(systems)],
        "Runs": [tables.runs_table(systems), tables.curves_table(systems)],
        "Method": [[*METHOD, *([PAPER_METHOD] if paper else [])]],
    }
    parts = {name: there for name, blocks in parts.items() if (there := [block for block in blocks if block])}
    lead, notes = _lead(ours), _notes(ours, just_begun)
    html = page(lead, notes, parts, trajectories, at_most)
    text = _markdown([*lead, *notes], parts, sampled(trajectories, at_most))
    _write(out, html, text, [block for blocks in parts.values() for block in blocks])
    return [*lead, *notes, f"report  {out / PAGE}, {out / 'report.md'}, *.csv, figures/"]


def _lead(systems: Sequence[System]) -> list[str]:
    """What there is, and what came out highest."""
    runs = sum(len(system.runs) for system in systems)
    lead = [f"{_count(runs, 'run')} of {_count(len(systems), 'system')}."]
    fair = [system for system in systems if not system.uses_references]
    for bench in dict.fromkeys(system.bench for system in fair):
        final = {s.name: tables.estimate(s.counted, "r2", s.final).mean for s in fair if s.bench == bench}
        best = max((s for s in fair if s.bench == bench), key=lambda s: final[s.name])
        base = tables.estimate(best.counted, "r2", 0).mean
        lead.append(
            f"{bench}: the highest final r(Y2) is that of {best.label}, {final[best.name]:.3f} "
            f"(M_0 {base:.3f}; iteration {best.final}; {_count(len(best.counted), 'seed')})."
        )
    return lead


def _notes(systems: Sequence[System], just_begun: Sequence[str]) -> list[str]:
    """What a reader must not miss: runs that have not come to their end, and what cannot be compared."""
    notes = [
        f"{run.name} is unfinished: iteration {run.last} of {run.planned}."
        for system in systems
        for run in system.runs
        if not run.finished
    ]
    notes += [f"{name} has begun and has not evaluated M_0 yet: it is left out." for name in just_begun]
    return [*notes, *filter(None, [tables.unlike_test_sets(systems)])]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _markdown(lead: Sequence[str], parts: Parts, trajectories: str) -> str:
    lines = ["# STaSC report", *lead, f"{trajectories} (The page is {PAGE}.)"]
    for name, blocks in parts.items():
        lines.append(f"## {name}")
        for block in blocks:
            if isinstance(block, Table):
                lines.append(block.markdown())
            elif isinstance(block, FigureGroup):
                pictures = (f"![{markdown(p.alt)}](figures/{p.name}.png)" for p in block.pictures)
                lines += [f"### {block.title}", block.caption, "\n".join(pictures)]
            else:
                lines += block
    return "\n\n".join(lines) + "\n"


def _check_is_ours(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        index = out / PAGE
        if not index.is_file() or GENERATOR not in index.read_text(encoding="utf-8", errors="replace")[:1000]:
            raise UserError(f"{out} holds other things than a report: choose another --out.")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out.")


def _write(out: Path, html: str, text: str, blocks: Sequence[Block]) -> None:
    """The page first: by it the folder is known as a report's, should the rest fail."""
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        _write_text(out / PAGE, html)
        _write_text(out / "report.md", text)
        for block in blocks:
            if isinstance(block, Table):
                _write_text(out / f"{block.name}.csv", block.csv())
            for picture in block.pictures if isinstance(block, FigureGroup) else ():
                _write_text(out / "figures" / f"{picture.name}.svg", picture.svg)
                (out / "figures" / f"{picture.name}.png").write_bytes(picture.png)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error}.") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
