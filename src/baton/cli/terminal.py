"""What the commands print: tables that are pretty on a terminal and plain in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    file: TextIO | None = None,
) -> None:
    """Print rows under columns; the first column is left-aligned, the others right-aligned."""
    out = file or sys.stdout
    if out.isatty():
        _rich_table(columns, rows, title, out)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    if title:
        print(title, file=out)
    for row in (columns, *rows):
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *rest)).rstrip(), file=out)


def _rich_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, out: TextIO
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold"
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=out).print(table)
