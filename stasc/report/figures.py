"""The figures of a report, one picture for each panel."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stasc.report.runs import mean_curve
from stasc.report.sizes import correlation_of, gains
from stasc.report.systems import Panel, System
from stasc.report.table import number

INK, SOFT, PAPER = "#1c2128", "#6e7681", "#ffffff"
"""Text, lines that stand back, and background of a picture; the page puts its own in their place."""

# A hue for filter and fine-tuning, a marker for the initialisation. The hues are those of Okabe and Ito, told
# apart in the common kinds of colour blindness, moved to stand out from white and from near-black alike.
_HUES = {"IE": "#2b7bba", "IF": "#d55e00", "NE": "#b8629a", "NF": "#008f68"}
_MARKERS = {"E": "o", "F": "s"}
_OTHER_HUE = "#7a828e"

# From the bottom of a bar: what is right after correction, then what is wrong.
_TRANSITIONS = {
    "right_to_right": ("right → right", "#2b7bba"),
    "wrong_to_right": ("wrong → right", "#7fc4f5"),
    "right_to_wrong": ("right → wrong", "#d55e00"),
    "wrong_to_wrong": ("wrong → wrong", "#a9afb8"),
}
_SIZE = (4.3, 3.0)  # inches
_AREA = (
    0.16,
    0.155,
    0.7,
    0.755,
)  # left, bottom, width and height of the axes; names of lines stand to the right
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": SOFT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "path.simplify": False,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Picture:
    """One panel, as PNG and as SVG; ``name`` is its file's, ``alt`` says what is to be seen."""

    name: str
    alt: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class FigureGroup:
    """A figure of the report: its panels and what is said below them."""

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
    number, word = {"E": (2, "Evolving"), "F": (3, "Fixed")}[letter]
    pictures = [
        _rewards(f"figure{number}-{slug}-{turn}", panel, letter, turn)
        for turn in ("r2", "r1")
        for slug, panel in _named(panels)
    ]
    return FigureGroup(
        f"Figure {number}: {word} initialisation",
        f"Rewards of corrections, r(Y2), and of initial answers, r(Y1), on the test questions. {_LINES}",
        tuple(filter(None, pictures)),
    )


def best_variants(panels: Sequence[Panel]) -> FigureGroup:
    """Figure 4: initial answers and corrections of the best variant."""
    return FigureGroup(
        "Figure 4: initial answers and corrections",
        f"The variant of each panel with the highest final r(Y2). {_LINES}",
        tuple(_best(f"figure4-{slug}", panel) for slug, panel in _named(panels)),
    )


def dataset_sizes(panels: Sequence[Panel]) -> FigureGroup:
    """|D_n| over iterations."""
    pictures = [_sizes(f"sizes-{slug}", panel) for slug, panel in _named(panels)]
    caption = f"Trajectories that the filter kept in iteration n. {_LINES}"
    return FigureGroup("Size of Dₙ", caption, tuple(filter(None, pictures)))


def gains_of_sizes(panels: Sequence[Panel]) -> FigureGroup:
    """|D_n| and what it brought."""
    pictures = [_gains(f"gains-{slug}", panel) for slug, panel in _named(panels)]
    caption = "Each point is an iteration of a run: how much it learnt from, and how far that moved r(Y2)."
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


def _rewards(name: str, panel: Panel, letter: str, turn: str) -> Picture | None:
    systems = [s for s in panel.systems if s.initialization == letter and mean_curve(s.runs, turn)]
    if not systems:
        return None

    def paint(axes: Axes) -> None:
        ends = [_line(axes, system, turn) for system in systems]
        axes.set_ylim(_limits(panel))
        _label_ends(axes, ends)

    what = "corrections" if turn == "r2" else "initial answers"
    label = f"reward of {what}, r(Y{turn[1]})"
    said = "; ".join(f"{s.algorithm} {_first_to_last(s, turn)}" for s in systems)
    return _picture(name, f"{label}, over iterations: {said}", panel.title, "iteration n", label, paint)


def _best(name: str, panel: Panel) -> Picture:
    def final(system: System) -> float:
        return fmean(mean_curve(system.runs, "r2")[-1][1]) if mean_curve(system.runs, "r2") else -1.0

    best = max([system for system in panel.systems if system.variant] or panel.systems, key=final)
    turns = [turn for turn in ("r1", "r2") if mean_curve(best.runs, turn)]

    def paint(axes: Axes) -> None:
        ends = []
        for turn in turns:
            at, color, _ = _line(axes, best, turn, hollow=turn == "r1")
            ends.append((at, color, {"r1": "r(Y1)", "r2": "r(Y2)"}[turn]))
        axes.set_ylim(_limits(panel))
        _label_ends(axes, ends)

    said = "; ".join(f"r(Y{turn[1]}) {_first_to_last(best, turn)}" for turn in turns)
    alt = f"{best.algorithm}, rewards over iterations: {said}"
    return _picture(name, alt, f"{panel.title}: {best.algorithm}", "iteration n", "reward", paint)


def _sizes(name: str, panel: Panel) -> Picture | None:
    systems = [system for system in panel.systems if mean_curve(system.runs, "size")]
    if not systems:
        return None

    def paint(axes: Axes) -> None:
        ends = [_line(axes, system, "size") for system in systems]
        axes.set_ylim(bottom=0)
        _label_ends(axes, ends)

    said = "; ".join(f"{s.algorithm} {_first_to_last(s, 'size')}" for s in systems)
    alt = f"Size of D_n over iterations: {said}"
    return _picture(name, alt, panel.title, "iteration n", "|Dₙ|, trajectories", paint)


def _gains(name: str, panel: Panel) -> Picture | None:
    points = [(s, [gain for run in s.runs for gain in gains(run)]) for s in panel.systems if s.variant]
    if not any(pairs for _, pairs in points):
        return None

    def paint(axes: Axes) -> None:
        for system, pairs in points:
            x, y = [size for size, _ in pairs], [gain for _, gain in pairs]
            filled = system.variant[0] == "E"
            color = _hue(system)
            axes.scatter(
                *(x, y),
                s=22,
                marker=_MARKERS[system.variant[0]],
                color=color if filled else "none",
                edgecolors=color,
                linewidths=1.2,
                alpha=0.85,
                label=system.algorithm,
            )
        axes.axhline(0, color=SOFT, linewidth=0.8)
        _legend(axes, handletextpad=0.2)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.text(0.98, 0.98, said, transform=axes.transAxes, ha="right", va="top", fontweight="bold")

    found = correlation_of([system for system, _ in points])
    said = f"r = {number(found.r, '.2f')}" if found else ""
    alt = f"Size of D_n and gain in r(Y2) for {sum(len(pairs) for _, pairs in points)} iterations, {said}"
    return _picture(name, alt, panel.title, "|Dₙ|, trajectories", "gain: r(Y2) of Mₙ less Mₙ₋₁", paint)


def _transitions(name: str, system: System) -> Picture:
    last = max(run.last for run in system.runs)
    shares = {}
    for key in _TRANSITIONS:
        shares[key] = [
            fmean(
                run.points[n].transitions[key] / sum(run.points[n].transitions.values())
                for run in system.runs
                if n <= run.last
            )
            for n in range(last + 1)
        ]

    def paint(axes: Axes) -> None:
        below = [0.0] * (last + 1)
        for key, (label, color) in _TRANSITIONS.items():
            axes.bar(range(last + 1), shares[key], bottom=below, color=color, width=0.8, label=label)
            below = [a + b for a, b in zip(below, shares[key], strict=True)]
        axes.set_ylim(0, 1)
        axes.set_xlim(-0.6, last + 0.6)
        _legend(axes, reverse=True, handlelength=0.9)

    said = "; ".join(f"{label} {shares[key][-1]:.2f}" for key, (label, _) in _TRANSITIONS.items())
    alt = f"{system.name}, transitions over iterations, in the end: {said}"
    return _picture(name, alt, system.name, "iteration n", "share of pairs", paint)


# ---------------------------------------------------------------- what they share

_End = tuple[tuple[float, float], str, str]


def _line(axes: Axes, system: System, name: str, *, hollow: bool = False) -> _End:
    """The mean curve of a system with its band; where it ends, its colour and its label."""
    curve = mean_curve(system.runs, name)
    n = [iteration for iteration, _ in curve]
    means = [fmean(values) for _, values in curve]
    color = _hue(system)
    axes.plot(
        *(n, means),
        color=color,
        linestyle="--" if system.paper else "-",
        linewidth=1.2 if hollow else None,
        marker=_MARKERS.get(system.initialization or "", "D"),
        markerfacecolor=PAPER if hollow or system.initialization == "F" else color,
    )
    if any(len(values) > 1 for _, values in curve):
        lowest, highest = [min(values) for _, values in curve], [max(values) for _, values in curve]
        axes.fill_between(n, lowest, highest, color=color, alpha=0.15, linewidth=0)
    return (n[-1], means[-1]), color, system.algorithm


def _hue(system: System) -> str:
    return _HUES[system.variant[1:]] if system.variant else _OTHER_HUE


def _limits(panel: Panel) -> tuple[float, float]:
    """The same for all pictures of a panel that show rewards."""
    curves = [mean_curve(system.runs, turn) for system in panel.systems for turn in ("r1", "r2")]
    values = [value for curve in curves for _, found in curve for value in found]
    margin = 0.06 * (max(values) - min(values)) or 0.05
    return max(min(values) - margin, -0.02), min(max(values) + margin, 1.02)


def _label_ends(axes: Axes, ends: Sequence[_End]) -> None:
    """Write each line's name beside its end, moved up or down as far as needed to be read."""
    bottom, top = axes.get_ylim()
    apart = 0.075
    right = max(x for (x, _), *_ in ends)
    # A line that ends early has its name there, unless it would run into the others'.
    columns = [right if x > 0.8 * right else x for (x, _), *_ in ends]
    heights = [(y - bottom) / (top - bottom) for (_, y), *_ in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    for _ in range(100):  # push neighbours apart, a little at a time
        for low, high in pairwise(order):
            overlap = apart - (heights[high] - heights[low])
            if overlap > 0 and columns[low] == columns[high]:
                heights[low] -= overlap / 2
                heights[high] += overlap / 2
    for x, height, (_, color, label) in zip(columns, heights, ends, strict=True):
        axes.annotate(
            label,
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            color=color,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _legend(axes: Axes, **options: Any) -> None:
    """A legend to the right, where the axes make room for it."""
    left, bottom, width, height = _AREA
    axes.set_position((left, bottom, width - 0.17, height))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, borderaxespad=0, **options)


def _first_to_last(system: System, name: str) -> str:
    curve = mean_curve(system.runs, name)
    first, last = (fmean(curve[at][1]) for at in (0, -1))
    return f"from {first:.0f} to {last:.0f}" if name == "size" else f"from {first:.3f} to {last:.3f}"


def _picture(
    name: str, alt: str, title: str, x_label: str, y_label: str, paint: Callable[[Axes], None]
) -> Picture:
    with style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=_SIZE)
        axes = figure.add_axes(_AREA)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
        paint(axes)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Picture(name, alt, png.getvalue(), svg.getvalue())


def _named(panels: Sequence[Panel]) -> list[tuple[str, Panel]]:
    return list(zip(_slugs([panel.title for panel in panels]), panels, strict=True))


def _slugs(titles: Sequence[str]) -> list[str]:
    """A file name for each title, no two alike."""
    slugs: list[str] = []
    for title in titles:
        slug = re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-.") or "panel"
        twins = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in slugs)
        slugs.append(f"{slug}-{twins + 1}" if twins else slug)
    return slugs
