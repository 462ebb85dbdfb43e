"""Measures what the engine costs on one GPU, with all layers in one process: AL in its forms beside the twin.

    engine    processor time of a micro-batch whose layers compute nothing (:mod:`ds_al.studies.bench.overhead`)
    network   of each network and form: time of a micro-batch, rho, kernels, share of the time that the GPU computes,
              and the peak of its memory beside what is counted

Forms alternate. The time of a micro-batch is the wall clock's, with the device waited for at the end of a run alone.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_al.experiment.recipes import RECIPES
from ds_al.models.cost import NetworkCost, model_cost
from ds_al.parallel.world import join_world
from ds_al.studies.bench import overhead, workloads
from ds_al.studies.bench.cases import train
from ds_al.studies.parts import tell_row
from ds_al.studies.results import Row
from ds_al.trace import ActivationMeter

TWIN = "twin"
_ENGINES = ("streaming", overhead.STOCK)
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_FLOAT = 4
_STEPPED = 4 * _FLOAT  # bytes of a parameter: weight, gradient and AdamW's two moments


@dataclass(frozen=True)
class Network:
    """A network and its micro-batches.

    Attributes:
        name: a name of :data:`~ds_al.models.AL_MODELS`.
        options: options of both forms.
        shape: shape of a sample: ``(C, H, W)`` of images, ``(T,)`` of texts.
        samples: samples of a micro-batch.
        bridges: further options of the AL form, by name of the variant.
    """

    name: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    samples: int
    bridges: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"published": {}})

    @property
    def is_text(self) -> bool:
        """Whether x is token ids."""
        return len(self.shape) == 1

    def forms(self) -> dict[str, Mapping[str, Any]]:
        """Returns the options of each form by its name, the twin's first."""
        return {TWIN: self.options, **{name: {**self.options, **own} for name, own in self.bridges.items()}}

    def batches(self, count: int = 8) -> list[tuple[Tensor, Tensor]]:
        """Returns random micro-batches ``(x, labels)`` on the host."""
        generator = torch.Generator().manual_seed(0)
        size, made = (self.samples, *self.shape), []
        for _ in range(count):
            if self.is_text:
                x = torch.randint(1, self.options["vocab_size"], size, generator=generator)
            else:
                x = torch.randn(size, generator=generator)
            made.append((x, torch.randint(self.options["num_classes"], (self.samples,), generator=generator)))
        return made

    def cost(self, form: str) -> NetworkCost:
        """Counts operations and parameters of a form and of the twin."""
        dtype = torch.int64 if self.is_text else torch.float32
        return model_cost(self.name, shape=(self.samples, *self.shape), dtype=dtype, **self.forms()[form])

    def engine(self, form: str) -> Any:
        """Builds the engine of a form, all layers in this process."""
        return workloads.model_engine(
            "bp_1f1b" if form == TWIN else "streaming",
            model=self.name,
            stages=1,
            micro_batch=self.samples,
            options=self.forms()[form],
            optimizer=workloads.ADAMW,
        )


def _images(name: str) -> Network:
    return Network(
        name,
        {"preset": "paper", "in_shape": (3, 32, 32), "num_classes": 10},
        shape=(3, 32, 32),
        samples=128,
        bridges={"published": {}, "recipe": RECIPES["ours"][name]["al_options"]},
    )


NETWORKS: tuple[Network, ...] = (
    _images("vgg"),
    _images("resnet"),
    Network(
        "transformer", {"preset": "paper", "vocab_size": 30_000, "num_classes": 4}, shape=(128,), samples=256
    ),  # its recipe has the published bridges
)
"""The networks of the published experiments, with one AL layer per block."""


@dataclass(frozen=True)
class Runs:
    """Sizes of the measurements.

    Attributes:
        micro_batches: micro-batches of a batch, M.
        batches: batches of a timed run.
        repeat: timed runs of each form.
        idle_batches: batches of a timed run of layers that compute nothing.
    """

    micro_batches: int = 4
    batches: int = 10
    repeat: int = 5
    idle_batches: int = 50


def measure(*, seconds: float, networks: Sequence[Network], runs: Runs) -> None:
    """Measures all, and tells rows with a ``section``, ``"engine"`` or ``"network"``.

    A network that fails, as one that needs more memory than there is, leaves a row with the reason, as does one for
    which no time is left.

    Args:
        seconds: time limit of the whole part.
        networks: networks to measure.
        runs: sizes of the measurements.
    """
    end = time.monotonic() + 0.9 * seconds
    join_world()
    _tell("engine", "engine", lambda: engine_rows(runs))
    for network in networks:
        if time.monotonic() < end:
            _tell("network", network.name, partial(network_rows, network, runs))
        else:
            tell_row({"section": "network", "network": network.name, "failure": "no time was left"})


def _tell(section: str, name: str, make: Callable[[], list[Row]]) -> None:
    """Tells the rows of a section, or its failure."""
    try:
        rows = make()
    except Exception as error:  # a failure is also a result
        rows = [{section: name, "failure": f"{type(error).__name__}: {error}"}]
    for row in rows:
        tell_row({"section": section, **row})
    gc.collect()  # engines refer to themselves


def engine_rows(runs: Runs) -> list[Row]:
    """Measures the processor time of engines whose layers compute nothing; see :mod:`ds_al.studies.bench.overhead`."""
    sizes = {"micro_batches": 8, "batches": runs.idle_batches, "repeat": runs.repeat}
    rows = overhead.overhead_rows([overhead.time_engines(_ENGINES, **sizes)], **sizes)
    return [{"engine": row["method"], "failure": "", **row} for row in rows if row["stage"] != "mean"]


def network_rows(network: Network, runs: Runs) -> list[Row]:
    """Measures all forms of a network.

    Returns:
        Rows ``network, form, layers, samples, micro_batches, ms, ms_min, ms_max, rho, rho_by_flops, cpu_ms, kernels,
        device_ms, busy, peak_bytes, counted_bytes, failure``. Times are per micro-batch: ``ms`` is the median over the
        runs, ``cpu_ms`` processor time of the host, ``device_ms`` time in which the device computes or copies. ``rho``
        is ``ms`` over that of the twin; ``busy`` is ``device_ms`` over ``ms``. What only a GPU has is ``None``
        elsewhere.
    """
    data = itertools.cycle(network.batches())
    engines: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for form in network.forms():
        cost = network.cost(form)
        before = _allocated()
        engines[form] = engine = network.engine(form)
        held = _held(engine, data, micro_batches=runs.micro_batches)
        parameters = cost.parameters()
        own = parameters["twin"] if form == TWIN else sum(parameters[part] for part in "fbgh")
        peak = _peak(engine, data, micro_batches=runs.micro_batches)
        found[form] = {
            "network": network.name,
            "form": form,
            "layers": None if form == TWIN else len(cost.layers),
            "samples": network.samples,
            "micro_batches": runs.micro_batches,
            "rho_by_flops": 1.0 if form == TWIN else cost.rho,
            "peak_bytes": None if peak is None else peak - before,
            "counted_bytes": _STEPPED * own + held,
        }
    times = timed(engines, data, runs)
    for form, engine in engines.items():
        wall, cpu = ([each[place] for each in times[form]] for place in (0, 1))
        kernels, device_ms = profiled(engine, data, micro_batches=runs.micro_batches)
        ms = statistics.median(wall)
        found[form] |= {
            "ms": ms,
            "ms_min": min(wall),
            "ms_max": max(wall),
            "cpu_ms": statistics.median(cpu),
            "kernels": kernels,
            "device_ms": device_ms,
            "busy": None if device_ms is None else device_ms / ms,
            "failure": "",
        }
    return [{**row, "rho": row["ms"] / found[TWIN]["ms"]} for row in found.values()]


def timed(engines: Mapping[str, Any], data: Iterator[Any], runs: Runs) -> dict[str, list[tuple[float, float]]]:
    """Times the forms alternately.

    Returns:
        Milliseconds of wall clock and of the host's processor per micro-batch, of every run, by form.
    """
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in engines}
    unit = 1e3 / (runs.batches * runs.micro_batches)
    for _ in range(runs.repeat):
        for form, engine in engines.items():
            _wait(engine.device)
            cpu, wall = time.process_time(), time.perf_counter()
            train(engine, data, micro_batches=runs.micro_batches, batches=runs.batches)
            cpu = time.process_time() - cpu  # before waiting, which may occupy the processor
            _wait(engine.device)
            times[form].append(((time.perf_counter() - wall) * unit, cpu * unit))
    return times


def profiled(engine: Any, data: Iterator[Any], *, micro_batches: int) -> tuple[float | None, float | None]:
    """Trains two batches under torch's profiler.

    Returns:
        Kernels per micro-batch, and milliseconds per micro-batch in which the device was busy; ``None`` on a CPU. The
        profiler slows the host down, but neither number depends on the host.
    """
    if engine.device.type != "cuda":
        return None, None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        train(engine, data, micro_batches=micro_batches, batches=2)
        _wait(engine.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        kernels, seconds = device_work(json.loads(path.read_text())["traceEvents"])
    return kernels / (2 * micro_batches), 1e3 * seconds / (2 * micro_batches)


def device_work(events: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """Returns the number of kernels in a Chrome trace, and the seconds in which at least one kernel or copy ran."""
    own = [event for event in events if event.get("ph") == "X" and event.get("cat") in _ON_DEVICE]
    busy = end = 0.0
    for event in sorted(own, key=lambda event: float(event["ts"])):  # microseconds; streams overlap
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return sum(event["cat"] == "kernel" for event in own), busy / 1e6


def _held(engine: Any, data: Iterator[Any], *, micro_batches: int) -> int:
    """Returns the peak bytes that autograd holds for backward, in the first batch."""
    with ActivationMeter(exclude=engine.module.parameters()) as meter:
        train(engine, data, micro_batches=micro_batches, batches=1)
    return meter.peak_bytes


def _peak(engine: Any, data: Iterator[Any], *, micro_batches: int) -> int | None:
    """Returns the peak of the memory allocated on the GPU during two batches."""
    if engine.device.type != "cuda":
        return None
    _wait(engine.device)
    torch.cuda.reset_peak_memory_stats(engine.device)
    train(engine, data, micro_batches=micro_batches, batches=2)
    _wait(engine.device)
    return torch.cuda.max_memory_allocated(engine.device)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
