"""The maths of the scaling studies, of the ceiling and of the bound, on times that are made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.baseline.data_parallel import micro_batches_per_replica, share
from ds_al.errors import ALConfigError
from ds_al.partition.plan import LayerTime
from ds_al.planner import StageCost
from ds_al.planner.formulas import ideal_seconds
from ds_al.studies.bench import published
from ds_al.studies.bench.ceiling import ceiling_rows
from ds_al.studies.bench.forms import ALForm, Network, TwinForm, best_cuts, medians, stage_costs
from ds_al.studies.bench.interleaved import quartiles, turns
from ds_al.studies.bench.ratio import balance_of, ratio_bound, ratio_row, rho_by_time
from ds_al.studies.bench.scaling import METHODS, ScalingCases
from ds_al.studies.bench.scaling_rows import Case, StageRun, equal_costs, scaling_row, schedule_seconds, with_speedups
from ds_al.studies.bench.texts import ag_news
from ds_al.studies.figures import draw_ratios, draw_scaling
from ds_al.studies.tables.documents import fill

HEADER = {"command": "python run/scaling.py", "date": "2026-01-01", "machine": {"cores": 2, "cpu": "x"}, "versions": {}}
SIZE = {"micro_batches": 4, "batches": 3}


def run(seconds: float, *, forward: float, backward: float, step: float = 0.0, engine: float = 0.0) -> StageRun:
    return StageRun(0.0, seconds, forward, backward, step, engine, busy=12 * (forward + backward + engine))


def row(
    case: Case, seconds: float, *, layer: StageCost | None = None, measured: bool = True, **cost: float
) -> dict[str, Any]:
    repetition = [run(seconds, **cost)] * case.stages
    return scaling_row(
        case, [repetition], workload="sleeping", layer=layer, measured=measured, data="none", **SIZE
    )  # fmt: skip


@pytest.mark.parametrize("method", [method for method in METHODS if method != "bp_dp"])
@pytest.mark.parametrize(("stages", "layers"), [(1, 1), (3, 3), (4, 12)])
def test_the_ideal_is_that_of_the_formula_for_equal_stages(method: str, stages: int, layers: int) -> None:
    held = layers / stages
    wanted = ideal_seconds(method, stages=stages, forward=0.2 * held, backward=0.3 * held, **SIZE)
    case = Case("strong", method, stages, layers)
    found = row(case, 2 * wanted, layer=StageCost(0.2, 0.3), forward=0.2 * held, backward=0.3 * held)
    assert found["ideal"] == pytest.approx(wanted)
    assert found["efficiency"] == pytest.approx(0.5)
    assert found["attainable_seconds"] == pytest.approx(wanted)


def test_replicas_share_the_micro_batches_and_round_up() -> None:
    costs = equal_costs(Case("strong", "bp_dp", 3, 12), StageCost(0.2, 0.3))
    assert costs == [StageCost(12 * 0.2, 12 * 0.3)] * 3
    assert schedule_seconds("bp_dp", costs, micro_batches=4, batches=3) == pytest.approx(3 * 2 * 12 * 0.5)
    slow = [StageCost(1.0, 1.0), StageCost(1.0, 2.0)]
    assert schedule_seconds("bp_dp", slow, micro_batches=4, batches=1) == pytest.approx(2 * 3.0)


def test_replicas_read_every_micro_batch_once() -> None:
    read = [list(share(range(8), replica=replica, replicas=2)) for replica in range(2)]
    assert read == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert micro_batches_per_replica(8, 3) == 3


def test_more_stages_than_cores_are_judged_by_what_is_computed_from_busy_times() -> None:
    case = Case("weak", "streaming", 3, 3)
    found = row(case, 99.0, measured=False, forward=0.2, backward=0.3, engine=0.1)
    assert found["basis"] == "computed"
    assert found["attainable_seconds"] == pytest.approx(12 * 0.6 + 2 * 0.3)  # the engine's part comes before sending
    assert found["ideal"] == pytest.approx(12 * 0.5 + 2 * 0.2)
    assert found["efficiency"] == pytest.approx(found["ideal"] / found["attainable_seconds"])
    assert found["busy_seconds"] == pytest.approx(12 * 0.6) and found["seconds"] == 99.0
    assert found["engine_ms"] == pytest.approx(100)


def test_the_ideal_of_unequal_stages_spreads_their_work_evenly() -> None:
    runs = [[run(9.0, forward=0.1, backward=0.2), run(9.0, forward=0.3, backward=0.4)]]
    found = scaling_row(
        Case("strong", "bp_naive", 2, 2), runs, workload="transformer", layer=None, measured=True, data="x", **SIZE
    )
    assert found["ideal"] == pytest.approx(12 * 2 * 0.5)
    streaming = scaling_row(
        Case("strong", "streaming", 2, 2), runs, workload="transformer", layer=None, measured=True, data="x", **SIZE
    )
    assert streaming["ideal"] == pytest.approx(12 * 0.5 + 0.2)
    assert streaming["attainable_seconds"] == pytest.approx(0.1 + 12 * 0.7)  # the slower stage sets the pace


def test_speed_up_is_over_one_stage_of_the_same_method_and_layers() -> None:
    cost = {"forward": 0.2, "backward": 0.3}
    rows = with_speedups(
        [
            row(Case("weak", "streaming", 1, 1), 6.0, **cost),
            row(Case("weak", "streaming", 4, 4), 8.0, **cost),
            row(Case("strong", "streaming", 1, 12), 72.0, **cost),
            row(Case("strong", "streaming", 4, 12), 20.0, **cost),
            row(Case("strong", "bp_1f1b", 4, 12), 20.0, **cost),
        ]
    )
    assert [r["speedup"] for r in rows] == [1.0, pytest.approx(4 * 6 / 8), 1.0, pytest.approx(3.6), None]
    assert [r["parallel_efficiency"] for r in rows] == [1.0, pytest.approx(0.75), 1.0, pytest.approx(0.9), None]


def test_a_computed_speed_up_is_of_computed_times() -> None:
    cost = {"forward": 0.2, "backward": 0.3}
    alone = row(Case("weak", "streaming", 1, 1), 100.0, **cost)
    many = row(Case("weak", "streaming", 3, 3), 1000.0, measured=False, **cost)
    assert with_speedups([alone, many])[1]["speedup"] == pytest.approx(3 * 6.0 / 6.4)


def test_the_published_efficiency_falls_as_its_table_says() -> None:
    assert published.parallel_efficiency("weak", "AL")[4] == pytest.approx(0.478, abs=5e-4)
    assert published.speedups("strong", "AL")[4] == pytest.approx(1.297, abs=5e-4)


def test_layers_that_stages_do_not_divide_are_refused() -> None:
    with pytest.raises(ALConfigError, match="got 12 layers for 5 stages"):
        cases(strong=(5,))
    assert list(cases(strong=(4,)).worlds()) == [("weak", 1, 1), ("weak", 2, 2), ("strong", 4, 12)]


def cases(*, strong: tuple[int, ...]) -> ScalingCases:
    return ScalingCases(
        studies=("weak", "strong"), methods=METHODS, weak=(1, 2), strong=strong, layers=12, micro_batches=4, batches=2,
        drained_batches=1, repeat=1, layer=StageCost(0.01, 0.01),
    )  # fmt: skip


NETWORK = Network("vgg", stages=2, micro_batch=8)


def test_the_slower_half_is_the_ceiling() -> None:
    told = {
        "cuts": [0, 2, 4],
        "ranks": [
            {"streaming": (0.0, 4.4), "ceiling": (10.0, 13.0)},
            {"streaming": (0.1, 5.0), "ceiling": (10.0, 14.0)},
        ],
    }
    streaming, ceiling = ceiling_rows(NETWORK, [told], micro_batches=4, batches=5)
    assert streaming["samples_per_s"] == pytest.approx(160 / 5.0)
    assert ceiling["samples_per_s"] == pytest.approx(160 / 4.0)
    assert streaming["share_of_ceiling"] == pytest.approx(0.8) and ceiling["share_of_ceiling"] == 1.0
    assert streaming["balance"] == pytest.approx(0.75)


def ratio_told(streaming: float, one_f_one_b: float) -> dict[str, Any]:
    spans = {"streaming": {"2": (0.0, streaming)}, "bp_1f1b": {"2": (0.0, one_f_one_b)}}
    al = [(0.1, 0.2, 0.02)] * 4
    twin = [(0.1, 0.1, 0.02)] * 5
    return {"al_cuts": [0, 2, 4], "twin_cuts": [0, 3, 5], "ranks": [{"spans": spans, "al": al, "twin": twin}] * 2}


def test_the_ratio_stands_beside_its_bound() -> None:
    repetitions = [ratio_told(10.0, 11.0), ratio_told(10.0, 12.0), ratio_told(10.0, 13.0)]
    found = ratio_row(NETWORK, repetitions, micro_batches=2, batches=8, rho_by_flops=1.1)
    rho = 4 * 0.32 / (5 * 0.21)  # the twin steps once in two micro-batches
    assert found["ratio"] == pytest.approx(1.2) and found["wins"]
    assert (found["ratio_low"], found["ratio_high"]) == (pytest.approx(1.15), pytest.approx(1.25))
    assert found["rho"] == pytest.approx(rho)
    assert found["bound"] == pytest.approx(3 / (2 * rho))
    assert found["bound_by_flops"] == pytest.approx(3 / 2.2)
    assert found["share_of_bound"] == pytest.approx(1.2 * 2 * rho / 3)
    assert found["al_balance"] == pytest.approx(1.0) and found["twin_balance"] == pytest.approx(2.5 / 3)
    twin, al = [StageCost(0.3, 0.3, 0.06), StageCost(0.2, 0.2, 0.04)], [StageCost(0.2, 0.4, 0.04)] * 2
    size = {"micro_batches": 2, "batches": 8}
    balanced = schedule_seconds("bp_1f1b", twin, **size) / schedule_seconds("streaming", al, **size)
    assert found["bound_balanced"] == pytest.approx(balanced)
    lost = ratio_row(NETWORK, [ratio_told(10.0, 9.0)], micro_batches=2, batches=8, rho_by_flops=1.1)
    assert not lost["wins"]


def test_the_bound_falls_towards_one_over_rho() -> None:
    assert ratio_bound(micro_batches=2, stages=2, rho=1.0) == 1.5
    assert ratio_bound(micro_batches=10**6, stages=2, rho=1.25) == pytest.approx(0.8, abs=1e-5)
    assert rho_by_time([LayerTime(1, 1, 1)], [LayerTime(1, 1, 1)], micro_batches=10**6) == pytest.approx(1.5, abs=1e-5)


def test_summaries_of_repetitions() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert [list(turns(["a", "b"], number)) for number in range(2)] == [["a", "b"], ["b", "a"]]
    assert medians([[LayerTime(1, 5, 0)], [LayerTime(2, 4, 0)], [LayerTime(9, 3, 0)]]) == [LayerTime(2, 4, 0)]
    times = [LayerTime(1, 1, 0), LayerTime(1, 1, 0), LayerTime(2, 2, 0)]
    assert best_cuts(times, stages=2) == [0, 2, 3]
    assert stage_costs(times, [0, 2, 3]) == [StageCost(2, 2, 0), StageCost(2, 2, 0)]
    assert balance_of([StageCost(1, 0), StageCost(3, 0)]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("model", ["vgg", "transformer"])
def test_both_forms_are_timed_layer_by_layer_and_train(model: str) -> None:
    network = Network(model, stages=1, micro_batch=2)
    x, labels = network.micro_batches(count=1)[0]
    al, twin = ALForm(network), TwinForm(network)
    before = [[p.detach().clone() for m in form for p in m.parameters()] for form in (al.layers, twin.modules)]
    times = al.once(x, labels), twin.once(x, labels)
    assert len(times[0]) == len(al.layers) and len(times[1]) == len(twin.modules) == len(al.layers) + 1
    assert all(math.isfinite(each.cost()) and each.cost() > 0 for form in times for each in form)
    for old, form in zip(before, (al.layers, twin.modules), strict=True):
        changed = [not torch.equal(a, p) for a, p in zip(old, (p for m in form for p in m.parameters()), strict=True)]
        assert sum(changed) > 0.9 * len(changed)  # a bias before a norm has no gradient


def test_generated_tokens_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        from ds_al.errors import ALDataError

        raise ALDataError("no connection")

    monkeypatch.setattr("ds_al.studies.bench.texts.load_data", absent)
    texts = ag_news(None, count=3, micro_batch=2, length=5)
    assert "generated tokens" in texts.origin and len(texts.micro_batches) == 3
    (ids, mask), labels = texts.micro_batches[0]
    assert ids.shape == mask.shape == (2, 5) and mask.all() and labels.shape == (2,)
    with pytest.raises(Exception, match="no connection"):
        ag_news("nowhere", count=3, micro_batch=2)


def test_tables_and_figures_say_where_al_loses_and_what_is_computed(tmp_path: Path) -> None:
    cost = {"forward": 0.2, "backward": 0.3}
    scaling = with_speedups(
        [
            row(Case("weak", "streaming", 1, 1), 6.0, **cost),
            row(Case("weak", "streaming", 4, 4), 8.0, measured=False, **cost),
            row(Case("strong", "streaming", 1, 12), 72.0, **cost),
            row(Case("strong", "streaming", 4, 12), 20.0, **cost),
        ]
    )
    told = [ratio_told(10.0, 9.0)]
    ratios = [ratio_row(NETWORK, told, micro_batches=2, batches=8, rho_by_flops=1.1)]
    spans = [{"streaming": (0.0, 5.0), "ceiling": (0.0, 4.0)}] * 2
    halves = ceiling_rows(NETWORK, [{"cuts": [0, 2, 4], "ranks": spans}], micro_batches=4, batches=5)
    text = tables_of(tmp_path, scaling=scaling, ratios=ratios, halves=halves)
    assert "| `streaming` | 1.00 (1.000) | *" in text and "*Italics*: computed" in text
    assert "| `streaming` | 1.00 (0.083) | 3.60 (0.330) |" in text
    assert "| published AL | 1.00 | 1.91 |" in text  # four times the published 0.478
    assert "| `vgg` | 2 | **0.900** | 0.900 to 0.900 | **1F1B: AL loses here** |" in text
    assert "| **0.800** | 0.800 to 0.800 | 1.000 | 1 |" in text
    drawn = [*draw_scaling(scaling, tmp_path / "a.json"), *draw_ratios(ratios, tmp_path / "b.json")]
    assert [path.name for path in drawn] == ["a.png", "a.svg", "b.png", "b.svg"]
    assert all(path.stat().st_size > 1000 for path in drawn)


def tables_of(folder: Path, **measured: list[dict[str, Any]]) -> str:
    document = folder / "page.md"
    document.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in measured))
    for name, rows in measured.items():
        (folder / f"{name}.json").write_text(json.dumps({"header": HEADER, "rows": rows}))
    fill(document, [folder / f"{name}.json" for name in measured])
    return document.read_text()
