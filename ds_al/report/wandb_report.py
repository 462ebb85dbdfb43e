"""Publishes a W&B report of several runs: set-up, losses of each stage, accuracies, times, timelines.

This needs the package ``wandb-workspaces``, an account and network access; offline runs must be uploaded first
(``wandb sync``).
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ds_al.errors import ALReportError
from ds_al.experiment.wandb_run import has_account

Run = dict[str, Any]
"""Content of ``config.json`` in a run folder."""

_SETTINGS = (
    *("method", "model", "layers", "stages", "partition", "micro_batches", "micro_batch_size", "data", "seed", "rho"),
    *("parameters_total", "git_commit", "device", "cpu", "cores"),
)
_WIDTH, _HEIGHT = 12, 9  # size of a panel; a report is 24 wide


def publish(runs: Sequence[Path], *, title: str, entity: str | None, project: str) -> str:
    """Saves a report on W&B with all runs in the W&B groups of the given runs.

    Args:
        runs: run folders ``<output>/<name>/<time>``.
        title: title of the report, at most 128 characters.
        entity: W&B user or team that owns the runs and the report; ``None`` for the account's default.
        project: W&B project of the runs and of the report.

    Returns:
        The report's URL.

    Raises:
        ALReportError: a folder is not a run folder, ``wandb-workspaces`` or an account is missing, ``WANDB_MODE``
            disables uploads, or W&B rejects the report or cannot be reached.
    """
    configs = [_read(Path(run)) for run in runs]
    if not configs:
        raise ALReportError("got no runs: pass the folder of at least one, <output>/<name>/<time>")
    _check_online()
    try:
        api = importlib.import_module("wandb_workspaces.reports.v2")
        expr = importlib.import_module("wandb_workspaces.expr")
    except ImportError as error:
        raise ALReportError(
            f"a W&B report needs a package that cannot be imported ({error}): pip install wandb-workspaces"
        ) from error
    try:
        report = _build(api, expr, configs, title=title, entity=entity, project=project)
        report.save()
        return str(report.url)
    except Exception as error:  # of a third party, of the account and of the network
        raise ALReportError(
            f"W&B did not take the report for project {project!r} of {entity or 'the default entity'}: "
            f"{type(error).__name__}: {error}. Check the network, the names and what the account may do"
        ) from error


def _build(api: Any, expr: Any, runs: Sequence[Run], *, title: str, entity: str | None, project: str) -> Any:
    """Builds the report without saving it."""
    owner = {} if entity is None else {"entity": entity}
    groups = sorted({_group(run) for run in runs})
    stages = max(run["resolved"]["stages"] for run in runs)
    exits = max(run["resolved"].get("layers") or 1 for run in runs)
    number = count()

    def place() -> Any:
        row, column = divmod(next(number), 2)
        return api.Layout(x=column * _WIDTH, y=row * _HEIGHT, w=_WIDTH, h=_HEIGHT)

    def lines(title: str, names: list[str], **options: Any) -> Any:
        return api.LinePlot(title=title, y=names, layout=place(), **options)

    def bars(title: str, name: str) -> Any:
        return api.BarPlot(title=title, metrics=[name], layout=place())

    panels = [
        lines("loss of each stage", [f"stage_{stage}/loss" for stage in range(stages)], log_y=True),
        lines("validation accuracy of each exit", [f"validation_accuracy/exit_{k}" for k in range(1, exits + 1)]),
        bars("test accuracy", "test_accuracy"),
        bars("seconds of training", "training_seconds"),
        api.MediaBrowser(title="timeline", media_keys=["timeline"], layout=place()),
        api.MediaBrowser(title="curves", media_keys=["curves"], layout=place()),
    ]
    runset = api.Runset(project=project, name=", ".join(groups), filters=[expr.Metric("Group").isin(groups)], **owner)
    return api.Report(
        project=project,
        title=title,
        width="fluid",
        blocks=[
            api.H2("Set-up"),
            api.MarkdownBlock(_setup(runs)),
            api.H2("Runs"),
            api.PanelGrid(runsets=[runset], panels=panels),
        ],
        **owner,
    )


def _setup(runs: Sequence[Run]) -> str:
    """Returns common settings as a list and differing settings as a table, in Markdown."""
    facts = [{key: _text(run["resolved"].get(key)) for key in _SETTINGS} for run in runs]
    differ = [key for key in _SETTINGS if len({fact[key] for fact in facts}) > 1]
    text = [f"* {key}: {facts[0][key]}" for key in _SETTINGS if key not in differ]
    text += [f"* versions: {_text(runs[0]['resolved'].get('versions'))}"]
    if differ:
        text += ["", f"| {' | '.join(differ)} |", f"|{'---|' * len(differ)}"]
        text += [f"| {' | '.join(fact[key] for key in differ)} |" for fact in facts]
    return "\n".join(text)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item not in (None, {}, []))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _group(run: Run) -> str:
    experiment = run["experiment"]
    return experiment.get("wandb", {}).get("group") or experiment["name"]


def _read(folder: Path) -> Run:
    try:
        config = json.loads((folder / "config.json").read_text())
        int(config["resolved"]["stages"])
        _group(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ALReportError(
            f"{folder} is not the folder of a run: expected a config.json as run/train.py writes it into "
            f"<output>/<name>/<time> ({type(error).__name__}: {error})"
        ) from error
    return config


def _check_online() -> None:
    mode = os.environ.get("WANDB_MODE")
    if mode and mode != "online":
        raise ALReportError(f"got WANDB_MODE={mode}: a W&B report is made on the server; unset it or set it to online")
    if not has_account():
        raise ALReportError(
            "this machine has no W&B account, which a W&B report needs: run `wandb login` or set WANDB_API_KEY"
        )
