"""Writes a report as a Markdown file with PNG files in a folder next to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from ds_al.figures import charts, timeline
from ds_al.figures.parts import Chart, Content, Section, Table, Timeline


def write_markdown(content: Content, path: str | Path) -> list[Path]:
    """Writes ``path`` and the pictures ``<path without suffix>-figures/*.png``.

    Args:
        content: see :func:`ds_al.report.content.content`.
        path: the Markdown file.

    Returns:
        The path of the Markdown file, then those of its pictures.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}-figures")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [_draw(chart, folder / f"{chart.key}.png") for section in content.sections for chart in section.charts]
    lines = [f"# {_escape(content.title)}", "", f"**{_escape(content.question)}**", "", f"Made {content.made}."]
    for section in content.sections:
        lines += _section(section, folder.name)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [path, *pictures]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Collection[int] = ()) -> list[str]:
    """Returns the lines of a table whose cells are Markdown.

    Args:
        columns: headings.
        rows: cells of each row.
        numeric: indices of right-aligned columns.
    """
    return [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---:' if number in numeric else '---' for number in range(len(columns)))}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _draw(chart: Chart | Timeline, path: Path) -> Path:
    return (timeline.draw([chart], path) if isinstance(chart, Timeline) else charts.draw([chart], path))[0]


def _section(section: Section, folder: str) -> Iterator[str]:
    yield from ("", f"## {_escape(section.title)}")
    if section.warnings:
        yield from ("", "**Not fully.** The runs differ:", "")
        yield from (f"- {_escape(sentence)}" for sentence in section.warnings)
    for paragraph in section.paragraphs:
        yield from ("", _escape(paragraph))
    for each in section.tables:
        yield from _table(each)
    for chart in section.charts:
        yield from _chart(chart, folder)
    if section.commands:
        yield ""
        # An indented block has no fence that a command could close.
        yield from (f"    {line}" for command in section.commands for line in command.splitlines())


def _chart(chart: Chart | Timeline, folder: str) -> Iterator[str]:
    yield from ("", f"### {_escape(chart.title)}", "", _escape(chart.description), "")
    yield f"![{_escape(chart.title)}]({folder.replace(' ', '%20')}/{chart.key}.png)"
    if chart.table is not None:
        yield from _table(chart.table)


def _table(content: Table) -> Iterator[str]:
    yield from ("", f"*{_escape(content.caption)}*", "")
    rows = [list(map(_escape, row)) for row in content.rows]
    yield from table(list(map(_escape, content.columns)), rows, numeric=content.numeric)


def _escape(text: str) -> str:
    """Escapes text for Markdown, so that nothing in a file becomes a link, an element or a new cell."""
    return re.sub(r"([\\`*_\[\]<>|$])", r"\\\1", " ".join(text.split()))
