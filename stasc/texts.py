"""Texts of strangers, such as a model's: shown as they are, and obeyed by nothing."""

from __future__ import annotations

import re

_MARKS = r"[\\`*_{}\[\]()<>#!|&~$]"
"""What Markdown and HTML may read as more than a character, in any dialect."""


def printable(text: str, *, keep: str = "") -> str:
    """A text without anything that a terminal would obey: such characters become question marks.

    Args:
        text: From wherever.
        keep: Characters that stay, such as the line end.
    """
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)


def table_cell(text: str) -> str:
    """A text as a cell of a Markdown table of any dialect, which may turn it into HTML."""
    marked = re.sub(_MARKS, lambda match: f"&#{ord(match[0])};", printable(text, keep="\n"))
    return marked.replace("\n", "<br>")


def inline_code(text: str) -> str:
    """A text as Markdown's inline code, whatever it holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{printable(text)}{space}{fence}"
