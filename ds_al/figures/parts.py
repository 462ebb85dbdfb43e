"""What a report is made of, before it is a page or a text: sections of paragraphs, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Table:
    """Cells are texts; ``numeric`` columns, counted from 0, are set flush right; the first one names its row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Series:
    """One line, or one group of bars.

    Attributes:
        x: positions, or names of bars.
        y: values; ``None`` leaves a gap.
        spread: sd of each value, or ``None``.
        style: number of the colour, dash and marker; series of one method or stage share it.
        look: ``line`` with markers, ``thin`` without, ``steps`` from value to value, ``mark`` for single points,
            or ``bar``.
        dashed: dashes instead of the style's own.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    style: int
    spread: Sequence[float | None] | None = None
    look: Literal["line", "thin", "steps", "mark", "bar"] = "line"
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines or bars, and the table that says the same in numbers."""

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    table: Table
    log_y: bool = False
    percent_y: bool = False


@dataclass(frozen=True)
class Slice:
    """A piece of a stage's time. Seconds from the start of the timeline."""

    stage: int
    kind: str
    start: float
    end: float
    text: str
    nested: bool = False


@dataclass(frozen=True)
class Timeline:
    """Who did what when: a row per stage.

    Attributes:
        zoom: seconds that are shown at first.
        end: seconds that are there.
    """

    key: str
    title: str
    description: str
    stages: int
    slices: Sequence[Slice]
    zoom: float
    end: float
    table: Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order."""

    key: str
    title: str
    paragraphs: Sequence[str] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart | Timeline] = ()
    commands: Sequence[str] = ()


def charts_or(key: str, title: str, charts: Sequence[Chart | Timeline], without: str) -> Section:
    """A section of charts; where there are none, of the sentence ``without``."""
    return Section(key, title, paragraphs=() if charts else (without,), charts=charts)


@dataclass(frozen=True)
class Content:
    """A whole report."""

    title: str
    question: str
    made: str
    sections: Sequence[Section] = field(default_factory=list)
