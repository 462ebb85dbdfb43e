"""The live table: one row per stage, and a sentence about the slowest stage, for which the others wait."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from ds_al.trace import StageMetrics

_MARGIN = 1.15  # a stage is marked when its busy share is more than this many times that of any other
_KEEP = 0.7  # weight of the old average at every update


@dataclass(frozen=True)
class Slowest:
    """The slowest stage, for which the others wait."""

    stage: int
    share: float
    """Its share of the busy time of all stages."""


def slowest(busy: Mapping[int, float]) -> Slowest | None:
    """Finds the stage that is clearly busier than all others: it sets the throughput of the pipeline.

    ``busy`` has the share of time in which a stage did not wait for others; NaN where unknown.
    """
    known = sorted(((share, stage) for stage, share in busy.items() if not math.isnan(share)), reverse=True)
    if len(known) < 2 or known[0][0] <= _MARGIN * known[1][0]:
        return None
    most, stage = known[0]
    return Slowest(stage, most / sum(share for share, _ in known))


def advice(found: Slowest, *, data: float, layers: int, partition_method: str) -> str:
    """Writes one sentence about the slowest stage: its share of the time, and what to try.

    ``data`` is the share of its own time that the stage spends on the data iterator.
    """
    text = f"stage {found.stage} is the slowest: {found.share:.0%} of the time goes there; "
    if data > 0.5:
        return text + f"{data:.0%} of its own is spent on the data iterator: load ahead, in workers"
    if layers == 1:
        return text + "no partition_method divides the one layer it has: divide the layer, or use fewer stages"
    if partition_method == "measured":
        return text + "no other cut of these layers is better: divide its layers, or use fewer stages"
    return text + "try partition_method: measured"


class Averages:
    """Running averages of the busy shares of stages: a single batch may be short."""

    def __init__(self) -> None:
        self._busy: dict[int, float] = {}

    def busy(self, stage_metrics: Mapping[int, StageMetrics]) -> dict[int, float]:
        """Adds the latest metrics, and returns the averaged busy shares."""
        for stage, now in stage_metrics.items():
            before = self._busy.get(stage, math.nan)
            self._busy[stage] = now.busy if math.isnan(before) else _KEEP * before + (1 - _KEEP) * now.busy
        return self._busy


def stage_table(
    stage_metrics: Mapping[int, StageMetrics],
    busy: Mapping[int, float],
    losses: Iterable[Sequence[float]],
    marked: Slowest | None,
) -> Table:
    """Makes a table with one row per stage.

    Args:
        stage_metrics: latest metrics by stage; stages without metrics get no row.
        busy: busy shares to show in place of those of ``stage_metrics``.
        losses: losses of these stages, in the same order: associated and autoencoder loss, or one loss.
        marked: stage whose row is highlighted.
    """
    rows = list(zip(stage_metrics.items(), losses, strict=True))
    names = ["loss"] if all(len(values) == 1 for _, values in rows) else ["associated", "autoencoder"]
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    skipping = any(now.skipped > 0 for (_, now), _ in rows)
    if skipping:
        names = ["skipped", *names]
    for column in ("stage", "micro-batch", "samples/s", "busy", "queue full", *names):
        table.add_column(column, justify="right")
    for (stage, now), values in rows:
        mark, style = ("> ", "bold yellow") if marked is not None and marked.stage == stage else ("", "")
        table.add_row(
            f"{mark}{stage}",
            _format(now.micro_batches, ",.0f"),
            _format(now.samples_per_second, ",.0f"),
            _format(busy[stage], ".0%"),
            _format(now.queue_full, ".0%"),
            *([_format(now.skipped, ",.0f")] if skipping else []),
            *(_format(value, ".4f") for value in values),
            style=style,
        )
    return table


def _format(value: float, spec: str) -> str:
    return "-" if math.isnan(value) else format(value, spec)
