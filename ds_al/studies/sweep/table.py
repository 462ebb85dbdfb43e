"""Summarizes a sweep: one row per group, method, K and P, over all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ds_al.config.methods import EMULATED
from ds_al.studies.runs import same_machine

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

_TIMES = ("seconds_per_epoch", "seconds_per_epoch_sd", "samples_per_second", "seconds_to_twin")


def rows(results: Sequence[Result]) -> list[Row]:
    """Returns one row per (group, method, K, P), in the order of the sweep.

    Columns: see :data:`COLUMNS`; accuracies are means over seeds with sample standard deviations ``_sd`` (``None``
    with one seed); ``averaged_accuracy`` is the test accuracy of the mean of all exits (:mod:`ds_al.exits`);
    ``first_validation_accuracy`` is the validation accuracy after the first evaluated epoch, which shows slow starts;
    ``seconds_to_twin`` is the mean training time until the validation accuracy first reached the twin's last one (same
    seed), ``None`` if it never did; all times are ``None`` where they do not count (:func:`times_count`); bytes are the
    maximum over stages.
    """
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        found.setdefault((result["group"], result["suite_method"], result["K"], result["P"]), []).append(result)
    twins = twins_of(results)
    return [_row(key, run, twins) for key, run in found.items()]


def twins_of(results: Sequence[Result]) -> dict[tuple[str, int], Result]:
    """Returns the run of back-propagation by group and seed: of the method that is best by validation accuracy, where
    a group has several, and of the first of equal ones. A method with late gradients is none."""
    found: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        if "failure" in result or result["method"] in EMULATED:
            continue
        if str(result["method"]).startswith("bp_"):
            found.setdefault(result["group"], {}).setdefault(result["suite_method"], []).append(result)
    best = [max(methods.values(), key=_validated) for methods in found.values()]
    return {(result["group"], result["seed"]): result for runs in best for result in runs}


def times_count(runs: Sequence[Result], twins: Mapping[tuple[str, int], Result]) -> bool:
    """Whether the times of a method's runs can be compared with those of the twins: none is emulated, and each was
    measured on the machine of the twin of the same seed, which was not restarted in between."""
    alike = (same_machine(run, twins.get((run["group"], run["seed"]))) for run in runs)
    return all(alike) and all(run["method"] not in EMULATED for run in runs)


def _validated(runs: Sequence[Result]) -> tuple[int, float]:
    known = [run["validation_accuracy"][-1] for run in runs if run.get("validation_accuracy")]
    return len(runs), statistics.mean(known) if known else 0.0


def _row(key: tuple[Any, ...], run: Sequence[Result], twins: Mapping[tuple[str, int], Result]) -> Row:
    done = [result for result in run if "failure" not in result]
    row: Row = dict.fromkeys(COLUMNS)
    row |= dict(zip(("group", "method", "K", "P"), key, strict=True))
    row |= {"seeds": len(done), "failed": len(run) - len(done)}
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
    if not times_count(done, twins):
        row |= dict.fromkeys(_TIMES)
    row["peak_activation_bytes"] = max(done[0]["peak_activation_bytes"])
    row["parameters"] = sum(done[0]["parameters"])
    row["rho"] = None if row["K"] is None else done[0].get("rho")  # the twin records the rho of its AL form
    return row


def _first_accuracy(result: Result) -> float | None:
    looked = [epoch["validation_accuracy"] for epoch in result["history"] if epoch.get("validation_accuracy")]
    return looked[0][-1] if looked else None


def _seconds_to(result: Result, twin: Result | None) -> float | None:
    """Returns the training seconds until the validation accuracy first reached the twin's last one."""
    if twin is None or twin.get("validation_accuracy") is None:
        return None
    goal, seconds = twin["validation_accuracy"][-1], 0.0
    for epoch in result["history"]:
        seconds += epoch["seconds"]
        if epoch.get("validation_accuracy") and epoch["validation_accuracy"][-1] >= goal:
            return seconds
    return None
