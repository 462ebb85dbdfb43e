"""Measures the overhead of an engine: processor time of a micro-batch whose layers compute nothing.

Every layer is parameter-free and returns its input, so only the engine remains: instructions, messages, and the
computation of losses over a few numbers. An AL layer has two losses and their backward where the stock pipeline has one
on its last stage, so this computation is also timed without an engine and reported separately. The stock row is
DeepSpeed's own ``PipelineEngine`` with its own schedule (1F1B), without any code of this package.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import ds_al
from ds_al.config.base import BLOCK
from ds_al.launch.ranks import run_ranks, tell
from ds_al.parallel.world import join_world
from ds_al.schedule import AL_SCHEDULES

STOCK = "deepspeed_1f1b"
DEEP = "_deep_queue"
"""Suffix of a method's name: queue depth and receive slots of eight, where the default of both is two."""
METHODS = ("streaming", f"streaming{DEEP}", "forward_first", STOCK)
WIDTH = 16
BATCH = 2

Times = dict[str, list[tuple[float, float, float]]]
"""Microseconds ``(cpu, wall, maths)`` per micro-batch of every run, by method."""


class Passing(nn.Module):
    """Returns its input with an autograd graph of one node, so that backward has a graph to traverse."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the values of ``x``."""
        return (x if x.requires_grad else x.detach().requires_grad_()).view_as(x)


def measure_overhead(
    *,
    methods: Sequence[str] = METHODS,
    stages: int = 2,
    micro_batches: int = 8,
    batches: int = 100,
    repeat: int = 7,
    progress: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Times the methods alternately, ``repeat`` times each.

    Args:
        batches: batches of a timed run, each of ``micro_batches`` micro-batches.
        progress: called after every timed run.

    Returns:
        Rows ``{method, stages, stage, cpu_us, cpu_us_min, cpu_us_max, wall_us, maths_us, engine_us, ...}``:
        microseconds per micro-batch, medians over the runs: processor time of a stage's process (all threads), wall
        clock time, processor time of the layers without an engine, and that of the engine, ``cpu_us - maths_us``.
        ``cpu_share`` and ``engine_share`` are ratios to the stock engine on the same stage, if it was measured. Rows
        with ``stage`` ``"mean"`` average the stages.

    Raises:
        RankFailure: a rank failed.
    """
    by_rank = run_ranks(
        f"{__name__}:time_engines",
        stages,
        timeout=600.0,
        news=None if progress is None else lambda line: progress(),
        methods=tuple(methods),
        micro_batches=micro_batches,
        batches=batches,
        repeat=repeat,
    )
    return overhead_rows(by_rank, micro_batches=micro_batches, batches=batches, repeat=repeat)


def overhead_rows(by_rank: Sequence[Times], *, micro_batches: int, batches: int, repeat: int) -> list[dict[str, Any]]:
    """Returns the rows of :func:`measure_overhead` from what :func:`time_engines` returned on each rank."""
    stages = len(by_rank)
    common = {"stages": stages, "micro_batches": micro_batches, "batches": batches, "repeat": repeat}
    rows: list[dict[str, Any]] = []
    for method in by_rank[0]:
        own: list[dict[str, Any]] = [
            {"method": method, "stage": n, **common, **_medians(t[method])} for n, t in enumerate(by_rank)
        ]
        names = [name for name in own[0] if name.endswith("_us") or "_us_" in name]
        mean = {name: statistics.mean(row[name] for row in own) for name in names}
        rows += [*own, {"method": method, "stage": "mean", **common, **mean}]
    stock = {row["stage"]: row for row in rows if row["method"] == STOCK}
    for row in rows:
        for name in ("cpu", "engine"):
            row[f"{name}_share"] = row[f"{name}_us"] / stock[row["stage"]][f"{name}_us"] if stock else None
    return rows


def _medians(turns: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    cpu, wall, maths = (sorted(column) for column in zip(*turns, strict=True))
    medians = {"cpu_us": cpu, "wall_us": wall, "maths_us": maths}
    found = {name: statistics.median(values) for name, values in medians.items()}
    engine = statistics.median(total - own for total, _, own in turns)
    return {**found, "engine_us": engine, "cpu_us_min": cpu[0], "cpu_us_max": cpu[-1]}


# ---- functions that run on each rank -----------------------------------------------------------------


def time_engines(methods: Sequence[str], micro_batches: int, batches: int, repeat: int) -> Times:
    """Times all methods on this rank, on the device of its accelerator."""
    join_world()
    engines = {method: _engine(method, micro_batches) for method in methods}
    times: Times = {method: [] for method in methods}
    for method in methods:
        _turn(engines[method], batches=3)  # the first batch sends shapes and starts threads
    for _ in range(repeat):
        for method in methods:
            cpu, wall = _turn(engines[method], batches=batches)
            unit = 1e6 / (batches * micro_batches)
            maths = _maths(method, micro_batches=batches * micro_batches, device=engines[method].device)
            times[method].append((cpu * unit, wall * unit, maths * unit))
            if dist.get_rank() == 0:
                tell(method)
    return times


def _turn(engine: Any, *, batches: int) -> tuple[float, float]:
    data = _batches()
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(batches):
        engine.train_batch(data)
    return time.process_time() - cpu, time.perf_counter() - wall


def _maths(method: str, *, micro_batches: int, device: torch.device) -> float:
    """Returns the processor seconds of this stage's layers and losses without an engine."""
    x, labels = (tensor.to(device) for tensor in next(_batches()))
    dist.barrier()
    if method == STOCK:
        layer, loss_fn = Passing(), nn.CrossEntropyLoss() if dist.get_rank() == dist.get_world_size() - 1 else None
        start = time.process_time()
        for _ in range(micro_batches):
            y = layer(x)
            if loss_fn is None:
                torch.autograd.backward(y, x)
            else:
                loss_fn(y, labels).backward()
        return time.process_time() - start
    al = ds_al.ALLayer(Passing(), Passing(), Passing(), Passing())
    start = time.process_time()
    for _ in range(micro_batches):
        s, t = al(x, x)
        torch.autograd.backward(al.local_losses(s, t, x))
    return time.process_time() - start


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.repeat((torch.zeros(BATCH, WIDTH), torch.zeros(BATCH, dtype=torch.int64)))


def _engine(method: str, micro_batches: int) -> Any:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    stages = dist.get_world_size()
    if method == STOCK:
        layers = [LayerSpec(Passing) for _ in range(stages)]
        model = PipelineModule(layers, num_stages=stages, loss_fn=nn.CrossEntropyLoss(), partition_method="uniform")
        optimizer = torch.optim.SGD(
            [nn.Parameter(torch.zeros(1))]
        )  # DeepSpeed requires an optimizer and steps it once per batch
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    name = method.removesuffix(DEEP)
    if name not in AL_SCHEDULES:
        raise ValueError(f"method {method!r}: expected one of {', '.join((*AL_SCHEDULES, STOCK))}, or one with {DEEP}")
    passing = LayerSpec(Passing)
    specs = [ds_al.ALLayerSpec(f=passing, b=passing, g=passing, h=passing) for _ in range(stages)]
    queues = {"queue_depth": 8, "receive_slots": 8} if name != method else {}
    module = ds_al.ALPipelineModule(specs, num_classes=WIDTH)
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}, BLOCK: {"method": name, **queues}}
    return ds_al.initialize(model=module, config=config)[0]
