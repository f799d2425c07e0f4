"""Reads the cells and sentences of a report's printed, Markdown and HTML forms back."""

import html.parser
import re

from lightning_bnmonitor import Report

# ------------------------------------------------------------------------------------------------------------ as tables


class Cells(html.parser.HTMLParser):
    """The text of every body cell of an HTML table, row by row, of every paragraph and item, all badges and tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.badges: list[str] = []
        self.inside: list[str] | None = None  # what the text belongs to: the last entry of this
        self.outside: list[str] | None = None  # the same, while in a badge
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "code":
            self.handle_data("`")
        elif tag == "span":
            self.inside, self.outside = self.badges, self.inside
            self.inside.append("")
        elif tag != "strong":
            self.inside = {"td": self.rows[-1] if self.rows else None, "p": self.texts, "li": self.texts}.get(tag)
            if self.inside is not None:
                self.inside.append("")

    def handle_endtag(self, tag):
        if tag == "code":
            self.handle_data("`")
        elif tag == "span":
            self.inside = self.outside
        elif tag != "strong":
            self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.inside[-1] += data


def as_shown(source: str) -> str:
    """Markdown as a reader sees it: escapes by backslash and by entity undone."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", source))


def markdown_rows(source: str) -> list[list[str]]:
    """The cells of a GitHub table as a reader sees them."""
    lines = [line.strip() for line in source.splitlines() if line.startswith("|")]
    return [[as_shown(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def text_rows(source: str) -> list[list[str]]:
    """The cells of the second paragraph of a printed report, below the rule."""
    lines = source.split("\n\n")[1].splitlines()
    ends = [match.span() for match in re.finditer("-+", lines[1])]
    return [[line[start:end].strip() for start, end in ends] for line in lines[2:]]


FORMS = {
    "str": str,
    "markdown": lambda report: as_shown(report.to_markdown()),
    "html": Report._repr_html_,
    "repr": repr,
}
