"""What a config's ``"trace"`` block records on real ranks, and that recording changes no weight."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed import comm as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

import ds_al
from ds_al.baseline.schedules import BACKPROP_SCHEDULES
from ds_al.config.base import BLOCK
from ds_al.launch.ranks import RankFailure, run_ranks
from ds_al.models import build_al
from ds_al.schedule import AL_SCHEDULES
from ds_al.trace.analysis import CAUSES, bytes_sent, stage_times
from ds_al.trace.clock import align
from ds_al.trace.events import MESSAGES
from ds_al.trace.files import read_trace
from tests.support.engines import MICRO_BATCHES, State, different, engine_config, engine_state, make_engine, merge
from tests.support.networks import NETWORKS
from tests.trace.test_events import check_chrome_form

pytestmark = pytest.mark.distributed

BATCHES = 4
RECORDED = [2, 3]


def train(method: str, trace: dict[str, Any], evaluate_after: int = 0, stages: int | None = None) -> State:
    """Worker: trains four batches, and evaluates after one of them."""
    deepspeed.init_distributed()
    net = NETWORKS["mlp"]
    if method in AL_SCHEDULES:
        options = None if stages is None else {"num_stages": stages}
        engine: Any = make_engine(method=method, trace=trace, module_options=options)
    else:
        twin = [LayerSpec(nn.Linear, 12, 12), nn.ReLU(), LayerSpec(nn.Linear, 12, net.classes)]
        module = PipelineModule(twin, num_stages=2, loss_fn=nn.CrossEntropyLoss(), partition_method="uniform")
        config = {**engine_config(method=method, trace=trace), "gradient_clipping": 0.0}
        engine, *_ = ds_al.initialize(model=module, config=config)
    batches = iter(net.batches(BATCHES * MICRO_BATCHES))
    for batch in range(1, BATCHES + 1):
        engine.train_batch(batches)
        if batch == evaluate_after:
            engine.evaluate(net.batches(3))
    return engine_state(engine) if method in AL_SCHEDULES else {}


def trace_block(folder: Path, **more: Any) -> dict[str, Any]:
    return {"enabled": True, "batches": RECORDED, "folder": str(folder), **more}


def expected(method: str, stage: int) -> list[str]:
    """The instructions of the recorded batches, as the schedule makes them."""
    schedule = {**AL_SCHEDULES, **BACKPROP_SCHEDULES}[method](MICRO_BATCHES, 2, stage)
    if method in AL_SCHEDULES:
        schedule.micro_batches_per_step = 1
        end = []
    else:
        end = ["LossBroadcast"]
    batch = [type(instruction).__name__ for step in schedule for instruction in step]
    return (batch + end) * (RECORDED[1] - RECORDED[0] + 1)


@pytest.mark.parametrize("method", ["streaming", "bp_1f1b"])
def test_exactly_the_instructions_of_the_chosen_batches_are_recorded(method: str, tmp_path: Path) -> None:
    run_ranks(f"{__name__}:train", 2, method=method, trace=trace_block(tmp_path / "trace", memory=True))
    events = read_trace(tmp_path / "trace" / "trace.csv")
    for stage in range(2):
        own = [event for event in events if event.stage == stage and event.layer is None]
        assert [event.instruction for event in own] == expected(method, stage)
        assert all(event.memory is not None for event in own)
        assert max(event.memory or 0 for event in own) > 0
        messages = [event for event in own if event.instruction.startswith(("Send", "Recv"))]
        assert messages and all(event.nbytes and event.queue is not None for event in messages)
        layers = {event.layer for event in events if event.stage == stage and event.layer is not None}
        assert bool(layers) == (method == "streaming")
    for event in events:
        assert 0 <= event.wait <= event.seconds + 1e-6
    trace = json.loads((tmp_path / "trace" / "trace.json").read_text())
    check_chrome_form(trace)
    assert trace["otherData"]["method"] == method and trace["otherData"]["batches"] == RECORDED
    assert len(trace["otherData"]["clock_error_seconds"]) == 2
    arrows = sum(event["ph"] == "s" for event in trace["traceEvents"])
    assert arrows == 2 * MICRO_BATCHES * (1 if method == "streaming" else 2)  # gradients come back


def test_every_data_parallel_copy_is_part_of_the_trace(tmp_path: Path) -> None:
    """Only the first copy's ranks once were, and the wait for the other copies had no cause."""
    run_ranks(f"{__name__}:train", 4, method="streaming", trace=trace_block(tmp_path), stages=2)
    events = read_trace(tmp_path / "trace.csv")
    assert sorted({event.place for event in events}) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for copy, stage in {event.place for event in events}:
        own = [e.instruction for e in events if e.place == (copy, stage) and e.layer is None]
        assert [name for name in own if name != "ReduceGrads"] == expected("streaming", stage)
        assert own.count("ReduceGrads") == own.count("OptimizerStep") == 2 * MICRO_BATCHES
    for shares in stage_times(events):
        assert shares.wait_copies > 0
        assert shares.busy + sum(getattr(shares, cause) for cause in CAUSES) == pytest.approx(1.0)
    trace = json.loads((tmp_path / "trace.json").read_text())
    check_chrome_form(trace)
    assert trace["otherData"]["copies"] == 2 and len(trace["otherData"]["clock_error_seconds"]) == 4
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert list(names.values()) == [f"replica {replica}, stage {stage}" for replica in (0, 1) for stage in (0, 1)]
    arrows: dict[str, list[int]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] in "sf":
            arrows.setdefault(event["id"], []).append(event["pid"])
    assert sorted(map(tuple, arrows.values())) == [(0, 1)] * 2 * MICRO_BATCHES + [(2, 3)] * 2 * MICRO_BATCHES


def decode(folder: str) -> tuple[int, int]:
    """Worker: bytes that this stage sent in the recorded batches, with an objective that decodes while it trains."""
    sizes = {"in_shape": (12,), "widths": (16,) * 4, "bridge_hidden": 8}
    layers = build_al("mlp", num_classes=4, code_width=6, objective={"name": "decoded", "refresh_every": 3}, **sizes)
    module = ds_al.ALPipelineModule(layers, num_classes=4, base_seed=7)
    config = engine_config(trace={"enabled": True, "batches": [1, 2], "folder": folder})
    engine, *_ = ds_al.initialize(model=module, config=config)
    batches = iter(NETWORKS["mlp"].batches(2 * MICRO_BATCHES))
    for _ in range(2):
        engine.train_batch(batches)
    stats = engine.stats()
    engine.flush()
    return stats.bytes_sent, stats.messages_sent


def test_waiting_for_copies_of_decoders_is_no_forward_pass(tmp_path: Path) -> None:
    """It lay inside of it, and so counted as computing."""
    sent = run_ranks(f"{__name__}:decode", 2, folder=str(tmp_path))
    events = [event for event in read_trace(tmp_path / "trace.csv") if event.layer is None]
    due = [0, 3, 6]
    for stage in range(2):
        own = [event for event in events if event.stage == stage]
        at = {(event.instruction, event.micro_batch): event for event in own}
        sends = {number for name, number in at if name == "SendDecoders"}
        assert sends == (set(due) if stage == 0 else set())
        assert {number for name, number in at if name == "RefreshDecoders"} == set(due)
        for number in due:
            refresh, forward = at["RefreshDecoders", number], at["ForwardPass", number]
            assert refresh.end <= at.get(("SendDecoders", number), forward).start <= forward.start
            assert bool(refresh.nbytes) == (stage == 1)
        # A channel's first message comes after a header of 128 numbers.
        headers = 2 * 8 * 128 if stage == 0 else 0
        messages = sum(event.instruction in MESSAGES for event in own)
        assert sent[stage] == (bytes_sent(own)[stage] + headers, messages)
    arrows = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "s"]
    assert sum(arrow["cat"] == "SendDecoders" for arrow in arrows) == len(due)


def test_recording_changes_no_weight_and_profiles_the_chosen_rank(tmp_path: Path) -> None:
    plain = merge(run_ranks(f"{__name__}:train", 2, method="streaming", trace={}))
    block = trace_block(tmp_path, memory=True, profiler_ranks=[1])
    traced = merge(run_ranks(f"{__name__}:train", 2, method="streaming", trace=block, evaluate_after=2))
    assert different(plain, traced) == []
    assert not (tmp_path / "profiler-rank0.json").exists()
    profile = json.loads((tmp_path / "profiler-rank1.json").read_text())
    ranges = [event["name"] for event in profile["traceEvents"] if event.get("cat") == "user_annotation"]
    recorded = 2 * MICRO_BATCHES
    assert {name: ranges.count(name) for name in ("forward", "backward", "update")} == {
        "forward": recorded,
        "backward": recorded,
        "update": recorded,
    }
    evaluations = [event for event in read_trace(tmp_path / "trace.csv") if event.instruction == "Evaluation"]
    assert [sum(event.stage == stage for event in evaluations) for stage in range(2)] == [3, 3]


def end_early(folder: str, finish: bool) -> None:
    """Worker: trains two of the batches to record, and ends."""
    engine = make_engine(trace={"enabled": True, "batches": [1, 9], "folder": folder})
    batches = iter(NETWORKS["mlp"].batches(2 * MICRO_BATCHES))
    for _ in range(2):
        engine.train_batch(batches)
    if finish:
        assert engine.tracing is not None
        engine.tracing.finish()
        engine.tracing.finish()
        return
    raise SystemExit(3)


def test_training_that_ends_early_writes_what_there_is_when_told_to(tmp_path: Path) -> None:
    run_ranks(f"{__name__}:end_early", 2, folder=str(tmp_path), finish=True)
    events = read_trace(tmp_path / "trace.csv")
    assert sum(event.instruction == "ForwardPass" and event.layer is None for event in events) == 2 * 2 * MICRO_BATCHES


def test_training_that_ends_early_says_that_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(f"{__name__}:end_early", 2, folder=str(tmp_path), finish=False)
    assert "batches 1 to 9 were to be recorded, and training ended after 2" in failure.value.outputs[1]
    assert list(tmp_path.iterdir()) == []


def clock(ahead: float) -> tuple[float, float]:
    """Worker: aligns clocks of which the last rank's is ahead."""
    deepspeed.init_distributed()
    if int(os.environ["RANK"]) == 2:
        real = time.perf_counter
        time.perf_counter = lambda: real() + ahead
    measured = align(list(range(dist.get_world_size())))
    return measured.offset, measured.error


def test_clock_offsets_are_found_within_the_error_that_is_told() -> None:
    (first, second, third) = run_ranks(f"{__name__}:clock", 3, ahead=5.0)
    assert first == (0.0, 0.0)
    for (offset, error), true in ((second, 0.0), (third, 5.0)):
        assert 0 < error < 0.1
        assert abs(offset - true) <= error + 1e-6


@pytest.mark.parametrize("batches", [[0, 2], [3, 2]])
def test_batches_that_make_no_sense_are_refused(batches: list[int]) -> None:
    from ds_al.config.associated_learning import al_config

    with pytest.raises(ds_al.ALConfigError, match=r"trace.batches.*1 <= first <= last"):
        al_config({BLOCK: {"trace": {"batches": batches}}})
