"""Writes a report as one self-contained HTML page, whose figures are drawn by inline scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from ds_al.figures import palette
from ds_al.figures.charts import look
from ds_al.figures.parts import Chart, Content, Timeline


def write_page(content: Content, path: str | Path) -> Path:
    """Writes the page, and creates its folder.

    Args:
        content: see :func:`ds_al.report.content.content`.
        path: the HTML file.
    """
    path = Path(path)
    text = render(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def render(content: Content) -> str:
    """Returns the page as HTML."""
    scripts = [_own("charts.js"), _own("page.js")]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = {chart.key: _json(chart) for section in content.sections for chart in section.charts}
    return environment.from_string(_own("page.html.j2")).render(
        content=content,
        figures=drawn,
        style=_own("page.css"),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
    )


def _own(name: str) -> str:
    return resources.files("ds_al.figures").joinpath(name).read_text(encoding="utf-8")


def _json(chart: Chart | Timeline) -> str:
    """Returns a figure for a ``<script type="application/json">``, with every ``<`` escaped."""
    value = _timeline(chart) if isinstance(chart, Timeline) else _chart(chart)
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart(chart: Chart) -> dict[str, Any]:
    series = []
    for each in chart.series:
        colour, style = look(each.style)
        series.append(
            {
                "name": each.name,
                "x": list(each.x),
                "y": [_short(value) for value in each.y],
                "spread": [_short(value) for value in each.spread] if each.spread else None,
                "look": each.look,
                "style": style,
                "dashed": each.dashed,
                "colour": colour,
            }
        )
    return {
        "x_label": chart.x_label,
        "y_label": chart.y_label,
        "log": chart.shows_log_y,
        "whole": chart.x_label.startswith(("epoch", "exit")),
        "series": series,
    }


def _timeline(chart: Timeline) -> dict[str, Any]:
    kinds = {name: number for number, name in enumerate(palette.KINDS)}
    return {
        "rows": list(chart.rows),
        "end": round(chart.end, 6),
        "zoom": round(chart.end if chart.zoom is None else chart.zoom, 6),
        "kinds": [
            # The page draws black in its text colour, which is white on a dark page.
            {"name": name, "colour": None if kind.colour == palette.BLACK else kind.colour, "hatch": kind.hatch}
            for name, kind in palette.KINDS.items()
        ],
        "slices": [
            [piece.row, kinds[piece.kind], round(piece.start, 6), round(piece.end, 6), piece.text, int(piece.nested)]
            for piece in chart.slices
        ],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _hash(script: str) -> str:
    """Returns the hash by which a content security policy allows an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
