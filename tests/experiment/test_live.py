"""The live table: what it shows, which stage it marks, and what it advises."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_al.config.associated_learning import ALConfig
from ds_al.experiment.display import Display
from ds_al.experiment.forms import form_of
from ds_al.experiment.live import Averages, Slowest, advice, slowest
from ds_al.experiment.observer import Snapshot
from ds_al.figures.terminal import Console
from ds_al.trace import Report, StageMeter, StageMetrics
from tests.support.runs import run_info

NAN = math.nan


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ({0: 0.3, 1: 0.25, 2: 0.95}, Slowest(2, 0.95 / 1.5)),
        ({0: 0.95, 1: 0.3}, Slowest(0, 0.95 / 1.25)),
        ({0: 0.80, 1: 0.91}, None),  # less than 15 % above
        ({0: 0.80, 1: 0.93}, Slowest(1, 0.93 / 1.73)),
        ({0: 0.9, 1: 0.9, 2: 0.1}, None),  # two are equally slow
        ({0: NAN, 1: 0.9}, None),
        ({0: NAN, 1: 0.9, 2: 0.4}, Slowest(1, 0.9 / 1.3)),
        ({1: 0.9}, None),
        ({0: 0.0, 1: 0.0}, None),
    ],
)
def test_a_stage_is_the_slowest_if_it_is_clearly_busier_than_all_others(
    busy: dict[int, float], expected: Slowest | None
) -> None:
    found = slowest(busy)
    assert found == (expected and Slowest(expected.stage, pytest.approx(expected.share)))


@pytest.mark.parametrize(
    ("data", "layers", "method", "expected"),
    [
        (0.0, 3, "uniform", "try partition_method: measured"),
        (0.0, 3, "parameters", "try partition_method: measured"),
        (0.0, 3, "measured", "no other cut of these layers is better"),
        (0.0, 1, "uniform", "no partition_method divides the one layer it has"),
        (0.7, 3, "uniform", "70% of its own is spent on the data iterator"),
    ],
)
def test_the_advice_fits_the_cause(data: float, layers: int, method: str, expected: str) -> None:
    text = advice(Slowest(2, 0.63), data=data, layers=layers, partition_method=method)
    assert text.startswith("stage 2 is the slowest: 63% of the time goes there; ") and expected in text


def test_one_short_batch_marks_nobody() -> None:
    averages = Averages()
    for _ in range(10):
        busy = averages.busy({0: stage_metrics(busy=0.9), 1: stage_metrics(busy=0.9)})
    assert slowest(busy) is None
    assert slowest(averages.busy({0: stage_metrics(busy=0.6), 1: stage_metrics(busy=0.9)})) is None
    for _ in range(10):
        busy = averages.busy({0: stage_metrics(busy=0.6), 1: stage_metrics(busy=0.9)})
    assert slowest(busy) is not None


def stage_metrics(**values: float) -> StageMetrics:
    return StageMetrics(
        **{"micro_batches": 0, "busy": 0, "data": 0, "queue_full": 0, "samples_per_second": 0, **values}
    )


def shown(snapshot: Snapshot, *, method: str = "streaming", terminal: bool = True) -> str:
    """What a run of three stages has on the screen after a batch."""
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=terminal, color_system=None, legacy_windows=False)
    display = Display(console=console)
    display._SECONDS = 0.0
    display.started(run_info(method=method, name="small", stages=3, partition=[0, 1, 2, 4]))
    display.batch(0, lambda: snapshot)
    display.trained(())
    return text.getvalue()


AL = Snapshot(
    {
        0: stage_metrics(micro_batches=1240, busy=0.31, queue_full=1.0, samples_per_second=2100),
        1: stage_metrics(micro_batches=1236, busy=0.28, queue_full=0.75, samples_per_second=2101),
        2: stage_metrics(micro_batches=1232, busy=0.97, queue_full=NAN, samples_per_second=2102),
    },
    [[1.0, 2.0], [3.0, 4.0], [5.5, 6.5]],
    learning_rate=0.003,
)


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_table_has_a_row_per_stage_and_marks_the_slowest() -> None:
    text = shown(AL)
    assert ["0", "1,240", "2,100", "31%", "100%", "1.0000", "2.0000"] in rows(text)
    assert ["1", "1,236", "2,101", "28%", "75%", "3.0000", "4.0000"] in rows(text)
    assert [">", "2", "1,232", "2,102", "97%", "-", "5.5000", "6.5000"] in rows(text)
    assert "stage 2 is the slowest: 62% of the time goes there; try partition_method: measured" in text


def test_the_twin_shows_its_own_row() -> None:
    metrics = stage_metrics(micro_batches=8, busy=0.5, queue_full=NAN, samples_per_second=900)
    twin = Snapshot({2: metrics}, [[0.25]], learning_rate=0.003)
    text = shown(twin, method="bp_1f1b")
    assert ["2", "8", "900", "50%", "-", "0.2500"] in rows(text)
    assert "slowest" not in text


def test_without_a_terminal_there_is_no_table() -> None:
    text = shown(AL, terminal=False)
    assert "small: streaming, 3 stages" in text and "micro-batch " not in text


def test_losses_of_a_stage_are_means_over_its_layers() -> None:
    report = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [6.0, 7.0]])
    engine: Any = SimpleNamespace(module=SimpleNamespace(bounds=[0, 1, 2, 4]), report=report)
    al, twin = form_of(ALConfig()), form_of(ALConfig(method="bp_1f1b"))
    assert al.latest_losses(engine, range(3)) == [[1.0, 2.0], [3.0, 4.0], [5.5, 6.5]]
    assert twin.latest_losses(SimpleNamespace(agg_train_loss=torch.tensor(0.25)), [2]) == [[0.25]]


def test_a_stage_takes_over_what_those_before_it_know_and_no_more() -> None:
    reports = [
        Report(stages=3, layers=4, stage=stage, first_layer=first, device=torch.device("cpu"))
        for stage, first in enumerate([0, 1, 3])
    ]
    for stage, (report, bounds) in enumerate(zip(reports, [(0, 1), (1, 3), (3, 4)], strict=True)):
        report.set_metrics(stage_metrics(micro_batches=stage + 1))
        report.losses[slice(*bounds)] = float(stage)
    reports[1].take_over(reports[0].flat)
    reports[2].take_over(reports[1].flat)
    reports[0].set_metrics(stage_metrics(micro_batches=99))  # what has not been sent is not known
    assert [v.micro_batches for v in reports[2].stage_metrics()] == [1, 2, 3]
    assert reports[2].losses.tolist() == [[0, 0], [1, 1], [1, 1], [2, 2]]
    assert reports[1].losses[3:].isnan().all() and math.isnan(reports[1].stage_metrics()[2].busy)


def test_vitals_are_of_the_last_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("ds_al.trace.metrics.time.perf_counter", lambda: next(clock))
    meter = StageMeter()
    before = {"RecvActivation": 5.0, "SendActivation": 1.0, "samples": 100, "messages": 10, "found_full": 3}
    meter.start(before)
    after = {"RecvActivation": 5.5, "SendActivation": 1.25, "LoadMicroBatch": 0.5, "Barrier": 0.25, "ForwardPass": 0.5}
    read = meter.stop({**after, "samples": 140, "messages": 14, "found_full": 4}, micro_batches=14)
    assert read == StageMetrics(micro_batches=14, busy=0.5, data=0.25, queue_full=0.25, samples_per_second=20.0)
