"""Extracts the quantities that the page and the figures on many stages show from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_al.planner.predict import AL
from ds_al.planner.stragglers import Jitter
from ds_al.studies.scale.predictions import BLOCKS, LARGE

Row = Mapping[str, Any]
FORMULA = ("bp_interleaved", "bp_dualpipev", "bp_async", "bp_dp")


def rows_of(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def row_of(rows: Sequence[Row], **wanted: Any) -> Row:
    return rows_of(rows, **wanted)[0]


def steps_always(row: Row) -> bool:
    return row["steps_per_batch"] == row["micro_batches"]


def over_1f1b(rows: Sequence[Row], row: Row) -> float:
    """Returns the speed of a row relative to 1F1B with the same number of micro-batches."""
    return row_of(rows, method="bp_1f1b", micro_batches=row["micro_batches"])["seconds"] / row["seconds"]


def series(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Returns ``(M, speed relative to 1F1B)`` for each method and for the upper bound of streaming."""
    own = rows_of(rows, section="sweep")
    stages = own[0]["stages"]
    found: dict[str, list[tuple[int, float]]] = {}
    for row in own:
        m, method = row["micro_batches"], row["method"]
        if method == "bp_1f1b":
            found.setdefault("bound (M + P - 1) / (M rho)", []).append((m, (m + stages - 1) / (m * LARGE.rho)))
            continue
        name = method if method != "streaming" or steps_always(row) else "streaming, one step per batch"
        found.setdefault(name, []).append((m, over_1f1b(own, row)))
    return found


def share_of_alone(row: Row) -> tuple[float, float]:
    """Returns throughput relative to a single stage with the same jitter, and its standard deviation over runs."""
    local = row["method"] in AL
    block = next(block for block in BLOCKS if block.name == row["workload"])
    computing = row["micro_batches"] * 3 * block.forward * (block.rho if local else 1.0)
    alone = computing * Jitter.parse(row["jitter"]).mean + row["steps_per_batch"] * block.work(1).step
    share = alone / row["seconds"]
    return share, share * row["spread"] / row["seconds"]
