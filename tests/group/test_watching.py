"""What watches training where layers span stages: traces, the stall watch, and the metrics of the live view."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_al
from ds_al.errors import ALCheckpointError
from ds_al.group_schedule import GROUP_SCHEDULES, Place
from ds_al.launch.ranks import run_ranks
from ds_al.trace import StageMetrics
from ds_al.trace.events import MESSAGES
from ds_al.trace.files import read_trace
from tests.group.networks import network
from tests.support.engines import MICRO_BATCHES, engine_config
from tests.trace.test_events import check_chrome_form

pytestmark = [pytest.mark.distributed, pytest.mark.alone]

BATCHES = 3
BLOCKED_AT = 6  # micro-batch, in the second batch


def make_engine(layers: int, **config: Any) -> ds_al.ALPipelineEngine:
    net = network("mlp", layers)
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=7)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(**config))
    return engine


def batches_of(blocked: float = 0.0) -> Iterator[Any]:
    """Micro-batches; one of them takes so many seconds."""
    for number, batch in enumerate(network("mlp", 1).batches(BATCHES * MICRO_BATCHES)):
        if number == BLOCKED_AT:
            time.sleep(blocked)
        yield batch


def traced(schedule: str, folder: str) -> None:
    """Worker: trains with a trace of the last two batches."""
    engine = make_engine(2, group_schedule=schedule, trace={"enabled": True, "batches": [2, 3], "folder": folder})
    stream = batches_of()
    for _ in range(BATCHES):
        engine.train_batch(stream)
    engine.destroy()


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES)
def test_a_trace_has_exactly_the_instructions_of_the_schedule(schedule: str, tmp_path: Path) -> None:
    run_ranks(f"{__name__}:traced", 4, schedule=schedule, folder=str(tmp_path))
    events = read_trace(tmp_path / "trace.csv")
    sent = 0
    for stage in range(4):
        place = Place(stage, 4, stage % 2, 2)
        batch = [type(each).__name__ for step in GROUP_SCHEDULES[schedule](MICRO_BATCHES, place) for each in step]
        own = [event for event in events if event.stage == stage and event.layer is None]
        assert [event.instruction for event in own] == batch * 2
        assert all(event.nbytes for event in own if event.instruction in MESSAGES)
        sent += sum(name in MESSAGES for name in batch) * 2
    # Activations cross all three borders, gradients the two inside the groups; each message is an arrow.
    assert sent == 2 * MICRO_BATCHES * 5
    trace = json.loads((tmp_path / "trace.json").read_text())
    check_chrome_form(trace)
    assert sum(event["ph"] == "s" for event in trace["traceEvents"]) == sent


def told_of_stalls(engine: ds_al.ALPipelineEngine, stream: Iterator[Any]) -> str:
    """What this rank prints to stderr while it trains."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        for _ in range(BATCHES):
            engine.train_batch(stream)
        engine.flush()
    engine.destroy()
    return text.getvalue()


def stalled(seconds: float) -> str:
    """Worker: what this rank tells where the data of the first stage block."""
    engine = make_engine(2, stall_seconds=1.0, on_stall="continue")
    return told_of_stalls(engine, batches_of(seconds if engine.is_first_stage() else 0.0))


def test_a_stall_is_told_on_every_stage_of_every_group() -> None:
    told = [text.split("--- stall: ")[1:] for text in run_ranks(f"{__name__}:stalled", 4, seconds=2.6)]
    assert [len(blocks) for blocks in told] == [1] * 4
    assert "stage 0, rank 0: LoadMicroBatch, micro-batch 6, waits for the data iterator" in told[0][0]
    for stage in (1, 2, 3):
        what = f"waits for the activations of micro-batch 6 from stage {stage - 1} (rank {stage - 1})"
        assert what in told[stage][0], told[stage][0]


def blocked_backward(seconds: float) -> str:
    """Worker: the same where the last stage of the one group blocks, and the first waits for its gradients."""
    engine = make_engine(1, stall_seconds=1.0, on_stall="continue", group_schedule="zb_h1")
    if engine.is_last_stage():
        calls = iter(range(BATCHES * MICRO_BATCHES))
        hook: Any = lambda *_: time.sleep(seconds if next(calls) == BLOCKED_AT else 0.0)  # noqa: E731
        engine.layers[0][1].b.register_forward_hook(hook)
    return told_of_stalls(engine, batches_of())


def test_a_stage_that_waits_for_gradients_says_from_whom() -> None:
    first, last = run_ranks(f"{__name__}:blocked_backward", 2, seconds=2.6)
    assert "stage 0, rank 0: RecvGrad, micro-batch 6, waits for the gradients of micro-batch 6 from stage 1" in first
    assert "stage 1, rank 1: BackwardInput, micro-batch 6, computes" in last


def known(schedule: str) -> tuple[dict[int, StageMetrics], list[float]]:
    """Worker: metrics and losses that this stage knows, by which the live view has its rows."""
    engine = make_engine(2, group_schedule=schedule)
    stream = batches_of()
    for _ in range(BATCHES):
        engine.train_batch(stream)
    engine.flush()
    result = engine.stage_metrics(), engine.report.flatten().tolist()
    engine.destroy()
    return result


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES)
def test_the_last_stage_knows_all_stages(schedule: str) -> None:
    metrics, report = run_ranks(f"{__name__}:known", 4, schedule=schedule)[-1]
    assert list(metrics) == [0, 1, 2, 3]
    assert metrics[3].micro_batches == BATCHES * MICRO_BATCHES
    for stage in range(3):  # theirs came with messages of the batch before
        assert metrics[stage].micro_batches in ((BATCHES - 1) * MICRO_BATCHES, BATCHES * MICRO_BATCHES), stage
        assert metrics[stage].samples_per_second > 0 and 0 <= metrics[stage].busy <= 1
    assert not torch.isnan(torch.tensor(report)).any()


def saved(folder: str) -> None:
    """Worker: a checkpoint of two AL layers."""
    engine = make_engine(2)
    engine.train_batch(batches_of())
    engine.save_checkpoint(folder)
    engine.destroy()


def loaded(folder: str) -> str:
    """Worker: the error of a network of one AL layer that loads it, before and after which the weights are the same."""
    engine = make_engine(1)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    with pytest.raises(ALCheckpointError) as error:
        engine.load_checkpoint(folder)
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    engine.destroy()
    return str(error.value)


def test_another_number_of_layers_is_another_network(tmp_path: Path) -> None:
    run_ranks(f"{__name__}:saved", 4, folder=str(tmp_path))
    for message in run_ranks(f"{__name__}:loaded", 4, folder=str(tmp_path)):
        assert "the checkpoint has 2 AL layers, this network 1" in message
