"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ovcalib.errors import printable


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Rows with the same columns, aligned."""
    columns = list(rows[0])
    rows = [{column: printable(text) for column, text in row.items()} for row in rows]
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    for line in (dict(zip(columns, columns, strict=True)), *rows):
        print("  ".join(line[column].ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip())
