"""How much throughput a slow link leaves, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures import palette
from ds_al.studies.bench.link_tables import PUBLISHED, PUBLISHED_MBIT

_STYLES = {
    ("streaming", "fp32"): (*palette.METHODS["streaming"], "AL fp32"),
    ("streaming", "bf16"): (palette.SKY, "--", "s", "AL bf16"),
    ("streaming", "int8"): (palette.GREEN, "-.", "D", "AL int8"),
    ("bp_1f1b", "fp32"): (*palette.METHODS["bp_1f1b"], "1F1B"),
}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draws samples per second, and throughput beside no limit, over the rate; with the published numbers.

    Returns:
        The files: PNG and SVG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    rates = sorted({row["rate_mbit"] for row in rows if row["rate_mbit"] is not None})
    places = {**{rate: place for place, rate in enumerate(rates)}, None: len(rates)}
    figure = Figure(figsize=(10, 4.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    titles = {"samples_per_s": "samples per second", "relative_to_unlimited": "share of the throughput without a limit"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for form, (colour, dash, marker, label) in _STYLES.items():
            own = {row["rate_mbit"]: row[column] for row in rows if (row["method"], row["message_dtype"]) == form}
            along = sorted((places[rate], value) for rate, value in own.items())
            axes.plot(*zip(*along, strict=True), color=colour, linestyle=dash, marker=marker, label=label)
        axes.set_xticks(range(len(rates) + 1), [*(f"{rate:g}" for rate in rates), "no limit"])
        axes.set_xlabel("Mbit/s, each way")
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if PUBLISHED_MBIT in places:
        place = places[PUBLISHED_MBIT]
        for method, change in PUBLISHED.items():
            colour, _, marker, _ = _STYLES[method, "fp32"]
            name = "local learning" if method == "streaming" else "back-propagation"
            panels[1].scatter(
                place, 1 + change, s=90, facecolors="none", edgecolors=colour, marker=marker, zorder=3,
                label=f"published, {name}",
            )  # fmt: skip
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130, facecolor="white", metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
