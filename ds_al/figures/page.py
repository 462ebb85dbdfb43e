"""Writes a report as one HTML page that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from ds_al.errors import ALReportError
from ds_al.figures import charts
from ds_al.figures.parts import Content


def write_page(content: Content, path: str | Path) -> Path:
    """Writes the page, creating its folder.

    Args:
        content: of :func:`ds_al.report.content.content`.
        path: the HTML file.

    Raises:
        ALReportError: plotly or jinja2 is not installed.
    """
    path = Path(path)
    text = render(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def render(content: Content) -> str:
    """The page as a text.

    Raises:
        ALReportError: plotly or jinja2 is not installed.
    """
    charts.library()
    try:
        jinja2: Any = import_module("jinja2")
    except ImportError as error:
        raise ALReportError(f"a report needs jinja2: pip install 'ds_al[report]' ({error})") from error
    plotly = import_module("plotly.offline").get_plotlyjs()
    # Inside <script> these would end it, or hide its end.
    plotly = plotly.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    script = _own("page.js")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = {chart.key: _json(chart) for section in content.sections for chart in section.charts}
    return environment.from_string(_own("page.html.j2")).render(
        content=content,
        figures=drawn,
        style=_own("page.css"),
        plotly=plotly,
        script=script,
        hashes=[_hash(plotly), _hash(script)],
    )


def _own(name: str) -> str:
    return resources.files("ds_al.figures").joinpath(name).read_text(encoding="utf-8")


def _json(chart: Any) -> str:
    """A figure for a ``<script type="application/json">``, which no ``<`` of a file can end."""
    value = json.loads(charts.figure(chart).to_json())
    value["layout"].pop("template", None)
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    """What a content security policy names an inline script by, so that no other one runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
