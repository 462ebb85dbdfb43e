"""A small job into which a fault is injected: the script of its ranks, as a user would write it.

    initialize -> train -> save -> train -> evaluate -> load -> train -> the end

Places of a fault are instructions of a schedule, by their names, and :data:`CALLS`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ds_al
from ds_al.checkpoint import saving, writer
from ds_al.models import build_al
from ds_al.parallel import presence

CALLS = ("before the first", "after the last", "evaluate", "save", "asynchronous save", "load")
"""Places beside instructions: before the first and after the last batch, and inside of calls."""
STRUCK = "struck"
"""File in the folder of the job with the time of the fault."""

_MICRO_BATCHES, _BATCHES, _SAMPLES = 4, 6, 8
_HIT = 5  # a fault comes with the sixth instruction of its kind, in the second batch
_ROOM = 1 << 25  # bytes that a process may still allocate when it runs out of memory
_FILE = 1 << 14  # bytes that a file may have on a full disk: less than a layer's weights, more than a marker


@dataclass(frozen=True)
class Form:
    """Form of the job.

    Attributes:
        ranks: number of processes.
        stages: stages of a pipeline; more ranks make replicas of it.
        layers: number of AL layers, of two blocks each.
        objective: objective of the layers.
        al: keys of the config's block.
    """

    ranks: int
    stages: int
    layers: int
    objective: Mapping[str, Any] = field(default_factory=lambda: {"name": "mse"})
    al: Mapping[str, Any] = field(default_factory=dict)


FORMS = {
    "stages": Form(3, 3, 3, {"name": "decoded", "refresh_every": 2}),
    "replicas": Form(4, 2, 2),
    "group": Form(4, 4, 2, al={"group_schedule": "zb_h1"}),
}


def run(form: str, *, fault: str, place: str, rank: int, folder: str, stopped: float | None = None) -> None:
    """Runs one rank of the job.

    Args:
        form: one of :data:`FORMS`.
        fault: what happens, see :func:`strike`.
        place: where it happens.
        rank: the rank to which it happens.
        folder: folder of the checkpoints.
        stopped: seconds after which a stopped process ends the job, instead of :data:`ds_al.parallel.presence.STOPPED`.
    """
    if stopped is not None:
        presence.STOPPED = stopped
    made = FORMS[form]
    here = int(os.environ["RANK"]) == rank
    engine = _engine(made, asynchronous=place == "asynchronous save")
    batches = _batches()

    def hit() -> None:
        Path(folder, STRUCK).write_text(str(time.monotonic()))
        strike(fault)

    if here:
        _inject(engine, place, hit)
    if here and place == "before the first":
        hit()
    _train(engine, batches, _BATCHES)
    engine.save_checkpoint(folder, tag="one")
    _train(engine, batches, 1)
    engine.evaluate(list(_few(2)))
    engine.load_checkpoint(folder, tag="one")
    _train(engine, batches, 1)
    if here and place == "after the last":
        hit()
    engine.gather_losses()
    engine.destroy()


def strike(fault: str) -> None:
    """Does to this process what the fault is."""
    match fault:
        case "SIGKILL" | "SIGSTOP":
            os.kill(os.getpid(), getattr(signal, fault))
        case "out of memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.RLIM_INFINITY))
            torch.ones(1 << 28)
        case "exception":
            raise ArithmeticError("injected")
        case "sys.exit(0)":
            sys.exit(0)
        case "os._exit(0)":
            os._exit(0)
        case "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, resource.RLIM_INFINITY))


def _engine(form: Form, *, asynchronous: bool) -> ds_al.ALPipelineEngine:
    layers = build_al(
        "mlp",
        in_shape=(12,),
        num_classes=4,
        widths=(64,) * 2 * form.layers,
        num_layers=form.layers,
        objective=dict(form.objective),
    )
    module = ds_al.ALPipelineModule(layers, num_stages=form.stages, num_classes=4, base_seed=7)
    config = {
        "train_micro_batch_size_per_gpu": _SAMPLES,
        "gradient_accumulation_steps": _MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": None,
        "associated_learning": {**form.al, "checkpoint": {"asynchronous": asynchronous}},
    }
    return ds_al.initialize(model=module, config=config)[0]


def _train(engine: ds_al.ALPipelineEngine, batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        engine.train_batch(batches)


def _batches() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(_SAMPLES, 12, generator=generator)
        yield x, torch.randint(4, (_SAMPLES,), generator=generator)


def _few(count: int) -> Iterator[Any]:
    return (batch for batch, _ in zip(_batches(), range(count), strict=False))


# ---- where the fault happens -----------------------------------------------------------------------


def _inject(engine: ds_al.ALPipelineEngine, place: str, hit: Callable[[], None]) -> None:
    """Lets the fault happen at a place; those before the first and after the last batch are in the script itself."""
    match place:
        case "evaluate":
            engine.layers[0][1].f.register_forward_hook(
                lambda module, *_: None if module.training else hit()  # weights are trained with module.train()
            )
        case "save" | "asynchronous save":
            writer.write_tensors = _before(writer.write_tensors, hit)
        case "load":
            saving.read_tensors = _before(saving.read_tensors, hit)
        case _ if place not in CALLS:
            engine.runner.run = _at(engine.runner.run, place, hit)  # type: ignore[method-assign, assignment]


def _before(function: Callable[..., Any], hit: Callable[[], None]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        hit()
        return function(*args, **kwargs)

    return called


def _at(run: Callable[[Any], None], place: str, hit: Callable[[], None]) -> Callable[[Any], None]:
    """Runs schedules in which the fault comes right before an instruction."""
    seen = 0

    def watched(step: Any) -> Iterator[Any]:
        nonlocal seen
        for instruction in step:
            seen += type(instruction).__name__ == place
            if seen == _HIT + 1:
                hit()
            yield instruction

    return lambda schedule: run([watched(step) for step in schedule])
