"""Tabulates accuracy and cost of a sweep's exits: each exit, the mean of several, and early exit by confidence."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Row = dict[str, Any]


def exit_table(results: Sequence[Result]) -> list[Row]:
    """Rows ``group, method, K, P, seeds, exit, averaged, confidence, accuracy, accuracy_sd, cost``, means over seeds.

    Each row has one of: the ``exit`` at which all samples leave, the number of last exits that are ``averaged``, or the
    ``confidence`` at which each sample leaves; the other two are ``None``. ``cost`` is the share of the operations of
    the full inference path.
    """
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if result.get("exits"):
            found.setdefault((result["group"], result["suite_method"], result["K"], result["P"]), []).append(result)
    rows = []
    for key, run in found.items():
        for part, name in (("exits", "exit"), ("averaged", "averaged"), ("early_exit", "confidence")):
            for same in zip(*(result.get(part) or () for result in run), strict=True):
                accuracy = [row["accuracy"] for row in same]
                rows.append({
                    **dict(zip(("group", "method", "K", "P"), key, strict=True)), "seeds": len(run),
                    "exit": None, "averaged": None, "confidence": None, name: same[0][name],
                    "accuracy": statistics.mean(accuracy),
                    "accuracy_sd": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
                    "cost": statistics.mean(row["cost"] for row in same),
                })  # fmt: skip
    return rows
