"""Builds the sections on settings, environment and commands of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_al.figures.parts import NOT_RECORDED, Section, Table
from ds_al.report import texts
from ds_al.report.cells import Cell, flat
from ds_al.report.compare import settings_that_differ
from ds_al.report.read import Profile, RunRecord
from ds_al.system.secrets import hide


def section(runs: Sequence[RunRecord], cells: Sequence[Cell]) -> Section:
    """Builds the section on model, data and settings: common ones, and those that differ between methods."""
    differing = settings_that_differ(runs)
    rows = [
        ["model", _each(runs, lambda run: texts.plain(run.model.get("name")))],
        ["model options", _each(runs, lambda run: _options(run.model))],
        ["data", _each(runs, lambda run: texts.plain(run.data.get("name")))],
        ["preparation", _each(runs, lambda run: _options(run.data))],
        ["test samples", _each(runs, lambda run: texts.plain(run.value("test_samples")))],
        ["epochs", _each(runs, lambda run: texts.plain(run.planned_epochs))],
        ["micro-batch size", _each(runs, lambda run: texts.plain(run.value("micro_batch_size")))],
    ]
    settings = flat(runs[0].config)
    rows += [
        [key, texts.setting(value)]
        for key, value in settings.items()
        if key not in differing
        and not key.startswith("experiment.")
        and key not in ("train_micro_batch_size_per_gpu", "steps_per_print", "gradient_accumulation_steps")
    ]
    tables = [Table("Set-up of all runs; several values where they differ", ["setting", "value"], rows)]
    keys = [key for key in differing if key != "associated_learning.method"]
    if keys:
        by_cell = [
            [cell.label, *(_each(cell.runs, lambda run, key=key: _setting(run, key)) for key in keys)]  # type: ignore[misc]
            for cell in cells
        ]
        tables.append(Table("Settings that differ", ["method", *keys], by_cell))
    tables.append(_runs(runs))
    return Section("setup", "Set-up", tables=tables)


def environment(runs: Sequence[RunRecord]) -> Section:
    """Builds the section on machine, versions, code and dates."""
    names = dict.fromkeys(name for run in runs for name in (run.value("versions") or {}))
    rows = [
        ["processor", _each(runs, lambda run: texts.plain(run.value("cpu")))],
        ["cores", _each(runs, lambda run: texts.plain(run.value("cores")))],
        ["device", _each(runs, lambda run: texts.plain(run.value("device")))],
        ["git commit", _each(runs, lambda run: texts.plain(run.value("git_commit")))],
        ["dates", _dates(runs)],
    ]
    for name in names:
        rows.append([name, _each(runs, lambda run, name=name: texts.plain((run.value("versions") or {}).get(name)))])  # type: ignore[misc]
    if not names:
        rows.append(["versions", NOT_RECORDED])
    return Section("environment", "Environment", tables=[Table("Machine and versions", ["what", "value"], rows)])


def commands(runs: Sequence[RunRecord], profiles: Sequence[Profile]) -> Section:
    """Builds the section of command lines of runs and profiles, with the config's location if none was recorded."""
    known = [run.command for run in runs] + [profile.header.get("command") for profile in profiles]
    lines = list(dict.fromkeys(hide(str(command)) for command in known if command))
    without = [run for run in runs if not run.command]
    paragraphs = []
    if without:
        paragraphs.append(
            f"Command not recorded for {len(without)} of {len(runs)} runs; the whole config of a run is config.json "
            "in its folder."
        )
    return Section("commands", "Commands", paragraphs=paragraphs, commands=lines)


def _runs(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for run in runs:
        state = "finished" if run.finished else f"unfinished, {len(run.epochs)} of {texts.plain(run.planned_epochs)}"
        accuracy = run.test_accuracy[-1] if run.test_accuracy else None
        rows.append(
            [
                run.name,
                run.method,
                texts.plain(run.seed),
                texts.plain(run.value("date")),
                state + ("" if run.finished else " epochs"),
                texts.fixed(accuracy, 4),
                texts.fixed(run.training_seconds, 1),
                "; ".join(run.notes) or "none",
            ]
        )
    columns = ["run", "method", "seed", "date", "state", "test accuracy", "training seconds", "notes"]
    return Table("Runs of this report", columns, rows, frozenset({2, 5, 6}))


def _dates(runs: Sequence[RunRecord]) -> str:
    dates = sorted(str(run.value("date")) for run in runs if run.value("date"))
    if not dates:
        return NOT_RECORDED
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def _each(runs: Sequence[RunRecord], text_of: Callable[[RunRecord], str]) -> str:
    """Returns the distinct values of the runs as a text."""
    return "; ".join(dict.fromkeys(text_of(run) for run in runs))


def _options(block: Mapping[str, Any]) -> str:
    given = {key: value for key, value in flat(block).items() if key != "name" and value not in ({}, [], None)}
    return ", ".join(f"{key} {texts.setting(value)}" for key, value in given.items()) or "none"


def _setting(run: RunRecord, key: str) -> str:
    values = flat(run.config)
    return texts.setting(values[key]) if key in values else "default"
