"""Points of the frontier: accuracy over K from a sweep, beside time and memory on P stages, measured and predicted.

Times are per sample, relative to M (F + B) / P per batch: 1 is an ideal back-propagation pipeline, without bubble,
messages, bridges or steps. ``measured`` are sleeping stages, which have neither bridges nor steps, from an empty
pipeline on; ``planner`` is the network of the sweep with its counted operations, on equal stages, in steady state.
Memory is the planner's, without message buffers: parameters, gradients, AdamW's state, and the activations of as many
micro-batches as the schedule holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ds_al.experiment.config import override
from ds_al.group_schedule import GROUP_SCHEDULES
from ds_al.planner import Layer, Machines, Prediction, Work, group_sizes, predict, predict_groups
from ds_al.planner.groups import GroupedStages
from ds_al.planner.network import Device, PlannedNetwork
from ds_al.planner.predict import least_micro_batches
from ds_al.studies.results import Results, Row, StudyError
from ds_al.studies.sweep.over_layers import Accuracies

RIVALS = ("bp_1f1b", "bp_zb_h1", "bp_zb_h2", "bp_dualpipev", "bp_async", "bp_dp")
_ONCE = Machines(steps_per_batch=1)


def frontier(
    accuracies: Accuracies,
    dial: Results | None,
    config: Mapping[str, Any],
    *,
    stages: int,
    micro_batches: Sequence[int],
    device: Device | None = None,
) -> list[dict[str, Any]]:
    """Returns rows ``basis, kind, method, schedule, layers, stages, micro_batches, accuracy, accuracy_sd, averaged,
    averaged_sd, time, memory_bytes``.

    ``basis`` is ``measured`` or ``planner``; ``kind`` is ``al`` or ``rival``. At each K there is the fastest schedule.
    A rival has the accuracy of the twin; ``bp_async`` that of its emulation, and no row without one.

    Args:
        accuracies: accuracies over K of the network.
        dial: results of ``run/bench.py --dial``; ``None`` for the planner's rows alone.
        config: config of the network, whose micro-batch is a batch of the pipeline.
        stages: number of stages, P.
        micro_batches: values of M.
        device: rates that convert operations and bytes of a step to seconds.
    """
    depths = [row["K"] for row in accuracies.methods[accuracies.best] if row["K"] <= stages]
    works = {k: _work(config, k, stages=stages, device=device or Device()) for k in {1, *depths}}
    rows = []
    for m in micro_batches:
        parts = {k: _split(works[k], m) for k in works}
        planned = [*_planned_layers(parts, depths, stages, m), *_planned_rivals(parts[1], stages, m)]
        memory = {(each.method, each.schedule, each.layers): _memory(each, parts) for each in planned}
        unit = (parts[1].forward + parts[1].backward) / stages * m
        points = [("planner", each.method, each.schedule, each.layers, each.seconds / unit) for each in planned]
        if dial is not None:
            points += [("measured", *point) for point in _measured(dial, depths, stages=stages, micro_batches=m)]
        for basis, method, schedule, layers, time in points:
            of = _accuracy(accuracies, method, layers)
            if of is not None:
                held = memory.get((method, schedule, layers))
                if held is None:  # the planner prefers another schedule at this K
                    held = _memory(_groups(parts, layers or 1, schedule, stages, m), parts)
                rows.append({
                    "basis": basis, "kind": "rival" if layers is None else "al", "method": method,
                    "schedule": schedule, "layers": layers, "stages": stages, "micro_batches": m, **of,
                    "time": time, "memory_bytes": held,
                })  # fmt: skip
    return rows


def _work(config: Mapping[str, Any], layers: int, *, stages: int, device: Device) -> Work:
    """Returns the cost of the network in K equal layers, whose bridges cost as much as they do together."""
    shapes = override(dict(config), ["experiment.data.path=null"])  # those of the data set's name; no data is read
    work = PlannedNetwork.of(shapes, layers=layers).work(device)
    bridge = (work.rho - 1) / work.rho
    equal = Layer(al=1.0, twin=1.0, message_bytes=work.message_bytes, bridge=bridge)
    return replace(work, layers=() if layers == stages else (equal,) * layers)


def _split(work: Work, micro_batches: int) -> Work:
    """Returns the cost of a micro-batch, of which there are M in a batch."""
    parts = {
        name: value / micro_batches
        for name in ("forward", "backward", "message_bytes", "target_bytes", "activation_bytes", "al_activation_bytes")
        if (value := getattr(work, name)) is not None
    }
    return replace(work, **parts)


def _planned_layers(works: Mapping[int, Work], depths: Sequence[int], stages: int, m: int) -> Iterator[Prediction]:
    for k in depths:
        if k == stages:
            yield predict("streaming", works[k], stages=stages, micro_batches=m, machines=_ONCE)
        else:
            yield min((_groups(works, k, name, stages, m) for name in GROUP_SCHEDULES), key=lambda each: each.seconds)


def _groups(works: Mapping[int, Work], layers: int, schedule: str, stages: int, m: int) -> Prediction:
    return predict_groups(works[layers], stages=stages, layers=layers, schedule=schedule, micro_batches=m)


def _planned_rivals(work: Work, stages: int, m: int) -> Iterator[Prediction]:
    twin = replace(work, rho=1.0, layers=())
    for method in RIVALS:
        if m >= least_micro_batches(method, stages):
            yield predict(method, twin, stages=stages, micro_batches=m)


def _memory(each: Prediction, works: Mapping[int, Work]) -> float:
    """Returns the bytes of the fullest stage without message buffers."""
    if each.layers is None:
        return each.memory_bytes
    sizes = group_sizes(each.stages, each.layers)
    grouped = GroupedStages(works[each.layers], sizes, each.schedule or "1f1b", each.micro_batches, _ONCE)
    return max(grouped.memory())


def _measured(
    dial: Results, depths: Sequence[int], *, stages: int, micro_batches: int
) -> Iterator[tuple[str, str, int | None, float]]:
    """Yields method, schedule, K and time of the fastest measured schedule at each K, and of the rivals."""
    settings = dial.header["settings"]
    unit = settings["forward"] + settings["backward"]
    own = [row for row in dial.rows if (row["stages"], row["micro_batches"]) == (stages, micro_batches)]
    if not own:
        raise StudyError(f"{dial.name} has no rows of {stages} stages and {micro_batches} micro-batches: measure them")
    for k in depths:
        of_k = [row for row in own if row["layers"] == k and row["method"] in ("groups", "streaming")]
        if of_k:
            best = min(of_k, key=lambda row: row["seconds"])
            yield best["method"], best["schedule"], k, best["seconds"] / (best["batches"] * micro_batches * unit)
    for row in own:
        if row["method"] in RIVALS:
            yield row["method"], "", None, row["seconds"] / (row["batches"] * micro_batches * unit)


def _accuracy(accuracies: Accuracies, method: str, layers: int | None) -> dict[str, Any] | None:
    if layers is not None:
        row: Row | None = next(row for row in accuracies.methods[accuracies.best] if row["K"] == layers)
    else:
        row = accuracies.rivals.get(method) if method == "bp_async" else accuracies.twin
    if row is None:
        return None
    return {
        "accuracy": row["test_accuracy"], "accuracy_sd": row["test_accuracy_sd"],
        "averaged": row["averaged_accuracy"], "averaged_sd": row["averaged_accuracy_sd"],
    }  # fmt: skip
