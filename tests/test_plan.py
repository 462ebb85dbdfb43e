"""The planner: its predictions are the formulas where there are any, and what was measured where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ds_al.planner import METHODS, Link, StageCost, Work, advice, break_even, grid, predict, simulate
from ds_al.planner.show import draw
from ds_al.trace.analysis import span

RESULTS = Path(__file__).resolve().parents[1] / "results"
WORK = Work(forward=4.0, backward=8.0)


@pytest.mark.parametrize(
    ("method", "seconds"),
    [
        ("streaming", 8 * 3.0),
        ("forward_first", 8 * 3.0 + 3 * 1.0),
        ("bp_1f1b", (8 + 3) * 3.0),
        ("bp_gpipe", (8 + 3) * 3.0),
        ("bp_interleaved", (8 + 1.5) * 3.0),
        ("bp_zero_bubble", 8 * 3.0),
        ("bp_dp", 2 * 12.0),
    ],
)
def test_a_batch_takes_what_the_formula_says(method: str, seconds: float) -> None:
    assert predict(method, WORK, stages=4, micro_batches=8).seconds == pytest.approx(seconds)


def test_rho_and_steps_are_what_streaming_pays() -> None:
    plain = predict("streaming", WORK, stages=4, micro_batches=8)
    heavy = predict("streaming", Work(4.0, 8.0, step=0.4, rho=1.25), stages=4, micro_batches=8)
    assert heavy.seconds == pytest.approx(1.25 * plain.seconds + 8 * 0.1)
    bp = predict("bp_1f1b", Work(4.0, 8.0, step=0.4, rho=1.25), stages=4, micro_batches=8)
    assert bp.seconds == pytest.approx(11 * 3.0 + 0.1)


@pytest.mark.parametrize("rho", [1.1, 1.5])
def test_break_even_is_where_the_formulas_cross(rho: float) -> None:
    """M rho < M + P - 1, so streaming is faster up to (P - 1) / (rho - 1)."""
    even = break_even(Work(4.0, 8.0, rho=rho), stages=8, most=100)
    assert even is not None and even - 1 < 7 / (rho - 1) + 1e-6 <= even + 1e-6


def test_there_is_no_break_even_without_overhead() -> None:
    assert break_even(WORK, stages=4, most=64) is None


def test_memory_and_bytes_by_method() -> None:
    work = Work(4.0, 8.0, message_bytes=100, target_bytes=10, parameter_bytes=4000)
    found = {p.method: p for p in grid(work, stages=[4], micro_batches=[8], link=Link())}
    assert set(found) == set(METHODS)
    assert [found[m].graphs for m in ("streaming", "bp_1f1b", "bp_gpipe")] == [1, 4, 8]
    assert found["streaming"].bytes_per_batch == 8 * 110 and found["bp_1f1b"].bytes_per_batch == 8 * 200
    assert found["bp_dp"].bytes_per_batch == 2 * 3 / 4 * 4000


def test_a_slow_link_costs_back_propagation_more() -> None:
    work = Work(4.0, 8.0, message_bytes=100, target_bytes=2)
    slow = Link(bytes_per_second=100.0)  # a second per message, of three that a micro-batch takes on a stage
    seconds = {m: predict(m, work, stages=4, micro_batches=8, link=slow).seconds for m in ("streaming", "bp_1f1b")}
    assert seconds["streaming"] == pytest.approx(8 * 3.0)
    assert seconds["bp_1f1b"] > 11 * 3.0 + 8 * 1.0


def test_advice_names_the_fastest_even_where_it_is_not_ours() -> None:
    few = list(grid(Work(4.0, 8.0, rho=1.1), stages=[8], micro_batches=[4], link=Link()))
    without = [p for p in few if p.method not in ("bp_zero_bubble", "bp_dp")]
    assert "use streaming" in advice(without, Work(4.0, 8.0, rho=1.1), even=71)
    many = list(grid(Work(4.0, 8.0, rho=1.5), stages=[4], micro_batches=[64], link=Link()))
    text = advice(many, Work(4.0, 8.0, rho=1.5), even=7)
    assert "use streaming" not in text and "streaming takes 1.50 times as long" in text and "up to M = 6" in text


def test_a_thousand_stages_are_simulated_in_seconds() -> None:
    assert predict("streaming", WORK, stages=1024, micro_batches=4).bubble == pytest.approx(0.0, abs=1e-9)


def test_predictions_are_within_5_percent_of_what_was_measured() -> None:
    """Sleeping layers, all methods, M = 4, 8, 16: 21 runs, of which each stage's mean times are known."""
    path = RESULTS / "profile_sleeping.json"
    rows = json.loads(path.read_text())["rows"]
    cases = dict.fromkeys((row["method"], row["micro_batches"]) for row in rows)
    assert len(cases) >= 20
    for method, m in cases:
        own = [row for row in rows if (row["method"], row["micro_batches"]) == (method, m)]
        costs = [StageCost(*(row[f"{name}_ms"] / 1000 for name in ("forward", "backward", "step"))) for row in own]
        start, end = span(simulate(method, costs, micro_batches=m, batches=own[0]["batches"]))
        assert end - start == pytest.approx(own[0]["seconds"], rel=0.05), (method, m)


@pytest.mark.parametrize("bad", [{"method": "gpipe"}, {"stages": 0}, {"micro_batches": 0}])
def test_what_cannot_be_predicted_is_refused(bad: dict[str, object]) -> None:
    arguments: dict[str, object] = {"method": "streaming", "stages": 2, "micro_batches": 2, **bad}
    with pytest.raises(ValueError, match="expected"):
        predict(arguments.pop("method"), WORK, **arguments)  # type: ignore[arg-type]


def test_every_number_of_stages_has_a_panel_with_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture was blank once: its panels were an iterator, which hiding them had used up."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    draw(list(grid(WORK, stages=[2, 4, 8], micro_batches=[2, 4], link=Link())), tmp_path / "plan.png")
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["P = 2", "P = 4", "P = 8"]
    assert all(len(axes.lines) == len(METHODS) for axes in shown)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "run/plan.py", *arguments]
    env = {**os.environ, "PYTHONPATH": str(RESULTS.parent), "COLUMNS": "120"}
    return subprocess.run(command, cwd=RESULTS.parent, env=env, capture_output=True, text=True, timeout=120)


def test_the_command_advises_tabulates_and_draws(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = plan(
        *("--profile", "results/profile_transformer.json", "--stages", "2,4", "--micro-batches", "2,8"),
        *("--link", "1gbit", "--parameters", "1e6", "--json", str(path), "--figure", str(tmp_path / "plan.png")),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Streaming is ") == 4 and "P = 4, M = 8, rho = " in done.stdout
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4 * len(METHODS)
    assert (tmp_path / "plan.png").exists() and (tmp_path / "plan.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --forward-ms, or --profile"),
        (["--forward-ms", "5", "--link", "fast"], "expected a speed such as"),
        (["--profile", "README.md"], "is no file of run/profile.py"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], words: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 1 and words in done.stderr
