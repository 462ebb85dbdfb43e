"""The frontier, from stand-in accuracies and times: its points, table and picture."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_al.group_schedule import GROUP_SCHEDULES
from ds_al.studies.bench.dial import DialCases
from ds_al.studies.frontier import picture
from ds_al.studies.results import read

GROUP = "CIFAR-10 (10,000 images), VGG of eight blocks"
HEADER: dict[str, Any] = {
    "date": "2026-01-01", "command": "x", "machine": {"cores": 2, "cpu": "x", "system": "x"}, "versions": {},
}  # fmt: skip


def accuracies() -> list[dict[str, Any]]:
    def row(method: str, k: int | None, accuracy: float) -> dict[str, Any]:
        return {
            "group": GROUP, "method": method, "K": k, "seeds": 3, "validation_accuracy": accuracy,
            "test_accuracy": accuracy, "test_accuracy_sd": 0.003,
            "averaged_accuracy": None if k is None else accuracy + 0.01, "averaged_accuracy_sd": 0.002,
        }  # fmt: skip

    local = [row(name, k, 0.8 - loss * k) for name, loss in (("recipe", 0.005), ("greedy", 0.01)) for k in (8, 1, 2, 4)]
    return [row("bp", None, 0.8), *local]


def dial() -> list[dict[str, Any]]:
    """Every case at its ideal time."""
    cases = DialCases((8,), (1, 2, 4), (8, 16), batches=3, forward=0.05, backward=0.05, repeat=1)
    return [
        {
            "method": "groups" if name in GROUP_SCHEDULES else name,
            "schedule": name if name in GROUP_SCHEDULES else "",
            "stages": 8, "layers": k, "micro_batches": m, "batches": 3,
            "seconds": cases.ideal(name, stages=8, layers=k, micro_batches=m), "graphs_held": 1,
        }
        for name, k, m in cases.cases(8)
    ]  # fmt: skip


def stored(path: Path, kind: str, rows: list[dict[str, Any]], **settings: float) -> str:
    path.write_text(json.dumps({"kind": kind, "header": {**HEADER, "settings": settings}, "rows": rows}))
    return str(path)


def test_points_and_picture_come_from_stored_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = {**accuracies()[0], "method": "bp_async", "test_accuracy": 0.79}  # as it is emulated
    known = stored(tmp_path / "accuracy.json", "sweep", [*accuracies(), late])
    times = stored(tmp_path / "dial.json", "dial", dial(), forward=0.05, backward=0.05)
    points, figure = tmp_path / "points.json", tmp_path / "frontier.png"
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    arguments = ["--accuracy", known, "--dial", times, "--micro-batches", "16", "--json", str(points)]
    monkeypatch.setattr(sys, "argv", ["run/frontier.py", *arguments, "--figure", str(figure)])
    runpy.run_path("run/frontier.py", run_name="__main__")
    results = read(points)
    assert results.kind == "frontier" and results.header["settings"]["method"] == "recipe"
    assert all(file.stat().st_size > 5000 for file in (figure, figure.with_suffix(".svg")))
    assert points.with_suffix(".csv").exists()

    def of(basis: str) -> dict[Any, Any]:
        return {row["layers"] or row["method"]: row for row in results.rows if row["basis"] == basis}

    measured, planned = of("measured"), of("planner")
    assert [*measured] == [1, 2, 4, 8, "bp_1f1b", "bp_zb_h1", "bp_zb_h2", "bp_dualpipev"]
    assert [measured[k]["accuracy"] for k in (1, 8, "bp_1f1b")] == pytest.approx([0.795, 0.76, 0.8])
    assert measured["bp_1f1b"]["time"] == pytest.approx((16 + 7) / 16)
    assert planned["bp_async"]["accuracy"] == 0.79 and planned["bp_async"]["time"] < planned["bp_1f1b"]["time"]
    assert planned[8]["method"] == "streaming" and planned[8]["time"] > 1.1  # rho of the recipe's bridges
    assert planned[1]["time"] == pytest.approx(planned["bp_zb_h2"]["time"], rel=0.01)
    assert planned["bp_zb_h2"]["memory_bytes"] > 1.2 * planned["bp_zb_h1"]["memory_bytes"]


def curve(of_k: dict[int, tuple[float, float, float]], **rival: Any) -> list[dict[str, Any]]:
    """Returns rows of K by accuracy, time and megabytes, and of one rival."""
    rows: list[dict[str, Any]] = [
        {"basis": basis, "kind": "al", "method": "streaming", "layers": k, "stages": 8, "micro_batches": 8,
         "accuracy": accuracy / 100, "accuracy_sd": 0.003, "averaged": accuracy / 100, "time": time,
         "memory_bytes": megabytes * 1e6}
        for basis in ("measured", "planner") for k, (accuracy, time, megabytes) in of_k.items()
    ]  # fmt: skip
    rival = {"kind": "rival", "layers": None, "averaged": None, **rival}
    return [*rows, {**rows[0], **rival}, {**rows[-1], **rival}]


def test_the_picture_puts_no_name_of_a_k_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1 and 2 with nearly the same accuracy and memory once had their names on each other."""
    names: list[list[Any]] = []

    def boxes(figure: Any, path: Path) -> list[Path]:
        figure.canvas.draw()
        for axes in figure.axes:
            names.append([text.get_window_extent() for text in axes.texts if text.get_text().startswith("K = ")])
        return []

    monkeypatch.setattr(picture, "save", boxes)
    of_k = {1: (85.2, 1.38, 9.2), 2: (85.3, 1.19, 8.4), 4: (85.8, 1.17, 4.7), 8: (86.4, 1.14, 2.9)}
    rows = curve(of_k, method="bp_dp", time=2.0, memory_bytes=21e6)
    picture.draw_frontier(rows, tmp_path / "frontier.png", title="a Transformer")
    assert [len(of_panel) for of_panel in names] == [4, 4, 4]
    for of_panel in names:
        assert not [one for one in of_panel if one.count_overlaps(of_panel) > 1]  # the one is the name itself


@pytest.mark.parametrize(
    "near", [{1: 80.4, 2: 80.2}, {1: 79.9, 2: 79.7}], ids=["half of the points are above", "all are below"]
)
def test_the_picture_puts_no_name_of_a_rival_on_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: dict[int, float]
) -> None:
    """The name of zero bubble hid the point of K = 1, above it, at nearly the same time and memory."""
    hidden: list[bool] = []

    def look(figure: Any, path: Path) -> list[Path]:
        figure.canvas.draw()
        for axes, x in zip(figure.axes, (1.4, 1.4, 19.4), strict=True):
            box = next(text for text in axes.texts if text.get_text() == "bp_zb_h1").get_window_extent()
            hidden.append(box.padded(5).contains(*axes.transData.transform([x, near[1]])))
        return []

    monkeypatch.setattr(picture, "save", look)
    of_k = {1: (near[1], 1.4, 19.4), 2: (near[2], 1.19, 17.4), 4: (78.6, 1.17, 9.6), 8: (77.8, 1.14, 5.0)}
    rows = curve(of_k, method="bp_zb_h1", accuracy=0.8005 if near[1] > 80 else 0.802, time=1.4, memory_bytes=19.4e6)
    picture.draw_frontier(rows, tmp_path / "frontier.png", title="a ResNet")
    assert hidden == [False, False, False]
