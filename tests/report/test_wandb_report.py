"""A W&B report, built with a stand-in of the report API that keeps what it is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ds_al.errors import ALReportError
from ds_al.report.wandb_report import publish

CLASSES = ("Report", "Runset", "PanelGrid", "LinePlot", "BarPlot", "MediaBrowser", "MarkdownBlock", "H2", "Layout")


class Made:
    """An object of the stand-in: its arguments as attributes."""

    url = "https://wandb.example/report"
    error: Exception | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.saved = args, 0
        self.__dict__.update(kwargs)

    def save(self) -> None:
        if self.error:
            raise self.error
        self.saved += 1


class Metric(Made):
    def isin(self, values: list[str]) -> tuple[str, list[str]]:
        return self.args[0], values


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Made]]:
    """Installs the stand-in, and an account; gives what was made, by class."""
    made: dict[str, list[Made]] = {name: [] for name in CLASSES}

    def keeping(name: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> Made:
            made[name].append(Made(*args, **kwargs))
            return made[name][-1]

        return make

    package, reports, api = (ModuleType(n) for n in ("wandb_workspaces", "reports", "v2"))
    expr = ModuleType("expr")
    expr.Metric = Metric  # type: ignore[attr-defined]
    for name in CLASSES:
        setattr(api, name, keeping(name))
    monkeypatch.setitem(sys.modules, "wandb_workspaces", package)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.expr", expr)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports", reports)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", api)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.setattr(Made, "error", None)
    return made


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Folders of two runs: one group by its name, one by its config."""
    folders = []
    for method, stages, wandb in (("streaming", 3, {}), ("bp_1f1b", 2, {"group": "others"})):
        folders.append(tmp_path / method)
        folders[-1].mkdir()
        config = {
            "experiment": {"name": "compared", "wandb": wandb},
            "resolved": {"method": method, "stages": stages, "layers": 4, "seed": 5, "versions": {"torch": "2"}},
        }
        (folders[-1] / "config.json").write_text(json.dumps(config))
    return folders


def test_a_report_shows_the_runs_of_the_groups(made: dict[str, list[Made]], runs: list[Path]) -> None:
    url = publish(runs, title="AL and its twin", entity="team", project="ds_al")
    (report,), (runset,), (grid,) = made["Report"], made["Runset"], made["PanelGrid"]
    assert url == report.url and report.saved == 1
    assert (report.title, report.entity, report.project) == ("AL and its twin", "team", "ds_al")
    assert grid in report.blocks and grid.runsets == [runset]
    assert (runset.entity, runset.project) == ("team", "ds_al")
    assert runset.filters == [("Group", ["compared", "others"])]
    assert [plot.y for plot in made["LinePlot"]] == [
        ["stage_0/loss", "stage_1/loss", "stage_2/loss"],
        [f"validation_accuracy/exit_{number}" for number in (1, 2, 3, 4)],
    ]
    assert [plot.metrics for plot in made["BarPlot"]] == [["test_accuracy"], ["training_seconds"]]
    assert ["timeline"] in [browser.media_keys for browser in made["MediaBrowser"]]
    places = {(panel.layout.x, panel.layout.y) for panel in grid.panels}
    assert len(places) == len(grid.panels)
    (setup,) = made["MarkdownBlock"][0].args
    assert "* seed: 5" in setup and "| streaming | 3 |" in setup and "| bp_1f1b | 2 |" in setup


def test_the_accounts_own_entity_is_left_to_wandb(made: dict[str, list[Made]], runs: list[Path]) -> None:
    publish(runs, title="t", entity=None, project="ds_al")
    assert not hasattr(made["Report"][0], "entity") and not hasattr(made["Runset"][0], "entity")


def test_a_missing_package_is_named_with_its_remedy(
    made: dict[str, list[Made]], runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ALReportError, match="pip install wandb-workspaces"):
        publish(runs, title="t", entity=None, project="p")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_server_there_is_no_report(
    made: dict[str, list[Made]], runs: list[Path], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ALReportError, match=f"WANDB_MODE={mode}"):
        publish(runs, title="t", entity=None, project="p")
    assert not made["Report"]


def test_without_an_account_there_is_no_report_and_no_question(
    made: dict[str, list[Made]], runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ALReportError, match="wandb login"):
        publish(runs, title="t", entity=None, project="p")


def test_what_the_account_may_not_do_is_said(
    made: dict[str, list[Made]], runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Made, "error", PermissionError("not a member of team"))
    with pytest.raises(ALReportError, match=r"'ds_al' of team: .*not a member"):
        publish(runs, title="t", entity="team", project="ds_al")


def test_a_folder_without_a_run_is_refused_by_name(made: dict[str, list[Made]], tmp_path: Path) -> None:
    with pytest.raises(ALReportError, match=f"{tmp_path} is not the folder of a run"):
        publish([tmp_path], title="t", entity=None, project="p")
    with pytest.raises(ALReportError, match="got no runs"):
        publish([], title="t", entity=None, project="p")
