"""Declares the tables of the language model study: perplexity by method and exit, trials, published results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.tables.write import Column, Template, listed

TWIN = "backprop"
"""Method name of the backprop twin, which has no K, no bridge and one exit."""

TITLES = {
    "tokens": "equal tokens",
    "operations": "equal operations",
    "longer": "equal operations, longer training",
}
"""Titles of the budgets."""

PUBLISHED = (
    (2, "340M", 29.05, 28.04),
    (4, "340M", 31.19, 28.04),
    (2, "1.3B", 22.29, 21.61),
    (4, "1.3B", 23.59, 21.61),
    (2, "2B", 21.57, 20.93),
    (4, "2B", 22.21, 20.93),
)
"""K, parameters, WikiText perplexity of local learning and of backprop: Yin et al., "SOLO", arXiv 2609.35440, 2026."""


def perplexity(rows: Sequence[Row]) -> Table:
    """Returns one line per method and K."""

    def local(show: Callable[[Row], str], column: str = "method") -> Callable[[Row], str]:
        return lambda row: "" if row["method"] == TWIN or row[column] is None else show(row)

    columns: dict[str, Template] = {
        "method": "`{method}`",
        "K": local(lambda row: str(row["K"])),
        "H": "{bridge_blocks}",
        "lr": "{lr:g}",
        "seeds": "{seeds}",
        "tokens": "{tokens:,}",
        "operations per token": lambda row: f"{row['operations_per_token'] / 1e6:.2f} M",
        "perplexity": lambda row: _spread(row["perplexity"], row["perplexity_sd"]),
        "gap": local(lambda row: _spread(row["gap"], row["gap_sd"], sign="+"), "gap"),
        "ratio": local(lambda row: f"{row['ratio']:.3f}", "gap"),
        "to `backprop_sampled`": local(lambda row: f"{row['ratio_sampled']:.3f}", "ratio_sampled"),
        "at each exit": local(lambda row: ", ".join(f"{value:.1f}" for value in row["exits"])),
    }
    return listed(rows, [Column(title, show, left=True) for title, show in columns.items()])


def trials(rows: Sequence[Row]) -> Table:
    """Returns all trials and the chosen settings of each method and K.

    Args:
        rows: ``method, K, tried, chosen``.
    """
    columns: dict[str, Template] = {
        "method": "`{method}`",
        "K": "{K}",
        "validation perplexity of each trial": "{tried}",
        "chosen": "{chosen}",
    }
    return listed(rows, [Column(title, show, left=True) for title, show in columns.items()])


def speed(rows: Sequence[Row]) -> Table:
    """Returns one line per method and K: the time of a step and its operations, beside the twin's."""
    columns: dict[str, Template] = {
        "method": "`{method}`",
        "K": "{K}",
        "H": "{bridge_blocks}",
        "step, ms": "{step_ms:.1f}",
        "twin, ms": "{twin_ms:.1f}",
        "times as long (quartiles)": "{times_as_long:.2f} ({times_low:.2f} to {times_high:.2f})",
        "times the operations": "{times_operations:.2f}",
        "pairs": "{repeats}",
    }
    return listed(rows, [Column(title, show, left=True) for title, show in columns.items()])


def published() -> Table:
    """Returns the published perplexities."""
    names = ("K", "size", "local", "backprop")
    rows = [dict(zip(names, figures, strict=True)) for figures in PUBLISHED]
    columns: dict[str, Template] = {
        "parameters": "{size}",
        "K": "{K}",
        "local": "{local:.2f}",
        "backprop": "{backprop:.2f}",
        "gap": lambda row: f"{row['local'] - row['backprop']:+.2f}",
        "ratio": lambda row: f"{row['local'] / row['backprop']:.3f}",
    }
    return listed(rows, [Column(title, show, left=True) for title, show in columns.items()])


def _spread(mean: float, sd: float | None, *, sign: str = "") -> str:
    return f"{mean:{sign}.2f}" + ("" if sd is None else f" ± {sd:.2f}")
