"""Consoles, and tables for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich import box, console
from rich.table import Table as RichTable

from ds_al.figures.parts import Table


class Console(console.Console):
    """A console that prints text as it is.

    Rich takes ``[fast]`` in the name of a run or of a folder for a style, leaves it out, and raises for ``[/fast]``; it
    replaces ``:100:`` by a picture.

    Args:
        options: of rich's console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)


def table(content: Table, *, title: str, sections: Collection[int] = ()) -> RichTable:
    """Returns a table for rich's console, with its caption below it.

    Args:
        content: the table.
        title: heading.
        sections: indices of rows that are followed by a line.
    """
    shown = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    shown.caption, shown.caption_justify = content.caption, "left"
    for number, name in enumerate(content.columns):
        shown.add_column(name, justify="right" if number in content.numeric else "left", no_wrap=number == 0)
    for number, row in enumerate(content.rows):
        shown.add_row(*row, end_section=number in sections)
    return shown
