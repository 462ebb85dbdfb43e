"""Builds tables from columns and rows, and writes them as Markdown or to the terminal.

A column formats its cells with a template over the names of a row: ``{seconds:.2f} s``. A name may have a factor or a
divisor: ``{efficiency*100:.1f} %``, ``{peak_bytes/1024:,.0f}``.
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
"""A heading or cell that is blank on purpose; cells without a value are empty texts."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: heading; in :func:`crossed` a template.
        show: the text of a cell, as a template or as a function of the row.
        left: whether the column is left-aligned.
    """

    title: str
    show: Template
    left: bool = False


def text(template: Template, row: Row) -> str:
    """Returns the text of a cell."""
    if not isinstance(template, str):
        return template(row)
    return _FIELD.sub(lambda match: _value(row, *match.groups()), template)


_FIELD = re.compile(r"\{(\w+)(?:([*/])(\d+))?(?::([^}]*))?\}")
"""Groups: name, operator, number, format."""


def _value(row: Row, name: str, sign: str | None, number: str | None, form: str | None) -> str:
    value = row[name]
    if number:
        value = value * int(number) if sign == "*" else value / int(number)
    return format(value, form or "")


def number(name: str, form: str, *, unit: str = "", times: float = 1, missing: str = "-") -> Callable[[Row], str]:
    """Returns a template for a number that may be ``None``."""

    def show(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return missing
        return f"{value if times == 1 else times * value:{form}}{unit}"

    return show


def listed(rows: Iterable[Row], columns: Sequence[Column], *, caption: str = "") -> Table:
    """Returns a table with one line per row."""
    return _table(caption, [column.title for column in columns], columns, [_line(row, columns) for row in rows])


def crossed(
    rows: Sequence[Row], lines: Sequence[Column], cells: Sequence[Column], *, by: str = "", caption: str = ""
) -> Table:
    """Returns a pivot table: a line for each value of some columns, and repeated cells for each value of others.

    Args:
        rows: the rows.
        lines: columns at the left, whose texts identify a line.
        cells: repeated columns; the title of the first one, such as ``M = {micro_batches}``, identifies the position
            of a row. Cells without a row are empty.
        by: name of the value by which positions are sorted; by default they keep the order of the rows.
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
    """Returns the table with additional lines; missing cells are empty."""
    full = [[*row, *[""] * (len(table.columns) - len(row))] for row in rows]
    return replace(table, rows=[*table.rows, *full])


def groups(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    """Groups rows with equal values in these columns, in the order of first occurrence."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def markdown(table: Table) -> str:
    """Returns the table in Markdown, without its caption."""
    rule = ("---:" if place in table.numeric else "---" for place in range(len(table.columns)))
    return "\n".join([_markdown_line(table.columns), f"|{'|'.join(rule)}|", *map(_markdown_line, table.rows)])


def document(*blocks: Table | str) -> str:
    """Returns tables and paragraphs in Markdown, separated by empty lines."""
    texts = (markdown(block) if isinstance(block, Table) else block for block in blocks)
    return "\n\n".join(each.rstrip() for each in texts) + "\n"


def terminal(table: Table) -> RichTable:
    """Returns the table for the terminal, without Markdown markup."""
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
    kept = (cell.replace("|", r"\|") for cell in cells)
    return f"|{'|'.join(cell if cell.isspace() else f' {cell} ' for cell in kept)}|"


def _plain(cell: str) -> Text:
    return Text(re.sub(r"[`*]", "", cell))
