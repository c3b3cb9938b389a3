"""The report as one page that opens offline, with a browser of trajectories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from stasc.report.figures import INK, PAPER, SOFT, FigureGroup, Picture
from stasc.report.table import Table

GENERATOR = '<meta name="generator" content="stasc report">'
"""By this a page is known as one of ours."""

Block = Table | FigureGroup | Sequence[str]
"""A table, a figure, or sentences."""

Parts = dict[str, Sequence[Block]]
"""Sections by their titles."""

_LONG = 12  # rows of a table that is folded up

_FILES = Path(__file__).parent


def page(
    lead: Sequence[str],
    notes: Sequence[str],
    parts: Parts,
    trajectories: dict[str, Any],
    at_most: int,
) -> str:
    """The page as HTML.

    Args:
        lead: Sentences under the title.
        notes: Sentences that a reader must not miss.
        parts: The sections.
        trajectories: What ``browser.embed`` gives.
        at_most: How many of each kind that were.
    """
    script = (_FILES / "page.js").read_text(encoding="utf-8")
    sections = [
        f'<section id="{_id(name)}" aria-labelledby="{_id(name)}-title">'
        f'<h2 id="{_id(name)}-title">{escape(name)}</h2>{"".join(map(_block, blocks))}</section>'
        for name, blocks in parts.items()
    ]
    names = [*parts, "Trajectories"]
    return Template((_FILES / "page.html").read_text(encoding="utf-8")).substitute(
        style=(_FILES / "page.css").read_text(encoding="utf-8"),
        lead="".join(
            [
                *(f"<p>{escape(sentence)}</p>" for sentence in lead),
                *(f"<p class=note>{escape(sentence)}</p>" for sentence in notes),
            ]
        ),
        navigation=" ".join(f'<a href="#{_id(name)}">{escape(name)}</a>' for name in names),
        sections="\n".join(sections),
        sampled=escape(sampled(trajectories, at_most)),
        data=embedded(trajectories),
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    )


def sampled(trajectories: dict[str, Any], at_most: int) -> str:
    """How many trajectories are on the page, of how many, and which."""
    shown = len(trajectories["trajectories"])
    total = sum(count for *_, count in trajectories["strata"])
    if shown == total:
        return f"All {total:,} trajectories of these runs are on this page."
    return (
        f"{shown:,} of the {total:,} trajectories of these runs are on this page: at most {at_most} for "
        "each run, iteration, split and transition, drawn with a fixed seed by question, so that a "
        "question can be followed over iterations."
    )


def embedded(value: Any) -> str:
    """JSON for a script element: pure ASCII, and nothing in it ends the element or begins another."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def inline(picture: Picture) -> str:
    """A picture as part of the page: its own ids, the page's colours, any width."""
    svg = picture.svg[picture.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{picture.name}-", svg)
    for color, here in {INK: "currentColor", SOFT: "var(--soft)", PAPER: "var(--card)"}.items():
        svg = svg.replace(color, here)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(picture.alt)}"', 1)


def _block(block: Block) -> str:
    if isinstance(block, FigureGroup):
        panels = "\n".join(map(inline, block.pictures))
        caption = f"<strong>{escape(block.title)}</strong> {escape(block.caption)}"
        return f"<figure><figcaption>{caption}</figcaption><div class=panels>{panels}</div></figure>"
    if isinstance(block, Table):
        rows = sum(len(rows) for _, rows in block.groups)
        if block.name.startswith("table") or rows <= _LONG:
            return f"<h3>{escape(block.title)}</h3>{block.html()}"
        return f"<details><summary>{escape(block.title)} ({rows} rows)</summary>{block.html()}</details>"
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in block)


def _id(name: str) -> str:
    return name.lower().replace(" ", "-")
