"""Builds the sections of results per stage: memory, bytes, idle time."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.parts import NOT_RECORDED, Chart, Section, Series, Table, charts_or
from ds_al.report import texts
from ds_al.report.cells import Cell, styled
from ds_al.report.timelines import held


def memory(cells: Sequence[Cell]) -> Section:
    """Builds the charts of activations held by each stage, also over time if a trace recorded it."""
    chart = _bars(
        cells,
        key="memory",
        fact="peak_activation_bytes",
        title="Activations held for backward",
        description="Most bytes of activations that a stage held for backward during the first batch.",
        unit="MiB",
        scale=1 / 2**20,
    )
    charts: list[Chart] = [chart] if chart else []
    for index, cell in enumerate(cells, start=1):
        run = next((run for run in cell.shown if run.trace), None)
        found = run and held(run, label=cell.label, key=f"held-{index}")
        charts += [found] if found else []
    return charts_or("memory", "Memory", charts, "Activations held were not recorded.")


def sent(cells: Sequence[Cell]) -> Section:
    """Builds the chart of bytes sent by each stage."""
    chart = _bars(
        cells,
        key="bytes",
        fact="bytes_sent",
        title="Bytes sent in training",
        description="Bytes that a stage sent on to its neighbours in all epochs.",
        unit="MiB",
        scale=1 / 2**20,
    )
    without = [cell.label for cell in cells if not cell.per_stage("bytes_sent")]
    section = charts_or("bytes", "Bytes", [chart] if chart else [], "Bytes sent were not recorded.")
    if chart and without:
        return Section(
            section.key, section.title, paragraphs=(f"Not recorded for {', '.join(without)}.",), charts=section.charts
        )
    return section


def idle(cells: Sequence[Cell]) -> Section:
    """Builds the chart of each stage's idle share of the training time."""
    chart = _bars(
        cells,
        key="idle",
        fact="idle",
        title="Idle time of each stage",
        description="Share of the training time in which a stage did not compute.",
        unit="%",
        scale=100,
    )
    return charts_or("idle", "Idle time per stage", [chart] if chart else [], "Idle times were not recorded.")


def _bars(
    cells: Sequence[Cell], *, key: str, fact: str, title: str, description: str, unit: str, scale: float
) -> Chart | None:
    found = {(style, cell.label): cell.per_stage(fact) for style, cell in styled(cells)}
    stages = max(map(len, found.values()), default=0)
    if not stages:
        return None
    series = [
        Series(
            name=label,
            x=[f"stage {stage}" for stage in range(len(values))],
            y=[None if one.mean is None else one.mean * scale for one in values],
            spread=[None if one.sd is None else one.sd * scale for one in values],
            style=style,
            look="bar",
        )
        for (style, label), values in found.items()
        if values
    ]
    rows = []
    for (_, label), values in found.items():
        known = [texts.with_sd(one, 2, scale=scale, unit=f" {unit}") for one in values] or [NOT_RECORDED]
        rows.append([label, *known, *[""] * (stages - len(known))])
    columns = ["method", *(f"stage {stage}" for stage in range(stages))]
    return Chart(
        key=key,
        title=title,
        description=f"{description} Mean over seeds; the whisker is the standard deviation.",
        x_label="",
        y_label="% of training time" if unit == "%" else unit,
        series=series,
        table=Table(f"{title}, by stage", columns, rows, frozenset(range(1, stages + 1))),
    )
