"""Tables in documents: filled between their markers, from JSON, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_al.studies.sweep.table import COLUMNS
from ds_al.studies.tables.costs import costs, layers
from ds_al.studies.tables.documents import fill
from ds_al.studies.tables.schedules import profile
from ds_al.studies.tables.write import document

HEADER = {"command": "python run/profile.py", "date": "2026-01-01", "machine": {"cores": 2, "cpu": "x"}, "versions": {}}
COST = {
    "workload": "mlp", "method": "streaming", "stages": 2, "micro_batches": 4, "pairs": 9,
    "seconds_without": 0.05, "ratio": 1.011, "ratio_low": 1.0, "ratio_high": 1.02,
}  # fmt: skip


def bubble_row(
    method: str, micro_batches: int, stage: int, bubble: float, workload: str = "sleeping"
) -> dict[str, Any]:
    shares = dict.fromkeys(("wait_input", "wait_queue", "wait_data", "wait_barrier", "drained", "other"), 0.0)
    return {
        "workload": workload, "bubble_simulated": 0.5, "method": method, "micro_batches": micro_batches,
        "stage": stage, "busy": 1 - bubble, **shares,
        "bubble": bubble, "bubble_formula": 0.25, "bytes_per_micro_batch": 1024.0, "critical_path": 0.5,
    }  # fmt: skip


def test_the_mean_bubble_of_all_stages_stands_beside_the_formula() -> None:
    rows = [bubble_row("streaming", m, stage, 0.2 + 0.1 * stage) for m in (2, 4) for stage in range(3)]
    table = document(*profile(rows))
    assert "| `streaming` | 30.0 % | 25.0 % | +5.0 | 30.0 % | 25.0 % | +5.0 |" in table
    assert "80.0 / 60.0" in table and "1,024 / 1,024" in table and "50 / 50" in table


def test_stages_of_a_network_are_not_equal_so_they_are_simulated() -> None:
    rows = [bubble_row("streaming", 2, stage, 0.4, workload="transformer") for stage in range(2)]
    assert "| `streaming` | 40.0 % | 50.0 % | -10.0 |" in document(*profile(rows))


def test_a_name_is_one_cell() -> None:
    """A bar in the name of a method shifted the numbers of its line by a column."""
    assert "| `streaming \\| fast` | 30.0 % |" in document(*profile([bubble_row("streaming | fast", 2, 0, 0.3)]))


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    document, file = tmp_path / "page.md", tmp_path / "cost.json"
    document.write_text("before\n<!-- cost -->\nold\n<!-- end cost -->\nafter\n")
    file.write_text(json.dumps({"header": HEADER, "rows": [COST]}))
    assert fill(document, [file]) == ["cost"]
    text = document.read_text()
    assert text.startswith("before\n<!-- cost -->\n") and text.endswith("<!-- end cost -->\nafter\n")
    assert "old" not in text and "| 50.0 | 1.011 (1.000 to 1.020) | 9 |" in text and "2 cores (x)" in text
    fill(document, [file])
    assert document.read_text() == text


def test_a_document_without_markers_is_refused(tmp_path: Path) -> None:
    document, file = tmp_path / "page.md", tmp_path / "cost.json"
    document.write_text("nothing\n")
    file.write_text(json.dumps({"header": HEADER, "rows": [COST]}))
    with pytest.raises(ValueError, match="no markers '<!-- cost -->'"):
        fill(document, [file])
    assert document.read_text() == "nothing\n"


def test_networks_stand_in_a_row_with_both_numbers_of_layers() -> None:
    row = {
        "kind": "images", "network": "vgg", "preset": "small", "bridge": "mimic", "rho": 0.9, "bridge_share": 0.05,
        "twin_flops": 88_500_000, "parameters_f": 389_000, "parameters_bridges": 86_000,
    }  # fmt: skip
    table = document(*costs([{**row, "K": 2}, {**row, "K": 4, "rho": 1.1}]))
    line = "| `vgg` `small`, twin 88.5 | mimic | 0.900 | 5.0 % | 389 / 86 | 1.100 | 5.0 % | 389 / 86 |"
    assert line in table.splitlines()


def test_layers_stand_with_their_step_and_what_fewer_steps_save() -> None:
    row = {
        "model": "vgg", "layer": 0, "name": "ConvBlock", "parameters": 71_274, "forward_ms": 1.0, "backward_ms": 2.0,
        "step_ms": 1.0, "step_loop_ms": 4.0, "u": 1 / 3,
    }  # fmt: skip
    table = document(
        *layers([row, {**row, "layer": 1}, {**row, "model": "mlp", "step_ms": 3.0, "u": 1.0}])
    ).splitlines()
    assert "| `vgg` | 0 `ConvBlock` | 71,274 | 1.00 | 2.00 | 1.00 | 4.00 | 0.333 |" in table
    assert "| `vgg` | 0.333 | 8.00 (1.00x) | 7.00 (1.14x) | 6.50 (1.23x) | 6.25 (1.28x) |" in table
    assert "| `mlp` | 1.000 | 6.00 (1.00x) | 4.50 (1.33x) | 3.75 (1.60x) | 3.38 (1.78x) |" in table


def test_a_recipe_stands_beside_its_twin(tmp_path: Path) -> None:
    document, file = tmp_path / "page.md", tmp_path / "recipe_time.json"
    document.write_text("<!-- recipe_time -->\n<!-- end recipe_time -->\n")
    row = {
        "network": "vgg", "K": 4, "recipe": "ours", "micro_batch": 100, "repeats": 15, "al_ms": 202.04,
        "twin_ms": 180.0, "ratio": 1.12, "ratio_low": 1.1, "ratio_high": 1.15,
    }  # fmt: skip
    rows = [row, {**row, "variant": "wide bridges", "K": 2}, {**row, "recipe": "many_classes"}]
    file.write_text(json.dumps({"header": HEADER, "rows": rows}))
    fill(document, [file])
    assert "| `vgg` | 4 | 100 | 180.0 | 202.0 | 1.120 (1.100 to 1.150) | 15 |" in document.read_text()
    assert "| `vgg`, wide bridges | 2 | 100 | " in document.read_text()
    assert "| `vgg`, `many_classes` | 4 | 100 | " in document.read_text()


def test_trials_and_suites_stand_with_their_groups(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("<!-- tune -->\n<!-- end tune -->\n<!-- suite -->\n<!-- end suite -->\n")
    trials = {"group": "G", "method": "bp", "trial": "slow", "trials": {"slow": 0.5, "quick": 0.25}}
    suite = dict.fromkeys(COLUMNS) | {"group": "G", "method": "bp", "seeds": 3, "failed": 0, "test_accuracy": 0.75}
    rows = {"tune": {**trials, "rho": {"slow": None, "quick": None}}, "suite": {**suite, "test_accuracy_sd": 0.01}}
    for name, row in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"header": HEADER, "rows": [row]}))
    assert fill(document, [tmp_path / "tune.json", tmp_path / "suite.json"]) == ["tune", "suite"]
    text = document.read_text()
    assert "| `bp` | **slow** | **50.00** | - |" in text and "| `bp` | - | 75.00 ± 1.00 |" in text
