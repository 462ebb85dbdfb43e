"""Times training while one stage is slower for some batches, with and without layers that move by themselves.

    before    all stages are equal
    during    the layers on one stage take a multiple of their time, as if another job shared its host
    after     all stages are equal again

Layers sleep, so the times show what moves, not what the machine computes. A phase ends when all stages have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from deepspeed import comm as dist
from torch import Tensor

from ds_al.launch.ranks import run_ranks
from ds_al.partition.plan import balance
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import START_UP, train, world_size
from ds_al.studies.bench.interleaved import Span, together

Row = dict[str, Any]
PHASES = ("before", "during", "after")
EVERY = 2
"""Number of batches between two checks."""


class OnSlowHost(workloads.Sleeping):
    """A sleeping block that takes :attr:`slowdown` times as long, whichever stage it is on."""

    slowdown: ClassVar[float] = 1.0
    """Of this process."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` plus a weight."""
        own = self.seconds
        self.seconds = own[0] * self.slowdown, own[1] * self.slowdown
        try:
            return super().forward(x)
        finally:
            self.seconds = own


@dataclass(frozen=True)
class RepartitionCases:
    """Settings of the measurement."""

    stages: int
    layers: int
    micro_batches: int
    batches: int
    """Number of batches of each phase; those of its second half are also timed by themselves."""
    forward: float
    """Seconds that a layer sleeps in its forward pass."""
    backward: float
    """Seconds that a layer sleeps in its backward pass."""
    slowdown: float
    """Factor by which the second stage is slower in the phase ``during``."""

    def slow(self, phase: str) -> list[float]:
        """Returns the slowdown of each stage."""
        return [self.slowdown if phase == "during" and stage == 1 else 1.0 for stage in range(self.stages)]

    def period(self, bounds: Sequence[int], phase: str) -> float:
        """Returns the seconds per batch of a partition, if only the sleeping layers took time."""
        unit = self.micro_batches * (self.forward + self.backward)
        return unit * max(each * (b - a) for each, (a, b) in zip(self.slow(phase), pairwise(bounds), strict=True))

    def best(self, phase: str) -> float:
        """Returns the seconds per batch of the best partition."""
        bounds = balance([[each] * self.layers for each in self.slow(phase)])
        return self.period(bounds, phase)


def measure_repartition(cases: RepartitionCases) -> list[Row]:
    """Times all phases, without moves and with them.

    Returns:
        Rows ``moves, phase, stages, layers, micro_batches, batches, slowdown, batches_per_second`` (of the whole
        phase), ``batches_per_second_late`` (of its second half), ``best`` (batches per second of the best partition,
        if only the layers took time) and ``bounds`` at the end of the phase.

    Raises:
        RankFailure: a rank failed.
    """
    total = 2 * cases.batches * sum(max(cases.best(phase), cases.slowdown * cases.best("before")) for phase in PHASES)
    ranks = run_ranks(f"{__name__}:time_phases", cases.stages, timeout=2 * START_UP + 4 * total, cases=cases)
    rows = []
    for moves, phase in ranks[0]:
        early, late = (together([rank[moves, phase][half] for rank in ranks]) for half in (0, 1))
        half = cases.batches // 2
        rows.append(
            {
                "moves": moves,
                "phase": phase,
                "stages": cases.stages,
                "layers": cases.layers,
                "micro_batches": cases.micro_batches,
                "batches": cases.batches,
                "slowdown": cases.slowdown if phase == "during" else 1.0,
                "batches_per_second": cases.batches / (early + late),
                "batches_per_second_late": (cases.batches - half) / late,
                "best": 1 / cases.best(phase),
                "bounds": " ".join(str(bound) for bound in ranks[0][moves, phase][2]),
            }
        )
    return rows


def time_phases(cases: RepartitionCases) -> dict[tuple[bool, str], tuple[Span, Span, list[int]]]:
    """Worker: returns start and end of both halves of each phase on this rank, and the bounds after it."""
    world, found = world_size(), {}
    for moves in (False, True):
        engine = workloads.sleeping_engine(
            "streaming",
            stages=world,
            layers=cases.layers,
            forward=cases.forward,
            backward=cases.backward,
            options={"repartition": {"every": EVERY}} if moves else {},
            block=OnSlowHost,
        )
        data, half = workloads.micro_batches(engine), cases.batches // 2
        train(engine, data, micro_batches=2, batches=1)
        for phase in PHASES:
            OnSlowHost.slowdown = cases.slow(phase)[engine.stage_id]
            spans = [
                train(engine, data, micro_batches=cases.micro_batches, batches=batches)
                for batches in (half, cases.batches - half)
            ]
            dist.barrier()
            found[moves, phase] = spans[0], spans[1], engine.module.bounds
    return found
