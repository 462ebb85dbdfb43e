"""Exits in the summary and the figures of a run: accuracy and cost of inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.exits import EarlyExit
from ds_al.figures import palette
from ds_al.models.exit_cost import ExitCost, averaged_exits, fixed_exit, tried_exits


def exit_rows(accuracy: Sequence[float], costs: Sequence[ExitCost]) -> list[dict[str, Any]]:
    """Makes one row per exit, where all samples leave there: ``exit, accuracy, flops, cost``.

    ``flops`` counts a forward pass per sample; ``cost`` is its share of the full inference path.
    """
    flops = fixed_exit(costs)
    return [
        {"exit": number, "accuracy": right, "flops": own, "cost": own / flops[-1]}
        for number, (right, own) in enumerate(zip(accuracy, flops, strict=True), start=1)
    ]


def averaged_rows(accuracy: Sequence[float], costs: Sequence[ExitCost]) -> list[dict[str, Any]]:
    """Makes one row per n, where the last n exits are averaged: ``averaged, accuracy, flops, cost``, units as above."""
    flops = averaged_exits(costs)
    return [
        {"averaged": n, "accuracy": right, "flops": own, "cost": own / flops[0]}
        for n, (right, own) in enumerate(zip(accuracy, flops, strict=True), start=1)
    ]


def confidence_rows(outcomes: Sequence[EarlyExit], costs: Sequence[ExitCost]) -> list[dict[str, Any]]:
    """Makes one row per threshold: ``confidence, accuracy, left, flops, cost``, in the units of :func:`exit_rows`.

    The cost of a sample includes all exits it reached, so a threshold of 1 costs more than the full path alone.
    """
    full = fixed_exit(costs)[-1]
    flops = [tried_exits(costs, outcome.left) for outcome in outcomes]
    return [
        {"confidence": each.confidence, "accuracy": each.accuracy, "left": each.left, "flops": own, "cost": own / full}
        for each, own in zip(outcomes, flops, strict=True)
    ]


def draw_exits(exits: Sequence[Mapping[str, Any]], confidence: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws accuracy against cost: every exit as a point, and the thresholds as a curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for rows, key, colour, style, label in (
        (exits, "exit", palette.VERMILION, "s--", "all samples leave at exit"),
        (confidence, "confidence", palette.BLUE, "o-", "leave when this confident"),
    ):
        x, y = [100 * row["cost"] for row in rows], [100 * row["accuracy"] for row in rows]
        axes.plot(x, y, style, color=colour, label=label)
        for row, place in zip(rows, zip(x, y, strict=True), strict=True):
            axes.annotate(f"{row[key]:g}", place, xytext=(3, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="operations per sample, % of the full inference path", ylabel="accuracy, %", title="early exit")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, facecolor="white")
