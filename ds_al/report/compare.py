"""Describes in sentences why runs may not be comparable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ds_al.report.cells import Cell, flat, group
from ds_al.report.read import RunRecord

# Settings that may differ between the seeds of a cell, or that define a cell.
_NOT_SETTINGS = ("experiment.seed", "experiment.output", "experiment.name", "experiment.wandb.", "experiment.epochs")


def comparability(runs: Sequence[RunRecord]) -> list[str]:
    """Finds differences between runs beyond the factors of a comparison (method, stages, layers, micro-batches).

    Returns:
        One sentence per difference: data, model, epochs, seed counts, hardware, versions, code, dates, micro-batch
        size, other settings within a cell, unfinished runs. Empty if nothing differs.
    """
    if not runs:
        return []
    cells = group(runs)
    found = [
        _differs(runs, "Data set", lambda run: run.data.get("name"), "Accuracies are of different samples."),
        _differs(
            runs,
            "Preparation of the data",
            lambda run: {key: run.data[key] for key in ("validation_fraction", "augment") if key in run.data} or None,
        ),
        _differs(
            runs,
            "Number of test samples",
            lambda run: run.value("test_samples"),
            "Accuracies are of different samples.",
        ),
        _differs(runs, "Model", lambda run: run.model or None),
        _differs(runs, "Number of epochs", lambda run: run.planned_epochs, "Some had more time to learn."),
        _seeds(cells),
        _repeated(cells),
        _differs(
            runs,
            "Micro-batch size",
            lambda run: run.value("micro_batch_size"),
            "Steps, memory and bytes per micro-batch differ with it.",
        ),
        _differs(
            runs,
            "Optimizer steps per batch",
            _steps,
            'Equal samples are not equal steps; "steps_per_batch" makes them so.',
        ),
        _differs(runs, "Processor", lambda run: run.value("cpu"), "Times are not comparable."),
        _differs(runs, "Number of cores", lambda run: run.value("cores"), "Times are not comparable."),
        _differs(runs, "Device", lambda run: _kind(run.value("device")), "Times are not comparable."),
        *_versions(runs),
        _differs(runs, "Code (git commit)", lambda run: run.value("git_commit")),
        _dates(runs),
        *_settings(cells),
        _unfinished(runs),
    ]
    return [sentence for sentence in found if sentence]


def settings_that_differ(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the config keys, ``a.b.c``, whose values differ between runs."""
    rows = [
        {key: value for key, value in flat(run.config).items() if not key.startswith(_NOT_SETTINGS)} for run in runs
    ]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if len({json.dumps(row.get(key), default=str) for row in rows}) > 1]


def _differs(
    runs: Sequence[RunRecord], what: str, value_of: Callable[[RunRecord], Any], consequence: str = ""
) -> str | None:
    by_value: dict[str, list[RunRecord]] = {}
    for run in runs:
        value = value_of(run)
        by_value.setdefault("not recorded" if value is None else _text(value), []).append(run)
    if len(by_value) < 2:
        return None
    parts = [f"{value} ({_who(found)})" for value, found in by_value.items()]
    if len(by_value) == 2 and "not recorded" in by_value:
        return f"{what} is not recorded in all runs: {'; '.join(parts)}."
    return f"{what} differs: {'; '.join(parts)}.{' ' if consequence else ''}{consequence}"


def _who(runs: Sequence[RunRecord]) -> str:
    methods = dict.fromkeys(run.method for run in runs)
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {', '.join(methods)}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in flat(value).items())
    return str(value)


def _kind(device: Any) -> str | None:
    """Returns ``cuda`` for ``cuda:1``, since the device index does not matter."""
    return None if device is None else str(device).split(":")[0]


def _steps(run: RunRecord) -> int | None:
    """Returns the steps per batch: AL steps once per micro-batch unless configured, and once per batch where layers
    span stages; back-propagation once."""
    if run.method.startswith("bp_"):
        return 1
    block = run.config.get("associated_learning") or {}
    return block.get("steps_per_batch") or (1 if run.value("groups") else run.value("micro_batches"))


def _seeds(cells: Sequence[Cell]) -> str | None:
    seeds = {cell.label: sorted({run.seed for run in cell.finished if run.seed is not None}) for cell in cells}
    if len({tuple(found) for found in seeds.values()}) < 2:
        return None
    if len({len(found) for found in seeds.values()}) > 1:
        parts = [f"{label} {len(found)}" for label, found in seeds.items()]
        return f"Number of finished seeds differs: {'; '.join(parts)}. Means and spreads are not equally certain."
    parts = [f"{label} {', '.join(map(str, found)) or 'none'}" for label, found in seeds.items()]
    return f"Seeds differ: {'; '.join(parts)}."


def _repeated(cells: Sequence[Cell]) -> str | None:
    found = [
        cell.label for cell in cells if len({run.seed for run in cell.finished}) < len(cell.finished)
    ]  # such as a repeated run
    if not found:
        return None
    return f"A seed was run more than once: {'; '.join(found)}. The spread is then not one over seeds alone."


def _versions(runs: Sequence[RunRecord]) -> list[str | None]:
    names = dict.fromkeys(name for run in runs for name in (run.value("versions") or {}))
    return [
        _differs(runs, f"Version of {name}", lambda run, name=name: (run.value("versions") or {}).get(name))  # type: ignore[misc]
        for name in names
    ]


def _dates(runs: Sequence[RunRecord]) -> str | None:
    days = sorted({str(run.value("date"))[:10] for run in runs if run.value("date")})
    if len(days) < 2:
        return None
    return f"Dates differ: the runs were made on {len(days)} days, from {days[0]} to {days[-1]}."


def _settings(cells: Sequence[Cell]) -> list[str | None]:
    found: list[str | None] = []
    for cell in cells:
        keys = settings_that_differ(cell.runs)
        if keys:
            values = [f"{key} ({', '.join(_values(cell.runs, key))})" for key in keys]
            found.append(f"Settings differ within {cell.label}: {'; '.join(values)}. Its mean mixes them.")
    return found


def _values(runs: Sequence[RunRecord], key: str) -> list[str]:
    return list(dict.fromkeys(str(flat(run.config).get(key, "default")) for run in runs))


def _unfinished(runs: Sequence[RunRecord]) -> str | None:
    names = [run.name for run in runs if not run.finished]
    return f"Unfinished, and in no mean: {', '.join(names)}." if names else None
