"""Predictions for many stages, on small numbers of them: the rows, the page, its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_al.studies.scale.page import page
from ds_al.studies.scale.picture import draw_scale
from ds_al.studies.scale.predictions import BLOCKS, LARGE, LINKS, METHODS, OVERLAPPED, SECTIONS, Study
from ds_al.studies.scale.views import Row, row_of, rows_of, share_of_alone

SMALL_STUDY = Study(
    stages=(4, 8), micro_batches=(4, 8), dial=(2, 4), dial_micro_batches=(4, 8), sweep=(4, 16, 64), repeat=3, settled=64
)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(SMALL_STUDY.rows())


def test_every_case_is_there_and_the_same_each_time(rows: list[Row]) -> None:
    cases = 2 * 2 + 2  # two numbers of stages; two of micro-batches for one workload, and one for the other
    trained = {row["method"] for row in rows_of(rows, section="links", workload="large", stages=4, micro_batches=8)}
    assert trained == set(METHODS)
    without = cases - 1  # cases with fewer than 2 P micro-batches, which DualPipeV does not train
    assert len(rows_of(rows, section="links")) == len(LINKS) * (cases * len(METHODS) - without)
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert len({tuple(row) for row in rows}) == 1  # all have the same columns, as a CSV file needs
    tiny = Study(stages=(2,), micro_batches=(2,), dial=(2,), dial_micro_batches=(2,), sweep=(2,), repeat=2, settled=8)
    assert list(tiny.rows()) == list(tiny.rows(jobs=2))


def test_k_layers_stand_beside_the_rivals(rows: list[Row]) -> None:
    """K = 1 is zero bubble, K = P streaming, and between them the bubble is that of a group."""
    case = rows_of(rows, section="dial", stages=4, micro_batches=4)
    assert {row["layers"] for row in case} == {None, 1, 2, 4}
    assert "bp_dualpipev" in {row["method"] for row in rows_of(rows, section="dial", stages=4, micro_batches=8)}
    times = {(row["layers"], row["schedule"]): row["times_compute"] for row in case}
    assert times[1, "zb_h1"] == pytest.approx(row_of(case, method="bp_zb_h1")["times_compute"], rel=0.01)
    assert times[4, ""] < times[2, "zb_h1"] < times[1, "zb_h1"] < times[1, "1f1b"]
    assert (
        row_of(case, layers=1, schedule="1f1b")["memory_bytes"]
        > row_of(case, layers=2, schedule="1f1b")["memory_bytes"]
    )


def test_streaming_takes_rho_and_its_steps_where_links_are_fast(rows: list[Row]) -> None:
    for block in BLOCKS:
        row = row_of(rows, section="links", workload=block.name, stages=8, link="400gbit", method="streaming")
        assert row["times_compute"] == pytest.approx(block.rho + block.work(1).step / (3 * block.forward))


def test_a_slow_link_sets_the_pace_of_all(rows: list[Row]) -> None:
    case = rows_of(rows, section="links", workload="large", stages=8, micro_batches=8, link="100mbit")
    transfer = LARGE.work(1).message_bytes / (1e8 / 8)
    assert row_of(case, method="streaming")["seconds"] == pytest.approx(8 * transfer, rel=0.01)
    assert all(row["seconds"] >= 0.99 * 8 * transfer for row in case)
    assert row_of(case, method=OVERLAPPED)["seconds"] < row_of(case, method="bp_1f1b")["seconds"]


def test_the_gain_vanishes_with_many_micro_batches(rows: list[Row]) -> None:
    def gain(m: int) -> float:
        case = rows_of(rows, section="sweep", micro_batches=m)
        streaming = row_of(case, method="streaming", steps_per_batch=m)
        return row_of(case, method="bp_1f1b")["seconds"] / streaming["seconds"]

    assert gain(4) > 1.4 > gain(16) > 1 > gain(64)


def test_jitter_costs_and_a_queue_gives_back(rows: list[Row]) -> None:
    case = rows_of(rows, section="stragglers", stages=8, jitter="slow:0.05:5", method="streaming")
    shares = {row["queue_depth"]: share_of_alone(row)[0] for row in case}
    assert shares[1] <= shares[2] <= shares[8] <= shares[32] and shares[1] < shares[32]


def test_the_page_says_that_it_is_predicted_and_what_is_not(rows: list[Row], tmp_path: Path) -> None:
    files = draw_scale(rows, tmp_path / "figures")
    assert all(path.stat().st_size > 5000 for paths in files.values() for path in paths)
    names = {name: f"figures/{paths[0].name}" for name, paths in files.items()}
    header = {"command": "python run/scale.py", "date": "2026-01-01", "settings": {"settled": 64}}
    text = page(header, rows, figures=names)
    assert "**Predicted, not measured.**" in text and "* **Accuracy.**" in text and "`python run/scale.py`" in text
    assert all(f"]({name})" in text for name in names.values())
    assert "slower from M = 64 on" in text and "| 8 | 8 | `bp_zb_h2` |" in text
    assert "| K = 2 |" in text and "On 4 stages K = " in text and "nan" not in text
