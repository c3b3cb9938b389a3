"""A table: one data frame, which is its CSV file, and how its columns are shown in Markdown and HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

UNKNOWN = "\N{EN DASH}"
_LONG = 12  # a table with more rows is folded up on the page

Row = Mapping[str, Any]
"""A row of a frame; what is unknown is ``pandas.NA``."""


def to_frame(records: Iterable[Row]) -> pd.DataFrame:
    """A frame of some records, in which whole numbers stay whole beside an unknown one (None)."""
    return pd.DataFrame(records, dtype=object).convert_dtypes()


def number(value: Any, form: str = "") -> str:
    """A number as it is printed, with a real minus sign; a dash where it is unknown; a text as it is."""
    if isinstance(value, str):
        return value
    return UNKNOWN if pd.isna(value) else format(value, form).replace("-", "\N{MINUS SIGN}")


def interval(row: Row, name: str, form: str = ".3f") -> str:
    """The interval from ``name_low`` to ``name_high`` as it is printed; empty where there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(low) else f"[{number(low, form)}, {number(high, form)}]"


class Cell(NamedTuple):
    """A cell as it is shown: its text, lines of smaller text below, whether it is in bold, and a link."""

    text: str
    detail: str = ""
    bold: bool = False
    link: str = ""


@dataclass(frozen=True)
class Column:
    """How a column is shown.

    Attributes:
        title: Its heading.
        name: The column of the frame.
        text: A cell's text: a format of the value, or a function of the row.
        detail: Lines of smaller text in a cell, as a function of the row.
        bold: Whether the highest value of a group is in bold, as far as three decimals tell it. The frame
            then needs a column ``uses_references``; rows where it is true do not compete.
        link: A cell's link, as a function of the row: a URL, or one relative to the report.
    """

    title: str
    name: str
    text: str | Callable[[Row], str] = ""
    detail: Callable[[Row], str] = lambda row: ""
    bold: bool = False
    link: Callable[[Row], str] = lambda row: ""

    def cells(self, rows: Sequence[Row]) -> Iterator[Cell]:
        """The cells of a group."""
        values = [None if not self.bold or row["uses_references"] else row[self.name] for row in rows]
        values = [None if pd.isna(value) else round(value, 3) for value in values]
        known = [value for value in values if value is not None]
        for row, value in zip(rows, values, strict=True):
            text = self.text(row) if callable(self.text) else number(row[self.name], self.text)
            best = len(known) > 1 and value == max(known)
            yield Cell(text, self.detail(row), best, self.link(row))


@dataclass(frozen=True, eq=False)
class Table:
    """A table of a report; it is true if it has any rows.

    Attributes:
        name: Of its CSV file.
        title: Heading.
        note: What the columns mean.
        frame: All values in full; its index is shown nowhere.
        columns: What is shown of it.
        group_by: The columns whose values are a group's heading; without any there is one group.
        shown: Another frame for Markdown and HTML, made from ``frame``, where that has too many rows.
    """

    name: str
    title: str
    note: str
    frame: pd.DataFrame
    columns: Sequence[Column]
    group_by: Sequence[str] = ()
    shown: pd.DataFrame | None = None

    def __bool__(self) -> bool:
        return not self.frame.empty

    @property
    def rows(self) -> int:
        """How many rows are shown."""
        return len(self.frame if self.shown is None else self.shown)

    @property
    def folded(self) -> bool:
        """Whether it is to be unfolded on the page by a click."""
        return self.rows > _LONG and not self.name.startswith("table")

    @property
    def groups(self) -> Iterator[tuple[str, list[tuple[Cell, ...]]]]:
        """Each group's heading, which may be empty, and its rows."""
        frame = self.frame if self.shown is None else self.shown
        parts = frame.groupby(list(self.group_by), sort=False) if self.group_by else [((), frame)]
        for values, part in parts:
            rows = part.to_dict("records")
            cells = zip(*(column.cells(rows) for column in self.columns), strict=True)
            yield ", ".join(values), list(cells)

    def csv(self) -> str:
        """All values in full; what is unknown is empty."""
        return self.frame.to_csv(index=False, lineterminator="\n")

    def markdown(self) -> str:
        """The title, the note, and a GitHub table for each group."""
        parts = [f"### {markdown(self.title)}", markdown(self.note)]
        for heading, rows in self.groups:
            if heading:
                parts.append(f"**{markdown(heading)}**")
            lines = [[markdown(column.title) for column in self.columns]]
            lines.append(["---", *["---:"] * (len(self.columns) - 1)])
            lines += [[_markdown_cell(cell) for cell in row] for row in rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(parts)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{markdown(cell.text)}**" if cell.bold else markdown(cell.text)
    text = f"[{text}]({cell.link})" if cell.link else text
    return text + "".join(f"<br><sub>{markdown(line)}</sub>" for line in cell.detail.splitlines())


def markdown(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|~#$&])", r"\\\1", text)
