"""Draws charts and timelines with plotly. Colours that depend on the theme are left to the page's script."""

from __future__ import annotations

import html
import importlib
from collections.abc import Sequence
from typing import Any

from ds_al.errors import ALReportError
from ds_al.figures import palette
from ds_al.figures.parts import Chart, Series, Slice, Timeline
from ds_al.report.timelines import BUSY, KINDS

COLOURS = palette.SERIES
DASHES = ("solid", "dot", "dashdot", "longdash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
PATTERNS = ("", "/", "x", ".", "\\", "-")
GREY = "#8a8f98"
EDGE = "rgba(0,0,0,0.45)"  # between two forwards

KIND_COLOURS = {"forward": palette.FORWARD, "backward": palette.BACKWARD, "evaluation": palette.EVALUATION}
KIND_PATTERNS = {"receive": "/", "send": "\\", "load data": ".", "barrier": "x", "evaluation": "-", "other": "|"}


def library() -> Any:
    """``plotly.graph_objects``.

    Raises:
        ALReportError: plotly is not installed.
    """
    try:
        return importlib.import_module("plotly.graph_objects")
    except ImportError as error:
        raise ALReportError(f"a report needs plotly: pip install 'ds_al[report]' ({error})") from error


def figure(chart: Chart | Timeline) -> Any:
    """The plotly figure of a chart; its texts are escaped."""
    return _timeline(chart) if isinstance(chart, Timeline) else _chart(chart)


def look(style: int) -> tuple[str, int]:
    """A colour, and the number of a dash, marker or pattern: when colours come round again, those have moved on."""
    return COLOURS[style % len(COLOURS)], (style + style // len(COLOURS)) % len(COLOURS)


def _chart(chart: Chart) -> Any:
    go = library()
    drawn = go.Figure(layout=_layout(chart.x_label, chart.y_label))
    for series in chart.series:
        drawn.add_trace(_bar(go, series) if series.look == "bar" else _line(go, series))
    if chart.log_y and wide(chart):
        drawn.update_yaxes(type="log", exponentformat="power", dtick=1)
    if any(series.look == "bar" for series in chart.series):
        drawn.update_layout(barmode="group", bargap=0.25)
        drawn.update_yaxes(rangemode="tozero")
    elif chart.x_label.startswith(("epoch", "exit")):
        drawn.update_xaxes(tickformat="d", dtick=1 if _longest(chart) <= 20 else None)
    return drawn


def _line(go: Any, series: Series) -> Any:
    colour, shape = look(series.style)
    thin, steps = series.look == "thin", series.look == "steps"
    dash = "dash" if series.dashed else DASHES[shape]
    return go.Scatter(
        name=html.escape(series.name, quote=False),
        x=list(series.x),
        y=[_short(value) for value in series.y],
        error_y=_spread(series),
        mode={"thin": "lines", "steps": "lines", "mark": "markers"}.get(series.look, "lines+markers"),
        opacity=0.6 if thin else 1.0,
        line={
            "color": colour,
            "width": 1.2 if thin else 2.2,
            "dash": "solid" if thin else dash,
            "shape": "hv" if steps else "linear",
        },
        marker={
            "color": colour,
            "size": 14 if series.look == "mark" else 7,
            "symbol": "star" if series.look == "mark" else MARKERS[shape] + ("-open" if series.dashed else ""),
        },
        hovertemplate="%{fullData.name}<br>%{x:.4~g}: %{y:.4~g}<extra></extra>",
    )


def _bar(go: Any, series: Series) -> Any:
    colour, shape = look(series.style)
    return go.Bar(
        name=html.escape(series.name, quote=False),
        x=list(series.x),
        y=[_short(value) for value in series.y],
        error_y=_spread(series),
        marker={
            "color": colour,
            "line": {"width": 0},
            "pattern": {"shape": PATTERNS[shape], "fillmode": "overlay", "fgcolor": "#ffffff", "size": 8},
        },
        hovertemplate="%{fullData.name}<br>%{x}: %{y:.4~g}<extra></extra>",
    )


def _spread(series: Series) -> dict[str, Any] | None:
    if not series.spread or not any(series.spread):
        return None
    return {"type": "data", "array": [_short(value) or 0 for value in series.spread], "thickness": 1.4, "width": 4}


def _timeline(chart: Timeline) -> Any:
    go = library()
    drawn = go.Figure(layout=_layout("seconds", ""))
    nested = any(piece.nested for piece in chart.slices)
    for kind in KINDS:
        own = [piece for piece in chart.slices if piece.kind == kind and not piece.nested]
        if own:
            drawn.add_trace(_slices(go, own, kind=kind, name=kind, nested=nested))
    layers = [piece for piece in chart.slices if piece.nested]
    for kind in KINDS:
        own = [piece for piece in layers if piece.kind == kind]
        if own:
            drawn.add_trace(_slices(go, own, kind=kind, name=f"{kind} of a layer", nested=nested))
    drawn.update_layout(
        barmode="overlay",
        height=150 + 56 * chart.stages + (24 if nested else 0),
        hovermode="closest",
        dragmode="zoom",
        meta={"zoom": round(chart.zoom, 6), "end": round(chart.end, 6)},
    )
    drawn.update_xaxes(range=[0, round(chart.zoom, 6)], ticksuffix=" s", title=None)
    stages = list(range(chart.stages))
    drawn.update_yaxes(
        range=[chart.stages - 0.5, -0.5],
        fixedrange=True,  # zooming is in time alone
        tickvals=stages,
        ticktext=[f"stage {stage}" for stage in stages],
        showgrid=False,
    )
    return drawn


def _slices(go: Any, own: Sequence[Slice], *, kind: str, name: str, nested: bool) -> Any:
    layer = own[0].nested
    # With slices of layers, those lie in the lower part of a row.
    middle, width = (0.0, 0.8) if not nested else (0.28, 0.22) if layer else (-0.14, 0.56)
    waits = kind not in BUSY
    colour = KIND_COLOURS.get(kind, GREY)
    return go.Bar(
        name=name,
        orientation="h",
        base=[round(piece.start, 6) for piece in own],
        x=[round(piece.end - piece.start, 6) for piece in own],
        y=[piece.stage + middle for piece in own],
        width=width,
        opacity=0.7 if waits else 1.0,
        marker={
            "color": colour,
            "line": {
                "color": EDGE if not waits and kind != "step" else colour,
                "width": 1.0 if kind == "step" else 0.5,
            },
            "pattern": {"shape": KIND_PATTERNS[kind], "fillmode": "replace", "size": 6} if waits else None,
        },
        hovertext=[html.escape(piece.text, quote=False) for piece in own],
        hovertemplate="stage %{customdata}: %{hovertext}<br>from %{base:.5~g} s<extra></extra>",
        customdata=[piece.stage for piece in own],
        meta="ink" if kind == "step" else None,
    )


def _layout(x_label: str, y_label: str) -> dict[str, Any]:
    return {
        "template": "none",
        "height": 380,
        "margin": {"l": 64, "r": 16, "t": 32, "b": 48},
        "xaxis": {"title": {"text": x_label, "font": {"size": 13}}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y_label, "font": {"size": 13}}, "automargin": True, "zeroline": False},
        "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        "showlegend": True,
        "hovermode": "closest",
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def wide(chart: Chart) -> bool:
    """Whether the values span a power of ten: on less, a logarithmic axis has next to no labels."""
    values = [value for series in chart.series for value in series.y if value and value > 0]
    return bool(values) and max(values) >= 10 * min(values)


def _longest(chart: Chart) -> int:
    return max((len(series.x) for series in chart.series if series.look == "line"), default=0)
