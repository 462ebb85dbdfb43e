"""Recording, merging, exporting and reading of what stages did: on events made by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.trace import ActivationMeter, Event, Observation, Recorder
from ds_al.trace.analysis import CAUSES, bytes_sent, computing, critical_path, idle_share, span, stage_times
from ds_al.trace.clock import ClockOffset
from ds_al.trace.files import COLUMNS, merge, read_trace, write_trace

# Two stages, one micro-batch. Stage 0 computes 4 s and stage 1, which waits 2 s for it, 3 s.
STAGE_0 = [
    Event(0, "LoadMicroBatch", 0, 10.0, 10.5, wait=0.5),
    Event(0, "ForwardPass", 0, 10.5, 12.0),
    Event(0, "ForwardPass", 0, 10.625, 11.875, layer=0),
    Event(0, "SendActivation", 0, 12.0, 12.25, nbytes=64),
    Event(0, "BackwardPass", 0, 12.25, 14.5),
    Event(0, "OptimizerStep", 0, 14.5, 14.75),
]
STAGE_1 = [
    Event(1, "RecvActivation", 0, 10.0, 12.5, wait=2.5, nbytes=64),
    Event(1, "ForwardPass", 0, 12.5, 13.5),
    Event(1, "BackwardPass", 0, 13.5, 15.0),
    Event(1, "OptimizerStep", 0, 15.0, 15.5),
]
SAME_CLOCK = [ClockOffset(0.0, 0.0), ClockOffset(0.0, 0.0)]
RUN = merge([STAGE_0, STAGE_1], SAME_CLOCK)


def test_merged_events_start_at_zero_in_the_order_of_their_starts() -> None:
    assert RUN[0].start == 0.0
    assert [event.start for event in RUN] == sorted(event.start for event in RUN)
    assert len(RUN) == len(STAGE_0) + len(STAGE_1)


def test_clocks_are_corrected_only_where_they_differ_by_more_than_the_error() -> None:
    ahead = [Event(e.stage, e.instruction, e.micro_batch, e.start + 100, e.end + 100, wait=e.wait) for e in STAGE_1]
    corrected = merge([STAGE_0, ahead], [ClockOffset(0.0, 0.0), ClockOffset(100.0, 0.001)])
    assert [event.start for event in corrected] == pytest.approx([event.start for event in RUN])
    noise = merge([STAGE_0, STAGE_1], [ClockOffset(0.0, 0.0), ClockOffset(0.0005, 0.001)])
    assert [event.start for event in noise] == [event.start for event in RUN]


def test_queue_counts_messages_that_are_sent_and_not_yet_received() -> None:
    sends = [Event(0, "SendActivation", m, m, m + 0.5) for m in range(3)]
    receives = [Event(1, "RecvActivation", m, 0.0, end) for m, end in enumerate((0.6, 3.0, 4.0))]
    queues = {(e.instruction, e.micro_batch): e.queue for e in merge([sends, receives], SAME_CLOCK)}
    assert [queues["SendActivation", m] for m in range(3)] == [1, 1, 2]
    assert [queues["RecvActivation", m] for m in range(3)] == [0, 1, 0]


def test_busy_and_idle_time_add_up_and_are_told_by_cause() -> None:
    assert span(RUN) == (0.5, 5.5)
    first, second = stage_times(RUN)
    assert (first.span, second.span) == (5.0, 5.0)
    assert first.busy == pytest.approx(4.0 / 5) and second.busy == pytest.approx(3.0 / 5)
    assert second.wait_input == pytest.approx(2.0 / 5)  # what lies before the run began does not count
    assert first.drained == pytest.approx(0.75 / 5)
    assert first.other == pytest.approx(0.25 / 5)  # sending, without waiting
    assert first.wait_data == 0.0
    for time in (first, second):
        assert time.busy + sum(getattr(time, cause) for cause in CAUSES) == pytest.approx(1.0)
    assert idle_share(RUN) == pytest.approx(1 - 7.0 / 10)


@pytest.mark.parametrize(
    ("instruction", "cause"),
    [("SendGrad", "wait_queue"), ("RecvGrad", "wait_input"), ("Barrier", "wait_barrier"),
     ("LossBroadcast", "wait_barrier"), ("LoadMicroBatch", "wait_data"), ("ReduceGrads", "wait_copies"),
     ("RefreshDecoders", "wait_input"), ("SendDecoders", "wait_queue")],
)  # fmt: skip
def test_each_wait_has_its_cause(instruction: str, cause: str) -> None:
    events = [
        Event(0, "ForwardPass", 0, 0.0, 1.0),
        Event(0, instruction, 0, 1.0, 3.0, wait=2.0),
        Event(0, "BackwardPass", 0, 3.0, 4.0),
    ]
    (time,) = stage_times(events)
    assert getattr(time, cause) == pytest.approx(0.5) and time.bubble == pytest.approx(0.5)


def test_critical_path_follows_the_message_that_was_waited_for() -> None:
    path = [(event.stage, event.instruction) for event in critical_path(RUN)]
    assert path == [(0, "ForwardPass"), (1, "ForwardPass"), (1, "BackwardPass"), (1, "OptimizerStep")]


def test_critical_path_leads_through_a_barrier_to_the_stage_that_came_last() -> None:
    events = [
        Event(0, "ForwardPass", 0, 0.0, 1.0),
        Event(0, "Barrier", 0, 1.0, 3.0, wait=2.0),
        Event(0, "BackwardPass", 0, 3.0, 4.0),
        Event(1, "ForwardPass", 0, 0.0, 3.0),
        Event(1, "Barrier", 0, 3.0, 3.0),
        Event(1, "BackwardPass", 0, 3.0, 3.5),
    ]
    path = [(event.stage, event.instruction) for event in critical_path(events)]
    assert path == [(1, "ForwardPass"), (0, "BackwardPass")]


def test_critical_path_leads_from_a_send_that_waited_to_its_receiver() -> None:
    events = [
        Event(0, "ForwardPass", 0, 0.0, 1.0),
        Event(0, "SendActivation", 0, 1.0, 4.0, wait=3.0),
        Event(0, "BackwardPass", 0, 4.0, 5.0),
        Event(1, "ForwardPass", 7, 0.0, 3.5),
        Event(1, "RecvActivation", 0, 3.5, 4.0),
    ]
    path = [(event.stage, event.instruction) for event in critical_path(events)]
    assert path == [(1, "ForwardPass"), (0, "BackwardPass")]


def test_critical_path_leads_through_an_average_of_gradients_to_the_copy_that_came_last() -> None:
    events = [
        Event(1, "BackwardPass", 0, 0.0, 1.0),
        Event(1, "ReduceGrads", 0, 1.0, 3.0, wait=2.0),
        Event(1, "OptimizerStep", 0, 3.0, 4.0),
        Event(1, "BackwardPass", 0, 0.0, 3.0, copy=1),
        Event(1, "ReduceGrads", 0, 3.0, 3.0, copy=1),
        Event(1, "OptimizerStep", 0, 3.0, 3.5, copy=1),
    ]
    path = [(event.copy, event.instruction) for event in critical_path(events)]
    assert path == [(1, "BackwardPass"), (0, "OptimizerStep")]
    first, second = stage_times(events)
    assert (first.copy, second.copy) == (0, 1)
    assert first.wait_copies == pytest.approx(0.5) and second.wait_copies == 0.0


def test_messages_of_two_copies_are_not_mixed_up() -> None:
    """Both copies have a stage 0 and a stage 1, and their messages the same numbers."""
    other = [replace(event, copy=1, start=event.start + 1, end=event.end + 1) for event in (*STAGE_0, *STAGE_1)]
    both = merge([STAGE_0, STAGE_1, other], [*SAME_CLOCK, SAME_CLOCK[0]])
    assert {(e.copy, e.queue) for e in both if e.instruction == "SendActivation"} == {(0, 1), (1, 1)}
    assert [(e.copy, e.stage) for e in critical_path(both)] == [(1, 0), (1, 1), (1, 1), (1, 1)]
    assert bytes_sent(both) == {0: 128, 1: 0}


def test_tables_from_before_there_were_copies_are_read(tmp_path: Path) -> None:
    _, table = write_trace(tmp_path, RUN, micro_batches=1)
    lines = [line.rsplit(",", 1)[0] for line in table.read_text().splitlines()]
    assert COLUMNS[-1] == "copy"
    table.write_text("\n".join(lines) + "\n")
    assert read_trace(table) == RUN


def test_bytes_are_summed_by_the_stage_that_sent_them() -> None:
    assert bytes_sent(RUN) == {0: 64, 1: 0}


def test_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    _, table = write_trace(tmp_path / "new", RUN, micro_batches=1)
    assert table.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert read_trace(table) == RUN


def test_chrome_trace_has_the_form_that_its_readers_expect(tmp_path: Path) -> None:
    chrome, _ = write_trace(tmp_path, RUN, micro_batches=1, about={"method": "streaming"})
    trace = json.loads(chrome.read_text())
    check_chrome_form(trace)
    assert trace["otherData"] == {"method": "streaming"}
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == len(RUN)
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {"stage 0", "stage 1"}
    assert [event["ph"] for event in trace["traceEvents"] if event["name"] == "message"] == ["s", "f"]
    send = next(event for event in slices if event["name"] == "send")
    assert send["args"]["bytes"] == 64 and send["args"]["micro_batch"] == 1


def check_chrome_form(trace: dict[str, Any]) -> None:
    """What Perfetto's and Chrome's importers need: fields by phase, nested slices, arrows that end on slices."""
    assert isinstance(trace["traceEvents"], list) and trace["displayTimeUnit"] in ("ms", "ns")
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    arrows: dict[Any, dict[str, Any]] = defaultdict(dict)
    for event in trace["traceEvents"]:
        assert event["ph"] in {"M", "X", "C", "s", "f"}, event
        assert isinstance(event["name"], str) and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert isinstance(event["ts"], (int, float)) and event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            by_thread[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        if event["ph"] in "sf":
            assert event["ph"] not in arrows[event["id"]], f"two arrows of one id: {event}"
            arrows[event["id"]][event["ph"]] = event
    for slices in by_thread.values():
        open_until: list[float] = []
        for start, end in sorted(slices, key=lambda slice_: (slice_[0], -slice_[1])):
            while open_until and open_until[-1] <= start + 0.002:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 0.002, "slices of one thread overlap"
            open_until.append(end)
    for ends in arrows.values():
        assert ends.keys() == {"s", "f"} and ends["f"]["bp"] == "e"
        assert ends["s"]["ts"] <= ends["f"]["ts"] and ends["s"]["name"] == ends["f"]["name"]
        for end in ends.values():
            slices = by_thread[end["pid"], end["tid"]]
            assert any(start <= end["ts"] <= stop for start, stop in slices), "an arrow ends on nothing"


def test_recorder_numbers_instructions_of_a_kind_and_their_layers_alike() -> None:
    recorder = Recorder(2)
    for _ in range(2):
        start = recorder.mark()
        recorder.add_layer("ForwardPass", 5, recorder.mark(), recorder.mark())
        recorder.add("ForwardPass", start, recorder.mark(), Observation(wait=0.25, nbytes=7))
    recorder.add("BackwardPass", recorder.mark(), recorder.mark())
    recorder.skip("RefreshDecoders")  # had nothing to do at micro-batch 0
    recorder.add("RefreshDecoders", recorder.mark(), recorder.mark())
    events = recorder.events
    assert [(e.instruction, e.micro_batch, e.layer) for e in events] == [
        ("ForwardPass", 0, None),
        ("ForwardPass", 0, 5),
        ("ForwardPass", 1, None),
        ("ForwardPass", 1, 5),
        ("BackwardPass", 0, None),
        ("RefreshDecoders", 1, None),
    ]
    assert all(event.stage == 2 for event in events)
    assert (events[0].wait, events[0].nbytes, events[0].memory) == (0.25, 7, None)
    assert len(computing(events)) == 3


def test_recorder_tells_the_most_that_was_held_during_each_instruction() -> None:
    with ActivationMeter() as meter:
        recorder = Recorder(0, meter=meter)
        x = torch.ones(256, requires_grad=True)
        y = x.exp()  # keeps its result, 1 KiB
        recorder.add("ForwardPass", recorder.mark(), recorder.mark())
        y.sum().backward()
        del y
        recorder.add("BackwardPass", recorder.mark(), recorder.mark())
        recorder.add("OptimizerStep", recorder.mark(), recorder.mark())
    assert [event.memory for event in recorder.events] == [1024, 1024, 0]


@pytest.mark.cuda
def test_recorder_takes_a_gpus_times_without_waiting_for_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = torch.device("cuda")
    recorder = Recorder(0, device=device)
    x = torch.ones(4096, 4096, device=device)
    start = recorder.mark()
    for _ in range(20):
        x = x @ x
    recorder.add("ForwardPass", start, recorder.mark())
    (event,) = recorder.events
    assert event.seconds > 0.001
