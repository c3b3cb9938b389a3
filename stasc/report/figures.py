"""The figures of a report: groups of pictures, one for each panel."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stasc.report.rewards import TURNS
from stasc.report.systems import Panel, System
from stasc.report.table import number
from stasc.statistics import correlation

INK, SOFT, PAPER = "#1c2128", "#6e7681", "#ffffff"
"""Text, lines in the background, and the background of a picture; the page has its own in their place."""

# A hue for filter and fine-tuning, a marker for the initialisation. The hues are those of Okabe and Ito, for
# readers who are colour-blind too, changed to be visible on white and on near-black.
_HUES = {"IE": "#2b7bba", "IF": "#d55e00", "NE": "#b8629a", "NF": "#008f68"}
_MARKERS = {"E": "o", "F": "s"}
_OTHER_HUE = "#7a828e"
_LONGEST_SLUG = 100
"""Characters of a title in a file name."""

# Colours of ``TRANSITIONS``, from the bottom of a bar: what is right after correction, then what is wrong.
_TRANSITIONS = {
    "right_to_right": "#2b7bba",
    "wrong_to_right": "#7fc4f5",
    "right_to_wrong": "#d55e00",
    "wrong_to_wrong": "#a9afb8",
}
_STYLE = {
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,  # cuts no label off, however long it is
    "figure.facecolor": PAPER,
    "figure.figsize": (4.3, 3.0),  # inches
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "path.simplify": False,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "text.parse_math": False,
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(
        ("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK
    ),
}


@dataclass(frozen=True)
class Picture:
    """One panel, as PNG and as SVG; ``name`` is that of its file, ``alt`` describes it in words."""

    name: str
    alt: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class FigureGroup:
    """A figure of the report: its panels and their caption; it is true if it has any panel."""

    title: str
    caption: str
    pictures: tuple[Picture, ...]

    def __bool__(self) -> bool:
        return bool(self.pictures)


_LINES = (
    "Lines are means over seeds, bands go from the lowest to the highest seed; dashed: the paper's runs. "
    "A pair of numbers in a title is (N_init, N_corr)."
)


def initialization(panels: Sequence[Panel], letter: str) -> FigureGroup:
    """Figures 2 and 3: all variants with Evolving ("E") or Fixed ("F") initialisation."""
    figure, word = {"E": (2, "Evolving"), "F": (3, "Fixed")}[letter]
    pictures = []
    for turn, what in (("r2", "corrections"), ("r1", "initial answers")):
        label = f"reward of {what}, {TURNS[turn]}"
        for slug, panel in _named(panels):
            lines = [_Line(s, turn, s.algorithm) for s in panel.systems if s.initialization == letter]
            name = f"figure{figure}-{slug}-{turn}"
            pictures.append(_lines(name, panel.title, lines, label, f"{label},", _limits(panel)))
    return FigureGroup(
        f"Figure {figure}: {word} initialisation",
        f"Rewards of corrections, r(Y2), and of initial answers, r(Y1), on the test questions. {_LINES}",
        tuple(filter(None, pictures)),
    )


def best_variants(panels: Sequence[Panel]) -> FigureGroup:
    """Figure 4: initial answers and corrections of the best variant."""

    def final(system: System) -> float:
        means = system.curve("r2")["mean"]
        return means.iloc[-1] if len(means) else -1.0

    pictures = []
    for slug, panel in _named(panels):
        best = max([system for system in panel.systems if system.variant] or panel.systems, key=final)
        lines = [_Line(best, turn, title, hollow=turn == "r1") for turn, title in TURNS.items()]
        title, what = f"{panel.title}: {best.algorithm}", f"{best.algorithm}, rewards"
        pictures.append(_lines(f"figure4-{slug}", title, lines, "reward", what, _limits(panel)))
    return FigureGroup(
        "Figure 4: initial answers and corrections",
        f"The variant of each panel with the highest final r(Y2). {_LINES}",
        tuple(filter(None, pictures)),
    )


def deltas(panels: Sequence[Panel]) -> FigureGroup:
    """Delta over iterations."""
    pictures = []
    for slug, panel in _named(panels):
        lines = [_Line(system, "delta", system.algorithm) for system in panel.systems]
        values = [value for line in lines for value in (*line.curve["min"], *line.curve["max"])]
        reach = 1.1 * max([abs(value) for value in values] + [0.05])
        label = "Δ = r(Y2) less r(Y1)"
        pictures.append(_lines(f"delta-{slug}", panel.title, lines, label, "Delta", (-reach, reach)))
    caption = f"How much better the corrections of a model are than its own first answers. {_LINES}"
    return FigureGroup("Δ: does a second look help?", caption, tuple(filter(None, pictures)))


def dataset_sizes(panels: Sequence[Panel]) -> FigureGroup:
    """|D_n| over iterations."""
    pictures = []
    for slug, panel in _named(panels):
        lines = [_Line(system, "dataset_size", system.algorithm) for system in panel.systems]
        label, limits = "|Dₙ|, trajectories", (0, None)
        pictures.append(_lines(f"sizes-{slug}", panel.title, lines, label, "Size of D_n", limits))
    caption = f"Trajectories that the filter kept in iteration n. {_LINES}"
    return FigureGroup("Size of Dₙ", caption, tuple(filter(None, pictures)))


def gains_of_sizes(panels: Sequence[Panel]) -> FigureGroup:
    """|D_n| and what it brought."""
    pictures = [_gains(f"gains-{slug}", panel) for slug, panel in _named(panels)]
    caption = "Each point is an iteration of a run: |Dₙ|, and how much r(Y2) of Mₙ is above that of Mₙ₋₁."
    return FigureGroup("Size of Dₙ and gain", caption, tuple(filter(None, pictures)))


def transitions(systems: Sequence[System]) -> FigureGroup:
    """What corrections did to initial answers, for every system that was run."""
    ours = [system for system in systems if not system.paper]
    slugs = _slugs([system.name for system in ours])
    caption = (
        "Initial answers and their corrections on the test questions: shares of all pairs, means over "
        "seeds. The two lower parts of a bar are right after correction."
    )
    pictures = [_transitions(f"transitions-{slug}", system) for slug, system in zip(slugs, ours, strict=True)]
    return FigureGroup("Transitions", caption, tuple(pictures))


# ---------------------------------------------------------------- panels


class _Line(NamedTuple):
    """A column of a system's curves over iterations."""

    system: System
    column: str
    label: str
    hollow: bool = False

    @property
    def curve(self) -> pd.DataFrame:
        return self.system.curve(self.column)


def _lines(
    name: str,
    title: str,
    lines: Sequence[_Line],
    label: str,
    what: str,
    limits: tuple[float, float | None],
) -> Picture | None:
    """A picture of those of some lines that have any point; ``what`` is its y axis in words."""
    lines = [line for line in lines if len(line.curve)]
    if not lines:
        return None

    def paint(axes: Axes) -> None:
        for line in lines:
            _draw(axes, line)
        axes.set_ylim(*limits)
        _tick_iterations(axes, max(line.curve.index[-1] for line in lines))
        _label_ends(axes, lines)

    def change(line: _Line) -> str:
        form = ".0f" if line.column == "dataset_size" else ".3f"
        first, last = line.curve["mean"].iloc[[0, -1]]
        return f"{line.label} from {first:{form}} to {last:{form}}"

    alt = f"{what} over iterations: {'; '.join(map(change, lines))}"
    return _picture(name, alt, title, label, paint)


def _gains(name: str, panel: Panel) -> Picture | None:
    variants = [system for system in panel.systems if system.variant]
    points = sum(len(run.gains) for system in variants for run in system.runs)
    if not points:
        return None
    found = correlation([run.gains for system in variants for run in system.runs])
    r = f"r = {number(found.r, '.2f')}" if found else ""

    def paint(axes: Axes) -> None:
        for system in variants:
            axes.scatter(
                [size for run in system.runs for size, _ in run.gains],
                [gain for run in system.runs for _, gain in run.gains],
                s=22,
                marker=_MARKERS[system.variant[0]],
                color=_hue(system) if system.initialization == "E" else "none",
                edgecolors=_hue(system),
                linewidths=1.2,
                alpha=0.85,
                label=system.algorithm,
            )
        axes.axhline(0, color=SOFT, linewidth=0.8)
        _legend(axes, handletextpad=0.2)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.text(0.98, 0.98, r, transform=axes.transAxes, ha="right", va="top", fontweight="bold")

    alt = f"Size of D_n and gain in r(Y2) for {points} iterations, {r}"
    return _picture(name, alt, panel.title, "gain: r(Y2) of Mₙ less Mₙ₋₁", paint, "|Dₙ|, trajectories")


def _transitions(name: str, system: System) -> Picture:
    tested = system.curves.dropna(subset=list(_TRANSITIONS))
    counts = tested[list(_TRANSITIONS)]
    shares = counts.div(counts.sum(axis=1), axis=0).groupby(tested["iteration"]).mean()
    labels = {key: key.replace("_to_", " → ") for key in _TRANSITIONS}

    def paint(axes: Axes) -> None:
        below = 0.0
        for key, color in _TRANSITIONS.items():
            axes.bar(shares.index, shares[key], bottom=below, color=color, width=0.8, label=labels[key])
            below += shares[key]
        axes.set_ylim(0, 1)
        # A bar is as broad as one of five at most: M_0 alone would fill the picture.
        axes.set_xlim(-0.6, max(shares.index.max(), 4) + 0.6)
        _tick_iterations(axes, shares.index.max())
        _legend(axes, reverse=True, handlelength=0.9)

    final = "; ".join(f"{labels[key]} {shares[key].iloc[-1]:.2f}" for key in _TRANSITIONS)
    alt = f"{system.name}, transitions over iterations, in the end: {final}"
    return _picture(name, alt, system.name, "share of pairs", paint)


# ---------------------------------------------------------------- what they share


def _draw(axes: Axes, line: _Line) -> None:
    """Draw the mean of a line over seeds, with a band from the lowest to the highest seed."""
    curve, color, initialization = line.curve, _hue(line.system), line.system.initialization
    axes.plot(
        curve["mean"],
        color=color,
        linestyle="--" if line.system.paper else "-",
        linewidth=1.2 if line.hollow else None,
        marker=_MARKERS.get(initialization or "", "D"),
        markerfacecolor=PAPER if line.hollow or initialization == "F" else color,
    )
    if curve["count"].max() > 1:
        axes.fill_between(curve.index, curve["min"], curve["max"], color=color, alpha=0.15, linewidth=0)


def _tick_iterations(axes: Axes, last: int) -> None:
    """Put a tick at each of a few iterations; matplotlib would put some between them or beside them."""
    if last < 5:
        axes.set_xticks(range(last + 1))


def _hue(system: System) -> str:
    return _HUES[system.variant[1:]] if system.variant else _OTHER_HUE


def _limits(panel: Panel) -> tuple[float, float]:
    """The same for all pictures of a panel that show rewards."""
    rewards = pd.concat([system.curves[[*TURNS]].astype(float) for system in panel.systems])
    low, high = rewards.min(axis=None), rewards.max(axis=None)
    margin = 0.06 * (high - low) or 0.05
    return max(low - margin, -0.02), min(high + margin, 1.02)


def _label_ends(axes: Axes, lines: Sequence[_Line]) -> None:
    """Write each line's label beside its end, moved up or down as far as needed to be read."""
    bottom, top = axes.get_ylim()
    least_distance = 0.075  # of two labels, as a share of the axes' height
    ends = [(line.curve.index[-1], line.curve["mean"].iloc[-1]) for line in lines]
    right = max(x for x, _ in ends)
    # A line that ends early has its label there, unless that would cover the labels on the right.
    columns = [right if x > 0.8 * right else x for x, _ in ends]
    heights = [(y - bottom) / (top - bottom) for _, y in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    for _ in range(100):  # push neighbours apart, a little at a time
        for low, high in pairwise(order):
            overlap = least_distance - (heights[high] - heights[low])
            if overlap > 0 and columns[low] == columns[high]:
                heights[low] -= overlap / 2
                heights[high] += overlap / 2
    for line, x, height in zip(lines, columns, heights, strict=True):
        axes.annotate(
            line.label,
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            color=_hue(line.system),
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, borderaxespad=0, **options)


def _picture(
    name: str,
    alt: str,
    title: str,
    y_label: str,
    paint: Callable[[Axes], None],
    x_label: str = "iteration n",
) -> Picture:
    with style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure()
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
        paint(axes)
        axes.set_title(textwrap.fill(title, 44))  # the constrained layout does not care for its width
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Picture(name, alt, png.getvalue(), svg.getvalue())


def _named(panels: Sequence[Panel]) -> list[tuple[str, Panel]]:
    return list(zip(_slugs([panel.title for panel in panels]), panels, strict=True))


def _slugs(titles: Sequence[str]) -> list[str]:
    """A file name for each title; no two are the same."""
    slugs: list[str] = []
    for title in titles:
        slug = re.sub(r"[^a-z0-9.]+", "-", title.lower())[:_LONGEST_SLUG].strip("-.") or "panel"
        twins = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in slugs)
        slugs.append(f"{slug}-{twins + 1}" if twins else slug)
    return slugs
