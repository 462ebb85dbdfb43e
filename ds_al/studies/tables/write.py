"""From columns and rows to a table, and from a table to Markdown or to the terminal.

A column says with a template what its cells hold: ``{seconds:.2f} s``, with the row's own names. A name may have a
factor or a divisor: ``{efficiency*100:.1f} %``, ``{peak_bytes/1024:,.0f}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from ds_al.figures.parts import Table

Row = Mapping[str, Any]
Template = str | Callable[[Row], str]

BLANK = " "
"""A cell that can have no value; one that has none is an empty text."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its head; in :func:`crossed` a template.
        show: the text of a cell, as a template or as a function of the row.
        left: whether it is set flush left.
    """

    title: str
    show: Template
    left: bool = False


def text(template: Template, row: Row) -> str:
    """The text of a cell."""
    if not isinstance(template, str):
        return template(row)
    return _FIELD.sub(lambda match: _value(row, *match.groups()), template)


_FIELD = re.compile(r"\{(\w+)(?:([*/])(\d+))?(?::([^}]*))?\}")
"""Name, sign and number, format."""


def _value(row: Row, name: str, sign: str | None, number: str | None, form: str | None) -> str:
    value = row[name]
    if number:
        value = value * int(number) if sign == "*" else value / int(number)
    return format(value, form or "")


def number(name: str, form: str, *, unit: str = "", times: float = 1, missing: str = "-") -> Callable[[Row], str]:
    """A template for a number that a row may lack."""

    def show(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return missing
        return f"{value if times == 1 else times * value:{form}}{unit}"

    return show


def listed(rows: Iterable[Row], columns: Sequence[Column], *, caption: str = "") -> Table:
    """A table with a line per row."""
    return _table(caption, [column.title for column in columns], columns, [_line(row, columns) for row in rows])


def crossed(
    rows: Sequence[Row], lines: Sequence[Column], cells: Sequence[Column], *, by: str = "", caption: str = ""
) -> Table:
    """A table with a line for each value of some columns, and cells side by side for each value of others.

    Args:
        lines: columns at the left, whose texts name a line.
        cells: columns that are repeated; the title of the first one names the place of a row, ``M = {micro_batches}``.
            What no row has is an empty text.
        by: name of the value by which places are sorted; by default they have the order of the rows.
    """
    place = cells[0].title
    heads: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row[by]) if by else rows:
        heads.setdefault(text(place, row), row)
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault(tuple(_line(row, lines)), {})[text(place, row)] = _line(row, cells)
    empty = [""] * len(cells)
    return _table(
        caption,
        [column.title for column in lines] + [text(cell.title, row) for row in heads.values() for cell in cells],
        [*lines, *list(cells) * len(heads)],
        [[*name, *(cell for each in heads for cell in own.get(each, empty))] for name, own in found.items()],
    )


def more(table: Table, rows: Iterable[Sequence[str]]) -> Table:
    """A table with further lines below; missing cells are empty."""
    full = [[*row, *[""] * (len(table.columns) - len(row))] for row in rows]
    return replace(table, rows=[*table.rows, *full])


def groups(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    """Rows that agree in these columns, together, in the order of their first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def markdown(table: Table) -> str:
    """The table in Markdown, without its caption."""
    rule = ("---:" if place in table.numeric else "---" for place in range(len(table.columns)))
    return "\n".join([_markdown_line(table.columns), f"|{'|'.join(rule)}|", *map(_markdown_line, table.rows)])


def document(*blocks: Table | str) -> str:
    """Tables and paragraphs in Markdown, an empty line between them."""
    texts = (markdown(block) if isinstance(block, Table) else block for block in blocks)
    return "\n\n".join(each.rstrip() for each in texts) + "\n"


def terminal(table: Table) -> RichTable:
    """The table for the terminal, without marks of Markdown."""
    shown = RichTable(
        title=table.caption or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for place, title in enumerate(table.columns):
        right = place in table.numeric
        shown.add_column(_plain(title), justify="right" if right else "left", no_wrap=right)
    for row in table.rows:
        shown.add_row(*map(_plain, row))
    return shown


def _table(caption: str, titles: Sequence[str], columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    right = frozenset(place for place, column in enumerate(columns) if not column.left)
    return Table(caption, titles, rows, right)


def _line(row: Row, columns: Sequence[Column]) -> list[str]:
    return [text(column.show, row) for column in columns]


def _markdown_line(cells: Sequence[str]) -> str:
    return f"|{'|'.join(cell if cell.isspace() else f' {cell} ' for cell in cells)}|"


def _plain(cell: str) -> Text:
    return Text(re.sub(r"[`*]", "", cell))
