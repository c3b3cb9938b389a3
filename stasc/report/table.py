"""A table and its three forms: Markdown, HTML and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from stasc.report.statistics import Correlation, Estimate, Paired

UNKNOWN = "\N{EN DASH}"


def number(value: float | None, form: str = ".3f") -> str:
    """A figure as it is printed, with a real minus sign; a dash where it is unknown."""
    return UNKNOWN if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


def interval(found: Estimate | Paired | Correlation, form: str = ".3f") -> str:
    """The 95 % interval of a figure as it is printed; empty where it has none."""
    return "" if found.low is None else f"[{number(found.low, form)}, {number(found.high, form)}]"


@dataclass(frozen=True)
class Cell:
    """A figure, lines of what is to be known with it, and whether it is the best of its column."""

    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows in groups; a group's heading may be empty.

    ``records`` are the same figures in full, one mapping per row, for the CSV file ``name``.
    """

    name: str
    title: str
    note: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    records: Sequence[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(rows for _, rows in self.groups)

    def markdown(self) -> str:
        """A GitHub table for each group."""
        parts = [f"### {markdown(self.title)}", markdown(self.note)]
        for heading, rows in self.groups:
            if heading:
                parts.append(f"**{markdown(heading)}**")
            lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)]]
            lines += [[_markdown_cell(cell) for cell in row] for row in rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(parts)

    def html(self) -> str:
        """The note, and a table with headers for its columns, groups and rows."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        bodies = []
        for heading, rows in self.groups:
            lines = [
                f'<tr><th scope="row">{_html_cell(first)}</th>'
                + "".join(f"<td>{_html_cell(cell)}</td>" for cell in rest)
                + "</tr>"
                for first, *rest in rows
            ]
            if heading:
                title = (
                    f'<th scope="rowgroup" colspan="{len(self.columns)}"><span>{escape(heading)}</span></th>'
                )
                lines.insert(0, f'<tr class="group">{title}</tr>')
            bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
        label = escape(self.title)
        return (
            f'<p class="caption" id="{self.name}-note">{escape(self.note)}</p>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f'<table aria-label="{label}" aria-describedby="{self.name}-note">'
            f"<thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div>"
        )

    def csv(self) -> str:
        """All figures in full; what is unknown is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()


def _html_cell(cell: Cell) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
    return text + (f"<small>{escape(cell.detail)}</small>" if cell.detail else "")


def _markdown_cell(cell: Cell) -> str:
    text = f"**{markdown(cell.text)}**" if cell.best else markdown(cell.text)
    return text + "".join(f"<br><sub>{markdown(line)}</sub>" for line in cell.detail.splitlines())


def markdown(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|~#$])", r"\\\1", text)
