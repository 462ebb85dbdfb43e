"""Parts of reports, independent of the output format: tables, charts, timelines, sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Table:
    """A table of texts; ``numeric`` column indices are right-aligned; the first column names the row."""

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
        style: index of colour, dash and marker, shared by all series of a method or stage.
        spread: standard deviation of each value, or ``None``.
        look: ``line`` with markers, ``thin`` without, ``steps`` (each value applies since the previous point), ``mark``
            for single points, or ``bar``.
        dashed: whether to use dashes instead of the style's own.
        method: a key of :data:`~ds_al.figures.palette.METHODS`, whose style pictures use instead of ``style``.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    style: int
    spread: Sequence[float | None] | None = None
    look: Literal["line", "thin", "steps", "mark", "bar"] = "line"
    dashed: bool = False
    method: str | None = None


@dataclass(frozen=True)
class Chart:
    """Lines or bars, and a table with the same numbers.

    Attributes:
        key: unique in a report.
        log_x: whether the horizontal axis is logarithmic, with a tick at each position.
        log_y: whether the vertical axis is logarithmic, where the values span a power of ``base``.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    key: str = ""
    description: str = ""
    table: Table | None = None
    log_x: bool = False
    log_y: bool = False
    base: int = 10

    @property
    def shows_log_y(self) -> bool:
        """Whether the vertical axis is logarithmic: for a smaller range such an axis has hardly any labels."""
        values = [value for series in self.series for value in series.y if value and value > 0]
        return self.log_y and bool(values) and max(values) >= self.base * min(values)


@dataclass(frozen=True)
class Slice:
    """A time interval of a row, in seconds from the start of the timeline.

    Attributes:
        kind: a key of :data:`~ds_al.figures.palette.KINDS`.
        text: tooltip.
        label: text inside the slice, if it fits.
        faint: whether the slice is drawn lighter than others of its kind.
        nested: whether the slice is part of another slice.
    """

    row: int
    kind: str
    start: float
    end: float
    text: str = ""
    label: str = ""
    faint: bool = False
    nested: bool = False


@dataclass(frozen=True)
class Timeline:
    """A timeline of rows of slices.

    Attributes:
        rows: names of the rows.
        end: length in seconds.
        zoom: seconds that are initially visible; all, if ``None``.
        path: row, start and end of each part of the critical path.
        key: unique in a report.
    """

    title: str
    rows: Sequence[str]
    slices: Sequence[Slice]
    end: float
    zoom: float | None = None
    path: Sequence[tuple[int, float, float]] = ()
    x_label: str = "seconds"
    key: str = ""
    description: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A heading and its content, in this order."""

    key: str
    title: str
    paragraphs: Sequence[str] = ()
    warnings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart | Timeline] = ()
    commands: Sequence[str] = ()


def charts_or(key: str, title: str, charts: Sequence[Chart | Timeline], without: str) -> Section:
    """Returns a section of charts, or of the sentence ``without`` if there are none."""
    return Section(key, title, paragraphs=() if charts else (without,), charts=charts)


@dataclass(frozen=True)
class Content:
    """A whole report."""

    title: str
    question: str
    made: str
    sections: Sequence[Section] = field(default_factory=list)
