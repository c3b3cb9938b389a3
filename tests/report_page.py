"""A report's page as a browser would read it."""

import json
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Elements, text, scripts and the embedded data of a page.

    Attributes:
        elements: Each element's tag and the names of its attributes.
        errors: End tags that end nothing, and elements without an end tag.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.errors: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.errors += self._open
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attributes)))
        given = dict(attributes)
        self.ids += filter(None, [given.get("id")])
        self.links += filter(None, [given.get(name) for name in ("src", "href", "xlink:href", "action")])

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1:] == [tag]:
            self._open.pop()
        else:
            self.errors.append(f"/{tag}")

    def handle_data(self, text: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts[-1] += text
        elif inside != "style":
            self.text += text

    def shown(self) -> list[list[str]]:
        """The texts of the answers of each trajectory."""
        return [["".join(pieces) for *_, pieces in answers] for *_, answers in self.data["trajectories"]]
