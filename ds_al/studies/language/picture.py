"""Draws the perplexity of language models at each exit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from ds_al.figures import palette
from ds_al.figures.pictures import blank, legend, save
from ds_al.studies.results import Row
from ds_al.studies.tables.language import TITLES, TWIN


def draw_perplexity(table: Sequence[Row], path: Path) -> list[Path]:
    """Draws the perplexity of each exit by budget and K; what has one exit, the twin among them, is a line across.

    Returns:
        The file, a PNG.
    """
    local = [row for row in table if row["K"] > 1]
    depths = sorted({row["K"] for row in local}) or [1]
    budgets = list(dict.fromkeys(row["budget"] for row in local)) or ["tokens"]
    styles = zip(cycle(palette.SERIES), cycle(palette.MARKERS), strict=False)
    looks = dict(zip(dict.fromkeys(row["method"] for row in local), styles, strict=False))
    size = (4.5 * len(depths), 4.2 * len(budgets))
    figure, panels = blank(len(budgets), len(depths), size=size)
    shown = [(budget, layers) for budget in budgets for layers in depths]
    for axes, (budget, layers) in zip(panels, shown, strict=True):
        exits = range(1, layers + 1)
        for row in local:
            if (row["budget"], row["K"]) == (budget, layers):
                colour, marker = looks[row["method"]]
                axes.plot(exits, row["exits"], color=colour, marker=marker, label=row["method"])
        for row in table:
            of_twin = "tokens" if budget == "operations" else budget  # it has the same run at both
            if row["K"] == 1 and row["budget"] == (of_twin if row["method"] == TWIN else budget):
                dash = "--" if row["method"] == TWIN else ":"
                axes.axhline(row["perplexity"], color="black", linestyle=dash, label=row["method"])
        axes.set(title=f"{TITLES[budget]}, K = {layers}", xlabel="exit after layer", ylabel="test perplexity")
        axes.set(xticks=exits)
        axes.grid(alpha=0.3)
    legend(figure, panels[0], "outside upper center", columns=6)
    return save(figure, path, suffixes=(".png",), dpi=120)
