"""Long and large runs: flat in memory, descriptors and threads, and the bits of the plain loop.

    long        micro-batches through four stages for a while
    sleeps      a random sleep before every instruction, random queue depths
    stages      16 and 32 stages
    batches     batches of 1 to 10,000 micro-batches
    message     one of 256 MiB
    switches    between training and evaluation

Each check trains as many micro-batches as its time allows, and says how many. The loop runs in one process, without an
engine: layer after layer, forward, losses, backward, step.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from deepspeed.runtime import utils as ds_utils
from torch import Tensor, nn

import ds_al
from ds_al.launch.ranks import RankFailure, run_ranks
from ds_al.layer import seed_layer
from ds_al.models import build_al
from ds_al.studies.parts import tell_row
from ds_al.tensors import stop_gradient

Row = dict[str, Any]
Digests = dict[str, str]
"""Hash of each weight, buffer and optimizer state, by ``"<layer>.<name>"``."""

_SEED, _WIDTH, _CLASSES, _SAMPLES, _RATE = 7, 12, 4, 4, 3e-3
_START = 60.0  # seconds for the start of four ranks on a busy machine
_CHUNK = 200  # micro-batches between two looks at the clock and at the process
_ROUND = 1000  # micro-batches of an engine with sleeps; each engine keeps the process groups that DeepSpeed made for it
_SETTLED = 3  # looks after which memory counts as settled
_MOMENTS, _MOMENT = 3, 0.05  # further looks at descriptors that were added, and seconds between them
_GROWTH = 24.0  # MiB that a process may grow by after that: the allocator's arenas and the histories of losses
_SLEEP = 4e-4  # seconds, at the most
_TOLD = 4000  # characters of a failure, which begins with the rank that failed first


@dataclass(frozen=True)
class Check:
    """One of the checks.

    Attributes:
        name: name of the check.
        worker: name of the function of this module that each rank runs.
        stages: number of ranks.
        share: share of the time.
        counts: numbers that the worker gets: of micro-batches, or of what it repeats.
    """

    name: str
    worker: str
    stages: int
    share: float
    counts: tuple[int, ...] = ()


CHECKS = (
    Check("switches between training and evaluation", "switch", 2, 1, (1000,)),
    Check("batches of 1 to 10,000 micro-batches", "batches", 2, 2, (1, 10, 100, 1000, 10_000)),
    Check("a message of 256 MiB", "message", 2, 1, (1 << 26,)),
    Check("16 stages", "stages", 16, 2, (40,)),
    Check("32 stages", "stages", 32, 4, (40,)),
    Check("random sleeps and queue depths", "sleeps", 4, 4, (20_000,)),
    Check("a long run", "long", 4, 6, (200_000,)),
)


def run(*, seconds: float, checks: Sequence[Check] = CHECKS) -> None:
    """Part of the study: tells a row of each check."""
    end = time.monotonic() + seconds
    for number, check in enumerate(checks):
        left = (end - time.monotonic()) / sum(each.share for each in checks[number:])
        tell_row(measured(check, seconds=left * check.share))


def measured(check: Check, *, seconds: float) -> Row:
    """Runs one check, of which the loop takes about the half.

    Returns:
        ``check, stages, inputs`` (micro-batches), ``seconds, growth_mib`` (of the rank that grew most, after it had
        settled), ``descriptors, threads`` (the largest number that was added since), ``outcome`` and ``failure``. A
        check that does not look at its processes has no ``growth_mib``, ``descriptors`` and ``threads``.
    """
    start = time.monotonic()
    row: Row = {"check": check.name, "stages": check.stages, "inputs": 0}
    try:
        ranks = run_ranks(
            f"{__name__}:{check.worker}",
            check.stages,
            timeout=_START + seconds + 4 * check.stages,
            env={"DS_ACCELERATOR": "cpu"},
            seconds=seconds / 3,
            counts=check.counts,
        )
    except RankFailure as error:
        outcome = "hung" if None in error.codes and not any(error.codes) else "wrong"
        return {**row, "seconds": time.monotonic() - start, "outcome": outcome, "failure": str(error)[:_TOLD]}
    first: Done = ranks[0]
    found = {name: digest for rank in ranks for name, digest in rank.digests.items()}
    expected = in_sequence(first.layers, first.micro_batches)
    problems = [f"{name} has other bits than in the loop" for name in expected if found.get(name) != expected[name]]
    problems += [f"stage {stage}: {text}" for stage, rank in enumerate(ranks) for text in rank.problems]
    growth = max(rank.use.growth_mib for rank in ranks)
    if growth > _GROWTH:
        problems.append(f"a process grew by {growth:.0f} MiB")
    added = {name: max(getattr(rank.use, name) for rank in ranks) for name in ("descriptors", "threads")}
    problems += [f"{count} {name} were added" for name, count in added.items() if count > 0]
    problems += [f"stage {stage} has opened {rank.use.added}" for stage, rank in enumerate(ranks) if rank.use.added]
    return {
        **row,
        "inputs": first.trained,
        "seconds": time.monotonic() - start,
        **({"growth_mib": growth, **added} if all(rank.use.looks for rank in ranks) else {}),
        "outcome": "wrong" if problems else "ok",
        "failure": "; ".join(problems[:5]),
    }


# ---- what a rank is watched for ------------------------------------------------------------------------


@dataclass
class Use:
    """What a process holds, since it has settled."""

    looks: int = 0
    growth_mib: float = 0.0
    descriptors: int = 0
    threads: int = 0
    added: str = ""
    """What the descriptors are, at the look with most of them."""


class Watch:
    """Looks at this process; the first looks let it settle."""

    def __init__(self) -> None:
        self.use, self._looks = Use(), 0
        self._before = (0, 0)
        self._settled = set[str]()

    def look(self) -> None:
        """Takes a look."""
        self._looks += 1
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        now, opened = (pages * resource.getpagesize(), threading.active_count()), set(_descriptors())
        if self._looks <= _SETTLED:
            self._before, self._settled = now, opened
            return
        for _ in range(_MOMENTS):  # a thread may have one open for a moment, such as to see whether a process lives
            if len(opened) <= len(self._settled):
                break
            time.sleep(_MOMENT)
            opened &= set(_descriptors())
        self.use.looks += 1
        memory, threads = (a - b for a, b in zip(now, self._before, strict=True))
        self.use.growth_mib = max(self.use.growth_mib, memory / 2**20)
        self.use.threads = max(self.use.threads, threads)
        if (added := len(opened) - len(self._settled)) > self.use.descriptors:
            self.use.descriptors, self.use.added = added, ", ".join(sorted(opened - self._settled))


def _descriptors() -> Iterator[str]:
    """Yields what this process has open: number and file, or number and inode of a socket or pipe."""
    for number in os.listdir("/proc/self/fd"):
        try:
            yield f"{number} {os.readlink(f'/proc/self/fd/{number}')}"
        except FileNotFoundError:  # that of the folder itself, or closed since
            continue


@dataclass
class Done:
    """What a rank has done."""

    layers: str
    """Layers that were trained, a name of :data:`LAYERS` and their number: ``"dense 4"``."""
    micro_batches: int
    """Number of micro-batches behind the weights."""
    trained: int
    """Number of all that were trained."""
    digests: Digests
    use: Use
    problems: list[str]


def _done(engine: Any, layers: str, watch: Watch, *, trained: int | None = None) -> Done:
    """Compares the counters with the number of micro-batches."""
    count, stats = engine.stage.trained_micro_batches, engine.stats()
    expected = {
        "micro_steps": (engine.micro_steps, count),
        "global_samples": (engine.global_samples, count * _SAMPLES),
        "samples of the statistics": (stats.samples, count * _SAMPLES),
        "messages": (stats.messages_sent, 0 if engine.is_last_stage() else count),
    }
    problems = [f"{name} is {got}, expected {want}" for name, (got, want) in expected.items() if got != want]
    digests = digests_of(engine.layers, engine.optimizer.state)
    return Done(layers, count, count if trained is None else trained, digests, watch.use, problems)


# ---- networks, data, and the loop ----------------------------------------------------------------------


def dense(count: int) -> list[ds_al.ALLayerSpec]:
    """Small dense layers with dropout."""
    return build_al(
        "mlp", in_shape=(_WIDTH,), num_classes=_CLASSES, widths=(16,) * count, num_layers=count, dropout=0.1
    )


class Wide(nn.Module):
    """Repeats one number of a sample up to a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.ones(1))

    def forward(self, s: Tensor) -> Tensor:
        """``(B, D) -> (B, width)``"""
        return (s[:, :1] * self.weight).expand(-1, self.width)


class Few(nn.Linear):
    """Reads the first numbers of a sample."""

    def forward(self, s: Tensor) -> Tensor:
        """``(B, D) -> (B, out)``"""
        return super().forward(s[:, : self.in_features])


def wide(width: int) -> list[ds_al.ALLayerSpec]:
    """Two layers, between which ``width`` numbers of all samples together travel."""
    codes = [_CLASSES, 6, 6]
    return [
        ds_al.ALLayerSpec(
            f=LayerSpec(Wide, width // _SAMPLES) if i == 0 else LayerSpec(Few, 8, 8),
            b=LayerSpec(Few, 8, 6),
            g=LayerSpec(nn.Linear, codes[i], 6),
            h=LayerSpec(nn.Linear, 6, codes[i]),
        )
        for i in range(2)
    ]


LAYERS: dict[str, Callable[[int], list[ds_al.ALLayerSpec]]] = {"dense": dense, "wide": wide}


def _specs(layers: str) -> list[ds_al.ALLayerSpec]:
    name, _, count = layers.partition(" ")
    return LAYERS[name](int(count))


def data() -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the same micro-batches at every call, without end."""
    draw = torch.Generator().manual_seed(_SEED)
    while True:
        x = torch.randn(_SAMPLES, _WIDTH, generator=draw)
        yield x, torch.randint(_CLASSES, (_SAMPLES,), generator=draw)


def engine_of(layers: str, **block: Any) -> Any:
    """Returns an engine whose stages step after every micro-batch."""
    module = ds_al.ALPipelineModule(_specs(layers), num_classes=_CLASSES, base_seed=_SEED)
    config = {
        "train_micro_batch_size_per_gpu": _SAMPLES,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": _RATE, "torch_adam": True}},
        "steps_per_print": None,
        "associated_learning": block,
    }
    return ds_al.initialize(model=module, config=config)[0]


def in_sequence(layers: str, micro_batches: int) -> Digests:
    """Trains the layers one after the other in this process."""
    built = []
    for index, spec in enumerate(_specs(layers)):
        ds_utils.set_random_seed(_SEED + index)
        built.append(spec.build().train())
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=_RATE, fused=True) for layer in built]
    for step, (x, labels) in zip(range(micro_batches), data(), strict=False):
        s, t = x, nn.functional.one_hot(labels, _CLASSES).float()
        for index, (layer, optimizer) in enumerate(zip(built, optimizers, strict=True)):
            seed_layer(_SEED, layer=index, step=step, part=0)
            s_out, t_out = layer(s, t)
            seed_layer(_SEED, layer=index, step=step, part=1)
            torch.stack([*layer.local_losses(s_out, t_out, t)]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            s, t = stop_gradient(s_out), stop_gradient(t_out)
    state = {weight: own for optimizer in optimizers for weight, own in optimizer.state.items()}
    return digests_of(enumerate(built), state)


def digests_of(layers: Iterable[tuple[int, nn.Module]], state: Any) -> Digests:
    """Returns the hash of each weight, buffer and optimizer state."""
    found: Digests = {}
    for index, layer in layers:
        values = {f"{index}.{name}": value for name, value in layer.state_dict().items()}
        for name, weight in layer.named_parameters():
            values |= {f"{index}.{name}/{key}": torch.as_tensor(value) for key, value in state.get(weight, {}).items()}
        found |= {name: hashlib.blake2b(value.numpy().tobytes()).hexdigest() for name, value in values.items()}
    return found


# ---- what each rank runs -------------------------------------------------------------------------------


def _batch(engine: Any, micro_batches: int) -> None:
    engine.set_train_batch_size(micro_batches * _SAMPLES)


def _goes_on(engine: Any, end: float) -> bool:
    """Whether time is left on the first stage; the same on every rank."""
    return bool(engine.gather(time.monotonic() < end)[0])


def long(seconds: float, counts: Sequence[int]) -> Done:
    """Worker: trains for a while."""
    watch, engine, micro_batches = Watch(), engine_of("dense 4"), data()
    end = time.monotonic() + seconds
    _batch(engine, 10)
    while engine.stage.trained_micro_batches < counts[0] and _goes_on(engine, end):
        for _ in range(_CHUNK // 10):
            engine.train_batch(micro_batches)
        engine.gather_losses()
        watch.look()
    return _done(engine, "dense 4", watch)


def sleeps(seconds: float, counts: Sequence[int]) -> Done:
    """Worker: trains engines of random queue depths, one after the other, whose instructions come late."""
    end, watch, trained, problems = time.monotonic() + seconds, Watch(), 0, []
    first: Done | None = None
    draw, own = random.Random(1), random.Random(int(os.environ["RANK"]))
    while True:
        depths = {"queue_depth": draw.randint(1, 5), "receive_slots": draw.randint(2, 5)}
        engine = engine_of("dense 4", stall_seconds=None, **depths)
        run_all = engine.runner.run
        engine.runner.run = lambda schedule, run_all=run_all: run_all([_late(step, own) for step in schedule])
        micro_batches = data()
        _batch(engine, 10)
        for _ in range(min(counts[0], _ROUND) // 10):
            engine.train_batch(micro_batches)
        done = _done(engine, "dense 4", watch)
        first, trained = first or done, trained + done.micro_batches
        problems += done.problems + [f"{depths}: other bits"] * (done.digests != first.digests)
        goes_on = trained < counts[0] and _goes_on(engine, end)
        engine.destroy()
        if not goes_on:
            return Done(first.layers, first.micro_batches, trained, first.digests, Use(), problems)


def _late(step: Iterable[Any], draw: random.Random) -> Iterator[Any]:
    for instruction in step:
        time.sleep(draw.random() * _SLEEP)
        yield instruction


def stages(seconds: float, counts: Sequence[int]) -> Done:
    """Worker: trains a layer per stage."""
    layers = f"dense {os.environ['WORLD_SIZE']}"
    watch, engine, micro_batches = Watch(), engine_of(layers), data()
    _batch(engine, 4)
    for _ in range(counts[0] // 4):
        engine.train_batch(micro_batches)
    return _done(engine, layers, watch)


def batches(seconds: float, counts: Sequence[int]) -> Done:
    """Worker: trains batches of several sizes, as long as time is left."""
    watch, engine, micro_batches = Watch(), engine_of("dense 2"), data()
    end = time.monotonic() + seconds
    for count in counts:
        if _goes_on(engine, end):
            _batch(engine, count)
            engine.train_batch(micro_batches)
    return _done(engine, "dense 2", watch)


def message(seconds: float, counts: Sequence[int]) -> Done:
    """Worker: sends numbers of 4 bytes."""
    layers = f"wide {counts[0]}"
    watch, engine, micro_batches = Watch(), engine_of(layers, queue_depth=1), data()
    for _ in range(2):
        engine.train_batch(micro_batches)
    done = _done(engine, layers, watch)
    sent = engine.stats().bytes_sent
    if not engine.is_last_stage() and sent < 2 * 4 * counts[0]:
        done.problems.append(f"{sent} bytes were sent")
    return done


def switch(seconds: float, counts: Sequence[int]) -> Done:
    """Worker: trains a micro-batch, evaluates, and so on."""
    watch, engine, micro_batches = Watch(), engine_of("dense 2"), data()
    end = time.monotonic() + seconds
    few = [batch for batch, _ in zip(data(), range(2), strict=False)]
    for number in range(counts[0]):
        engine.train_batch(micro_batches)
        engine.evaluate(few if engine.is_first_stage() else None)
        if number % 20 == 0:
            watch.look()
            if not _goes_on(engine, end):
                break
    return _done(engine, "dense 2", watch)
