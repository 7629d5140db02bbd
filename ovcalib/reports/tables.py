"""Tables that HTML, Markdown and CSV share: columns and rows of text or numbers, None where nothing was measured."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """columns   names, with their units
    rows         as many cells each
    """

    columns: Sequence[str]
    cells: Sequence[Sequence[Any]]

    @property
    def rows(self) -> list[list[str]]:
        """The cells as text for people."""
        return [[shown(cell) for cell in row] for row in self.cells]

    def html(self) -> str:
        """An HTML table; text is escaped."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *([escape_markdown(c) for c in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)

    def csv(self) -> str:
        """The cells with all their digits."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[_plain(cell) for cell in row] for row in self.cells])
        return out.getvalue()


def shown(value: Any) -> str:
    """A cell for people; "-" for what was not measured."""
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """A cell for programs; a text that a spreadsheet would run as a formula is quoted."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def escape_markdown(text: str) -> str:
    """Text from outside, which must not become Markdown or HTML."""
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace("\n", " ")
