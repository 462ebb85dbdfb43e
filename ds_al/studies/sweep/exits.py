"""What the exits of a suite's networks are worth: accuracy and cost at each, of several, and of leaving when sure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Row = dict[str, Any]

_HEADS = {
    "exit": "all samples leave at exit {}",
    "averaged": "mean of the last {}",
    "confidence": "confident to {}",
}


def exit_table(results: Sequence[Result]) -> list[Row]:
    """Rows ``group, method, K, P, seeds, exit, averaged, confidence, accuracy, accuracy_sd, cost``, means over seeds.

    A row is of an ``exit`` where all samples leave, of the last so many ``averaged``, or of a ``confidence`` at which
    each sample leaves; the others are ``None``. ``cost`` is the share of the operations of the full inference path.
    """
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if result.get("exits"):
            found.setdefault((result["group"], result["suite_method"], result["K"], result["P"]), []).append(result)
    rows = []
    for key, cell in found.items():
        for part, name in (("exits", "exit"), ("averaged", "averaged"), ("early_exit", "confidence")):
            for same in zip(*(result.get(part) or () for result in cell), strict=True):
                accuracy = [row["accuracy"] for row in same]
                rows.append({
                    **dict(zip(("group", "method", "K", "P"), key, strict=True)), "seeds": len(cell),
                    "exit": None, "averaged": None, "confidence": None, name: same[0][name],
                    "accuracy": statistics.mean(accuracy),
                    "accuracy_sd": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
                    "cost": statistics.mean(row["cost"] for row in same),
                })  # fmt: skip
    return rows


def exit_markdown(table: Sequence[Row], group: str) -> str:
    """One group's exits: accuracy at cost, all of them beside each other; empty where nothing is known of it."""
    own = [row for row in table if row["group"] == group]
    parts = []
    for name, head in _HEADS.items():
        rows = [row for row in own if row[name] is not None and (name, row[name]) != ("averaged", 1)]  # the last exit
        if not rows:
            continue
        columns = sorted({row[name] for row in rows})
        parts += [
            "",
            "| method | K | " + " | ".join(head.format(column) for column in columns) + " |",
            "|---|---:|" + "---:|" * len(columns),
        ]
        for method, layers, stages in dict.fromkeys((row["method"], row["K"], row["P"]) for row in rows):
            cells = {row[name]: row for row in rows if (row["method"], row["K"], row["P"]) == (method, layers, stages)}
            values = [_at_cost(cells[column]) if column in cells else "" for column in columns]
            parts.append(f"| `{method}` | {layers} | " + " | ".join(values) + " |")
    return "\n".join(parts[1:])


def _at_cost(row: Row) -> str:
    return f"{100 * row['accuracy']:.2f} at {100 * row['cost']:.0f} %"
