"""What a suite found: a row per group, method, K and P, over all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Row = dict[str, Any]

COLUMNS = (
    "group",
    "method",
    "K",
    "P",
    "seeds",
    "failed",
    "test_accuracy",
    "test_accuracy_sd",
    "test_accuracy_at_best_validation",
    "test_accuracy_at_best_validation_sd",
    "averaged_accuracy",
    "averaged_accuracy_sd",
    "validation_accuracy",
    "first_validation_accuracy",
    "train_accuracy",
    "seconds_per_epoch",
    "seconds_per_epoch_sd",
    "samples_per_second",
    "seconds_to_twin",
    "peak_activation_bytes",
    "parameters",
    "rho",
)


def rows(results: Sequence[Result]) -> list[Row]:
    """One row per (group, method, K, P), in the order of the suite.

    Columns: see :data:`COLUMNS`; accuracies are means over seeds with sample standard deviations ``_sd`` (``None``
    with one seed); ``averaged_accuracy`` is that of the mean of all exits (:mod:`ds_al.exit_average`) on the test
    samples; ``first_validation_accuracy`` is that after the first epoch that was evaluated: whether a method
    starts from cold; ``seconds_to_twin`` is the mean training time until the validation accuracy first reached the
    twin's in its last epoch (same seed), ``None`` where it never did; bytes are of the fullest stage.
    """
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        found.setdefault((result["group"], result["suite_method"], result["K"], result["P"]), []).append(result)
    twins = {  # of several, the first one
        (result["group"], result["seed"]): result
        for result in reversed(results)
        if "failure" not in result and str(result["method"]).startswith("bp_")
    }
    return [_row(key, cell, twins) for key, cell in found.items()]


def _row(key: tuple[Any, ...], cell: Sequence[Result], twins: Mapping[tuple[str, int], Result]) -> Row:
    done = [result for result in cell if "failure" not in result]
    row: Row = dict.fromkeys(COLUMNS)
    row |= dict(zip(("group", "method", "K", "P"), key, strict=True))
    row |= {"seeds": len(done), "failed": len(cell) - len(done)}
    if not done:
        return row
    means = {
        "test_accuracy": [r["test_accuracy"] and r["test_accuracy"][-1] for r in done],
        "test_accuracy_at_best_validation": [r.get("test_accuracy_at_best_validation") for r in done],
        "averaged_accuracy": [r.get("averaged_accuracy") and r["averaged_accuracy"][-1] for r in done],
        "validation_accuracy": [r["validation_accuracy"][-1] for r in done],
        "first_validation_accuracy": [_first_accuracy(r) for r in done],
        "train_accuracy": [r.get("train_accuracy") for r in done],
        "seconds_per_epoch": [statistics.median(epoch["seconds"] for epoch in r["history"]) for r in done],
        "samples_per_second": [r["samples_per_second"] for r in done],
        "seconds_to_twin": [_seconds_to(r, twins.get((key[0], r["seed"]))) for r in done],
    }
    for name, values in means.items():
        known = [value for value in values if value is not None]
        row[name] = statistics.mean(known) if len(known) == len(values) else None
        if f"{name}_sd" in row:
            row[f"{name}_sd"] = statistics.stdev(known) if len(known) == len(values) > 1 else None
    row["peak_activation_bytes"] = max(done[0]["peak_activation_bytes"])
    row["parameters"] = sum(done[0]["parameters"])
    row["rho"] = None if row["K"] is None else done[0].get("rho")  # the twin records what its AL form would cost
    return row


def _first_accuracy(result: Result) -> float | None:
    looked = [epoch["validation_accuracy"] for epoch in result["history"] if epoch.get("validation_accuracy")]
    return looked[0][-1] if looked else None


def _seconds_to(result: Result, twin: Result | None) -> float | None:
    """Training seconds until the validation accuracy first reached the twin's last one."""
    if twin is None or twin.get("validation_accuracy") is None:
        return None
    goal, seconds = twin["validation_accuracy"][-1], 0.0
    for epoch in result["history"]:
        seconds += epoch["seconds"]
        if epoch.get("validation_accuracy") and epoch["validation_accuracy"][-1] >= goal:
            return seconds
    return None


def markdown(table: Sequence[Row], *, seeds: int = 1) -> str:
    """The rows as Markdown, one table per group; see :func:`group_markdown`."""
    groups = dict.fromkeys(row["group"] for row in table)
    tables = ((group, group_markdown([row for row in table if row["group"] == group], seeds=seeds)) for group in groups)
    return "\n\n".join(f"### {group}\n\n{text}" for group, text in tables) + "\n"


def group_markdown(own: Sequence[Row], *, seeds: int = 1) -> str:
    """One group's rows as a Markdown table.

    Args:
        own: the rows.
        seeds: a difference to the twin, in points, is given where both have at least so many.
    """
    twin = next((row for row in own if row["K"] is None and row["test_accuracy"] is not None), None)
    if twin is not None and twin["seeds"] < seeds:
        twin = None
    return "\n".join(
        [
            "| method | K | test accuracy, % | to the twin | all exits averaged | to the twin | at best validation "
            "| after epoch 1 | train | s per epoch | to the twin's accuracy | held for backward | parameters "
            "| FLOPs / twin | seeds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(_line(row, twin if row["seeds"] >= seeds else None) for row in own),
        ]
    )


def _line(row: Row, twin: Row | None) -> str:
    best = _percent(row["test_accuracy_at_best_validation"], row["test_accuracy_at_best_validation_sd"])
    failed = f", {row['failed']} failed" if row["failed"] else ""
    cells = [
        f"`{row['method']}`",
        "-" if row["K"] is None else str(row["K"]),
        _percent(row["test_accuracy"], row["test_accuracy_sd"]),
        _difference(row, twin, "test_accuracy"),
        _percent(row["averaged_accuracy"], row["averaged_accuracy_sd"]),
        _difference(row, twin, "averaged_accuracy"),
        best,
        _percent(row["first_validation_accuracy"], None),
        _percent(row["train_accuracy"], None),
        _number(row["seconds_per_epoch"], ".1f"),
        _number(row["seconds_to_twin"], ".0f", " s", missing="not reached"),
        _number(row["peak_activation_bytes"] and row["peak_activation_bytes"] / 2**20, ".1f", " MiB"),
        _number(row["parameters"], ",d"),
        _number(row["rho"], ".3f"),
        f"{row['seeds']}{failed}",
    ]
    return f"| {' | '.join(cells)} |"


def _difference(row: Row, twin: Row | None, column: str) -> str:
    """Points that a row's accuracy is above the twin's."""
    if twin is None or row is twin or row[column] is None:
        return "-"
    return f"{100 * (row[column] - twin['test_accuracy']):+.2f}"


def _percent(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def _number(value: float | None, form: str, unit: str = "", *, missing: str = "-") -> str:
    return missing if value is None else f"{value:{form}}{unit}"
