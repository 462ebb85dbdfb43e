"""Writes a report as a Markdown text with PNG files in a folder beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ds_al.figures.parts import Chart, Content, Section, Table, Timeline
from ds_al.figures.pictures import draw


def write_markdown(content: Content, path: str | Path) -> list[Path]:
    """Writes ``path`` and the pictures ``<path without suffix>-figures/*.png``.

    Args:
        content: of :func:`ds_al.report.content.content`.
        path: the Markdown file.

    Returns:
        The text's path, then those of its pictures.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}-figures")
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [draw(chart, folder / f"{chart.key}.png") for section in content.sections for chart in section.charts]
    lines = [f"# {_escape(content.title)}", "", f"**{_escape(content.question)}**", "", f"Made {content.made}."]
    for section in content.sections:
        lines += _section(section, folder.name)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [path, *pictures]


def _section(section: Section, folder: str) -> Iterator[str]:
    yield from ("", f"## {_escape(section.title)}")
    if section.warnings:
        yield from ("", "**Not fully.** The runs differ:", "")
        yield from (f"- {_escape(sentence)}" for sentence in section.warnings)
    for paragraph in section.paragraphs:
        yield from ("", _escape(paragraph))
    for table in section.tables:
        yield from _table(table)
    for chart in section.charts:
        yield from _chart(chart, folder)
    if section.commands:
        yield ""
        # An indented block: no fence that a command could close.
        yield from (f"    {line}" for command in section.commands for line in command.splitlines())


def _chart(chart: Chart | Timeline, folder: str) -> Iterator[str]:
    yield from ("", f"### {_escape(chart.title)}", "", _escape(chart.description), "")
    yield f"![{_escape(chart.title)}]({folder.replace(' ', '%20')}/{chart.key}.png)"
    yield from _table(chart.table)


def _table(table: Table) -> Iterator[str]:
    yield from ("", f"*{_escape(table.caption)}*", "")
    yield f"| {' | '.join(map(_escape, table.columns))} |"
    yield "|" + "|".join("---:" if number in table.numeric else "---" for number in range(len(table.columns))) + "|"
    yield from (f"| {' | '.join(map(_escape, row))} |" for row in table.rows)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: nothing in a file becomes a link, an element or a new cell."""
    return re.sub(r"([\\`*_\[\]<>|$])", r"\\\1", " ".join(text.split()))
