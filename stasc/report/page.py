"""The report as one page that opens offline, with a browser of trajectories."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stasc.report.figures import INK, PAPER, SOFT, FigureGroup, Picture
from stasc.report.table import Table

GENERATOR = '<meta name="generator" content="stasc report">'
"""Shows that a page was written by this program."""

Block = Table | FigureGroup | str
"""A table, a figure, or a paragraph."""

Sections = dict[str, Sequence[Block]]
"""Blocks by the title of their section."""

_FILES = Path(__file__).parent


def page(
    lead: Sequence[str], notes: Sequence[str], sections: Sections, trajectories: dict[str, Any], sample: str
) -> str:
    """The page as HTML.

    Args:
        lead: Sentences under the title.
        notes: Sentences that a reader must not miss.
        sections: What the page shows before the trajectories.
        trajectories: What ``browser.embed`` gives.
        sample: A sentence on which trajectories these are.
    """
    jinja = Environment(
        loader=FileSystemLoader(_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"anchor": _anchor, "inline": inline}
    # The filter ``tojson`` writes ASCII, in which nothing ends the script element; this makes it short.
    jinja.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    style, script = ((_FILES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return jinja.get_template("page.html").render(
        generator=GENERATOR,
        style=style,
        script=script,
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        lead=lead,
        notes=notes,
        sections=sections,
        trajectories=trajectories,
        sample=sample,
    )


def inline(picture: Picture) -> str:
    """What follows ``<svg`` in a picture, in the page's colours, of any width, with ids of its own."""
    svg = picture.svg[picture.svg.index("<svg") + len("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    start, end, rest = svg.partition(">")
    svg = re.sub(r' (width|height)="[^"]*"', "", start) + end + rest
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{picture.name}-", svg)
    for color, replacement in {INK: "currentColor", SOFT: "var(--soft)", PAPER: "var(--card)"}.items():
        svg = svg.replace(color, replacement)
    return svg


def _anchor(title: str) -> str:
    """The id of a section."""
    return title.lower().replace(" ", "-")
