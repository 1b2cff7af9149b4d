"""The tables that commands print."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def figure_table(*headers: str, justify: Any = "left", **settings: Any) -> Table:
    """An empty table, in which about ten columns of figures fit 80 characters. What does not fit is folded, and never cut.

    `settings` are those of rich's `Table`; the first column stands left, whatever the others do.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, **settings)
    for number, header in enumerate(headers):
        table.add_column(header, overflow="fold", justify=justify if number else "left")
    return table


def broken(header: str) -> str:
    """A header on several lines, a word on each."""
    return header.replace(" ", "\n").replace("-", "-\n")
