"""Predictions for many stages: reference workloads, links of different speeds, heterogeneous machines, stragglers.

Each stage holds one Transformer block, so a network of P blocks is trained on P stages. Everything is computed from
the assumptions below; nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from ds_al.group_schedule import GROUP_SCHEDULES
from ds_al.planner.groups import GroupedStages, group_sizes, predict_groups
from ds_al.planner.predict import AL, SIMULATED, least_micro_batches, predict
from ds_al.planner.prediction import Prediction
from ds_al.planner.show import bytes_per_second
from ds_al.planner.stragglers import Jitter, spread_speeds
from ds_al.planner.work import Link, Machines, Work

Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A Transformer block of width D on T tokens, B sequences per micro-batch, and the device that holds it."""

    name: str
    width: int
    tokens: int
    sequences: int
    flops: float
    """Achieved operations per second."""
    memory_bytes_per_second: float
    device_bytes: float
    """Memory size of the device."""
    rho: float
    """Compute of the AL form relative to that of the twin."""

    @property
    def parameters(self) -> float:
        """Number of parameters, 12 D^2: attention 4 D^2, a feed-forward network of width 4 D 8 D^2."""
        return 12.0 * self.width**2

    @property
    def forward(self) -> float:
        """Seconds of a forward: 2 operations per parameter and token, and 4 T D per token for attention."""
        positions = self.tokens * self.sequences
        return positions * (2 * self.parameters + 4 * self.tokens * self.width) / self.flops

    def work(self, blocks: int) -> Work:
        """Returns the costs of a network of this number of blocks.

        Activations have 2 bytes per element; backward needs 34 bytes per position and channel (Korthikanti et al.,
        2022, arXiv 2205.05198, attention recomputed). Parameters, gradients and AdamW's states have 4 bytes per element
        each; a step reads and writes 28 bytes per parameter.
        """
        positions = self.tokens * self.sequences
        return Work(
            forward=blocks * self.forward,
            backward=blocks * 2 * self.forward,
            step=blocks * 28 * self.parameters / self.memory_bytes_per_second,
            rho=self.rho,
            message_bytes=2.0 * positions * self.width,
            target_bytes=4.0 * self.sequences * self.width,
            parameter_bytes=blocks * 4 * self.parameters,
            activation_bytes=blocks * 34.0 * positions * self.width,
        )


LARGE = Block(
    name="large",
    width=4096,
    tokens=2048,
    sequences=2,
    flops=200e12,
    memory_bytes_per_second=2e12,
    device_bytes=80e9,
    rho=1.05,
)
SMALL = Block(
    name="small",
    width=1024,
    tokens=512,
    sequences=8,
    flops=20e12,
    memory_bytes_per_second=500e9,
    device_bytes=16e9,
    rho=1.05,
)
BLOCKS = (LARGE, SMALL)
LINKS: dict[str, float] = {"100mbit": 20e-3, "1gbit": 10e-3, "10gbit": 1e-3, "100gbit": 50e-6, "400gbit": 5e-6}
"""Latency in seconds of each link: across the Internet, a city, a campus, a hall, a rack."""
OVERLAPPED = "bp_1f1b_overlapped"
"""1F1B with non-blocking sends, unlike DeepSpeed's; a lower bound, since messages never wait for each other."""
METHODS = (
    *("streaming", "bp_1f1b", OVERLAPPED, "bp_gpipe", "bp_interleaved", "bp_zb_h1", "bp_zb_h2"),
    *("bp_dualpipev", "bp_dp"),
)
SWEPT = ("streaming", "bp_1f1b", "bp_interleaved", "bp_zb_h1", "bp_zb_h2", "bp_dualpipev")
"""Methods over many micro-batches."""
RIVALS = ("bp_1f1b", "bp_zb_h1", "bp_zb_h2", "bp_dualpipev", "bp_async", "bp_dp")
"""Back-propagation beside K layers on P stages."""
SECTIONS = ("dial", "links", "sweep", "speeds", "stragglers")
JITTERS = ("lognormal:0.3", "slow:0.01:5", "slow:0.05:5")
DEPTHS = (1, 2, 4, 8, 32)
SIGMAS = (0.0, 0.1, 0.3)


@dataclass(frozen=True)
class Study:
    """Settings of the predictions."""

    stages: tuple[int, ...] = (64, 256, 1024)
    micro_batches: tuple[int, ...] = (64, 256)
    dial: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    """Values of P at which K varies, with the values of M of :attr:`dial_micro_batches`."""
    dial_micro_batches: tuple[int, ...] = (8, 32)
    sweep: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """Values of M of the sweep, on the first number of stages."""
    repeat: int = 4
    """Number of random runs."""
    settled: int = 2048
    """Micro-batches of the straggler simulation before timing starts, so that queues fill; as many more are timed."""

    def rows(self, *, jobs: int = 1, section: str | None = None) -> Iterator[Row]:
        """Computes all rows, or those of one section, with ``jobs`` processes.

        Returns:
            ``section, workload, stages, micro_batches, link, latency_ms, speeds_sigma, jitter, queue_depth,
            steps_per_batch, method, layers, schedule``, the fields of :class:`~ds_al.planner.prediction.Prediction`,
            ``times_compute`` (time relative to the twin's compute on one stage) and ``fits`` (whether every stage fits
            into device memory).
        """
        cases = [case for case in self._cases() if section in (None, case.args[0])]
        if jobs == 1:
            yield from map(_call, cases)
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
            yield from pool.map(_call, cases)

    def _cases(self) -> Iterator[partial[Row]]:
        yield from self._dial()
        for block in BLOCKS:
            for stages in self.stages:
                for m in self.micro_batches if block is LARGE else self.micro_batches[:1]:
                    for link in LINKS:
                        for method in _able(METHODS, stages, m):
                            yield partial(_row, "links", block, method, stages, m, link=link)
        yield from self._sweep()
        m = self.micro_batches[0]
        for stages in self.stages:
            for sigma in SIGMAS:
                for method in ("streaming", "bp_1f1b"):
                    yield partial(_row, "speeds", LARGE, method, stages, m, link="100gbit", sigma=sigma)
        for stages in self.stages:
            for jitter in JITTERS:
                unsteady = partial(
                    _row,
                    "stragglers",
                    LARGE,
                    stages=stages,
                    micro_batches=m,
                    link="100gbit",
                    jitter=jitter,
                    repeat=self.repeat,
                    settled=self.settled,
                )
                for depth in DEPTHS if stages <= 256 else DEPTHS[1::3]:
                    yield partial(unsteady, method="streaming", depth=depth)
                yield partial(unsteady, method="bp_1f1b")

    def _dial(self) -> Iterator[partial[Row]]:
        for stages in self.dial:
            for m in self.dial_micro_batches:
                case = partial(_row, "dial", LARGE, stages=stages, micro_batches=m, link="100gbit", steps=1)
                for k in self.dial:
                    for schedule in GROUP_SCHEDULES if k < stages else ():
                        yield partial(case, method="groups", layers=k, schedule=schedule)
                for schedule in GROUP_SCHEDULES:
                    yield partial(case, method="groups", layers=1, schedule=schedule)
                yield partial(case, method="streaming")
                for method in _able(RIVALS, stages, m):
                    yield partial(case, method=method)

    def _sweep(self) -> Iterator[partial[Row]]:
        stages = self.stages[0]
        for m in self.sweep:
            for method in _able(SWEPT, stages, m):
                yield partial(_row, "sweep", LARGE, method, stages, m, link="400gbit")
            yield partial(_row, "sweep", LARGE, "streaming", stages, m, link="400gbit", steps=1)


def _able(methods: Sequence[str], stages: int, micro_batches: int) -> list[str]:
    """Returns the methods that run with so many micro-batches."""
    return [method for method in methods if micro_batches >= least_micro_batches(method, stages)]


def _call(case: Callable[[], Row]) -> Row:
    return case()


def _row(
    section: str,
    block: Block,
    method: str,
    stages: int,
    micro_batches: int,
    *,
    link: str,
    sigma: float = 0.0,
    jitter: str = "",
    depth: int = 2,
    steps: int | None = None,
    repeat: int = 1,
    settled: int = 0,
    layers: int | None = None,
    schedule: str = "",
) -> Row:
    work = block.work(stages)
    machines = Machines(
        links=Link(bytes_per_second(link), LINKS[link]),
        speeds=spread_speeds(stages, sigma=sigma, seed=stages) if sigma else None,
        jitter=Jitter.parse(jitter) if jitter else None,
        queue_depth=depth,
        steps_per_batch=steps,
        repeat=repeat,
        settled=settled,
        seed=stages,
    )
    if layers is not None:
        found = _grouped(work, stages, layers, schedule, micro_batches, machines)
    elif method == OVERLAPPED:
        found = _overlapped(work, stages, micro_batches, machines)
    else:
        found = predict(method, work, stages=stages, micro_batches=micro_batches, machines=machines)
    return {
        "section": section,
        "workload": block.name,
        "stages": stages,
        "micro_batches": micro_batches,
        "link": link,
        "latency_ms": 1000 * LINKS[link],
        "speeds_sigma": sigma,
        "jitter": jitter,
        "queue_depth": depth if method in AL or layers else None,
        "steps_per_batch": (steps or micro_batches) if method in AL else 1,
        "method": method,
        "layers": layers if layers is not None or method not in AL else stages,
        "schedule": schedule,
        "seconds": found.seconds,
        "spread": found.spread if method in SIMULATED else None,
        "times_compute": found.seconds / (micro_batches * 3 * block.forward),
        "bubble": found.bubble,
        "graphs": found.graphs,
        "memory_bytes": found.memory_bytes,
        "bytes_per_batch": found.bytes_per_batch,
        "fits": found.memory_bytes <= block.device_bytes,
    }


def _grouped(work: Work, stages: int, layers: int, schedule: str, micro_batches: int, machines: Machines) -> Prediction:
    """Predicts K layers on P stages; its memory is without message buffers, as that of back-propagation."""
    found = predict_groups(
        work, stages=stages, layers=layers, schedule=schedule, micro_batches=micro_batches, machines=machines
    )
    held = GroupedStages(work, group_sizes(stages, layers), schedule, micro_batches, machines).memory()
    return replace(found, memory_bytes=max(held))


def _overlapped(work: Work, stages: int, micro_batches: int, machines: Machines) -> Prediction:
    """Predicts 1F1B with non-blocking messages: the message time is all latency, at least the link's transfer time."""
    assert isinstance(machines.links, Link)
    transfer = work.message_bytes / machines.links.bytes_per_second
    late = replace(machines, links=Link(latency=machines.links.latency + transfer))
    found = predict("bp_1f1b", work, stages=stages, micro_batches=micro_batches, machines=late)
    return replace(found, method=OVERLAPPED, seconds=max(found.seconds, micro_batches * transfer))
