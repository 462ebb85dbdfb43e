"""The guard against regressions: ratios that fell are told, and what cannot be compared is refused."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ds_al.studies.bench.guard import GuardError, check, ratios
from ds_al.studies.results import Results, StudyError, kind_of, read

ROOT = Path(__file__).resolve().parents[2]


def measurement(rows: Sequence[Mapping[str, Any]], **settings: Any) -> Results:
    return Results("base", kind_of(rows), {"settings": settings}, rows)


def write(path: Path, results: Results) -> None:
    path.write_text(json.dumps({"header": results.header, "rows": results.rows}))


def sleeping(streaming: float = 2.0, bp: float = 3.0, *, m: int = 8, **settings: Any) -> Results:
    """Seconds of both methods on 2 stages, ideally 1.8 and 2.7."""
    base = {"stages": 2, "micro_batches": m, "batches": 3}
    rows = [
        {**base, "method": "streaming", "seconds": streaming, "ideal": 1.8, "efficiency": 1.8 / streaming},
        {**base, "method": "bp_1f1b", "seconds": bp, "ideal": 2.7, "efficiency": 2.7 / bp},
    ]
    return measurement(rows, **{"forward": 0.05, "batches": 3, "repeat": 3, **settings})


def overhead(al: float, stock: float) -> Results:
    rows = [
        {"method": method, "stages": 2, "stage": stage, "cpu_us": value, "wall_us": 2 * value, "engine_us": value / 2}
        for method, value in (("streaming", al), ("deepspeed_1f1b", stock))
        for stage in (0, 1, "mean")
    ]
    return measurement(rows)


def test_ratios_of_sleeping_layers() -> None:
    assert ratios(sleeping()) == {
        "time: ideal over measured, streaming, P = 2, M = 8, 3 batches": 0.9,
        "time: ideal over measured, bp_1f1b, P = 2, M = 8, 3 batches": pytest.approx(0.9),
        "speed: streaming over bp_1f1b, P = 2, M = 8": 1.5,
    }


def test_a_slower_machine_is_no_regression_of_the_engine() -> None:
    """Both engines twice as slow: the ratio is the same."""
    verdicts = check(overhead(100, 250), overhead(200, 500))
    assert [each.name for each in verdicts] == [
        "cpu_us: deepspeed_1f1b over streaming, P = 2",
        "engine_us: deepspeed_1f1b over streaming, P = 2",
    ]
    assert all(each.holds and each.change == pytest.approx(0) for each in verdicts)
    assert not any(each.holds for each in check(overhead(100, 250), overhead(115, 250)))


@pytest.mark.parametrize(("seconds", "holds"), [(2.0, True), (1.5, True), (2.2, True), (2.25, False)])
def test_a_ratio_may_fall_by_a_tenth(seconds: float, holds: bool) -> None:
    verdicts = {each.name: each for each in check(sleeping(), sleeping(seconds))}
    assert verdicts["speed: streaming over bp_1f1b, P = 2, M = 8"].holds == holds
    assert verdicts["time: ideal over measured, bp_1f1b, P = 2, M = 8, 3 batches"].holds


def test_a_tighter_tolerance_finds_more() -> None:
    assert all(each.holds for each in check(sleeping(), sleeping(2.1)))
    assert not all(each.holds for each in check(sleeping(), sleeping(2.1), tolerance=0.02))


def test_a_missing_case_is_an_error_and_a_part_is_not() -> None:
    both = measurement([*sleeping().rows, *sleeping(m=4).rows])
    with pytest.raises(GuardError, match=r"the current measurement has no case '.*M = 4"):
        check(both, sleeping())
    assert len(check(both, sleeping(), part=True)) == 3
    with pytest.raises(GuardError, match=r"the baseline has no case '.*M = 4.*': measure the baseline anew"):
        check(sleeping(), both, part=True)


def test_different_settings_are_an_error_and_repetitions_are_free() -> None:
    with pytest.raises(GuardError, match=r"with forward = 0.05, the current one with 0.01: measure one of them anew"):
        check(sleeping(), sleeping(forward=0.01))
    assert check(sleeping(), sleeping(repeat=9))


def test_different_kinds_are_an_error() -> None:
    with pytest.raises(GuardError, match="kind 'sleeping' and the current one of kind 'overhead'"):
        check(sleeping(), overhead(1, 2))
    with pytest.raises(StudyError, match="expected one of budgets, trials"):
        kind_of([{"seconds": 1.0}])
    with pytest.raises(GuardError, match="kind 'layers': expected one of overhead"):
        ratios(measurement([{"u": 1.0}]))
    without_stock = [row for row in overhead(1, 2).rows if row["method"] == "streaming"]
    with pytest.raises(GuardError, match="none of the methods deepspeed_1f1b, bp_1f1b"):
        ratios(measurement(without_stock))


def test_scaling_ceiling_and_bound_have_ratios_too() -> None:
    row = {"method": "streaming", "stages": 2, "micro_batches": 8}
    scaling = [{**row, "study": "weak", "workload": "sleeping", "layers": 2, "batches": 3, "efficiency": 0.96}]
    assert ratios(measurement(scaling)) == {
        "time: ideal over measured, weak, sleeping, streaming, P = 2, 2 layers, M = 8, 3 batches": 0.96
    }
    ceiling = [
        {**row, "model": "vgg", "share_of_ceiling": 0.95},
        {**row, "model": "vgg", "method": "ceiling", "share_of_ceiling": None},
    ]
    assert ratios(measurement(ceiling)) == {"share of the ceiling, vgg, streaming, P = 2, M = 8": 0.95}
    assert kind_of([{**row, "share_of_bound": 0.9}]) == "bound"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command in this process: exit code, and what it said."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["run/bench.py", *arguments])
        code: Any = 0
        try:
            runpy.run_path(str(ROOT / "run/bench.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        out = capsys.readouterr()
        return (code, out.out + out.err) if isinstance(code, int) else (1, out.out + str(code))

    return run


def test_the_command_fails_where_a_ratio_fell(tmp_path: Path, bench: Callable[..., tuple[int, str]]) -> None:
    files = {"base": sleeping(), "same": sleeping(), "slower": sleeping(2.5), "other": sleeping(forward=1.0)}
    for name, content in files.items():
        write(tmp_path / f"{name}.json", content)

    def compare(name: str) -> tuple[int, str]:
        return bench("--check", str(tmp_path / "base.json"), "--current", str(tmp_path / f"{name}.json"))

    code, text = compare("same")
    assert code == 0 and "FALLEN" not in text
    code, text = compare("slower")
    assert code == 1 and text.count("FALLEN") == 2 and "2 of 3 ratios fell by more than 10 %" in text
    code, text = compare("other")
    assert code == 1 and "error: the baseline was measured with forward" in text
    code, text = compare("missing")
    assert code == 1 and "is no measurement" in text


def test_a_check_measures_the_short_cases_of_its_baseline_anew(
    tmp_path: Path, bench: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fake(cases: Any, *, progress: Any) -> list[Any]:
        asked.append(cases)
        return list(sleeping().rows)

    monkeypatch.setattr("ds_al.studies.bench.again.measure_sleeping", fake)
    rows = [row for m in (4, 8, 16) for row in sleeping(m=m).rows]
    write(tmp_path / "base.json", measurement(rows, forward=0.05, backward=0.02, batches=3))
    code, text = bench("--check", str(tmp_path / "base.json"))
    assert code == 0, text
    assert (asked[0].methods, asked[0].stages, asked[0].micro_batches) == (("streaming", "bp_1f1b"), (2,), (8,))
    assert (asked[0].forward, asked[0].backward, asked[0].batches) == (0.05, 0.02, 3)


def test_committed_measurements_are_equal_to_themselves() -> None:
    content = read(ROOT / "docs" / "results" / "sleeping.json")
    assert all(each.change == 0 for each in check(content, content))
