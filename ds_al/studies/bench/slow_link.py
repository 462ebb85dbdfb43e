"""Measures the throughput of streaming and 1F1B over a link of limited rate: two stages in two network namespaces.

Both train the same network, with the same cut, on the same samples. One set of ranks runs all cases alternately; each
rank sets the rate of its end of the link before each case.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from ds_al.launch.ranks import run_ranks, tell
from ds_al.studies.bench import namespaces, workloads
from ds_al.studies.bench.cases import train, world_size
from ds_al.studies.bench.traffic import BP

Row = dict[str, Any]
Form = tuple[str, str]
"""Method and ``message_dtype``."""
FORMS: tuple[Form, ...] = (("streaming", "fp32"), ("streaming", "bf16"), ("streaming", "int8"), (BP, "fp32"))
UNLIMITED = None
_STAGES = 2
_PROBE = 0.5  # seconds of a plain transfer that measures the actual rate of the link
_PROBE_MOST = 32_000_000  # maximum bytes of the transfer


@dataclass(frozen=True)
class LinkCases:
    """Cases to time: every form at every rate and without a limit."""

    rates: Sequence[float]
    """Megabits per second, in each direction."""
    model: str
    cut: int
    """First layer of the second stage."""
    micro_batch: int
    """Samples."""
    micro_batches: int
    """M."""
    seconds: float
    """Time limit of a case, unless one batch takes longer."""
    repeat: int

    @property
    def all_rates(self) -> tuple[float | None, ...]:
        """Returns all rates: no limit first, then from fast to slow."""
        return (UNLIMITED, *sorted(self.rates, reverse=True))

    def engine(self, form: Form) -> Any:
        """Builds this rank's engine."""
        method, message_dtype = form
        return workloads.model_engine(
            method,
            model=self.model,
            stages=_STAGES,
            micro_batch=self.micro_batch,
            partition=f"cuts:{self.cut}",
            block={"message_dtype": message_dtype},
        )


@dataclass(frozen=True)
class Run:
    """Results of one case on one rank."""

    start: float
    end: float
    batches: int
    sent: int
    """Message bytes counted by the engine."""
    wired: int
    """Bytes sent by the interface, including headers."""


Found = tuple[dict[float | None, float], dict[tuple[float | None, Form], list[Run]]]
"""Megabits per second of a plain transfer, by rate; runs by rate and form."""


def measure_slow_link(cases: LinkCases, *, timeout: float, progress: Callable[[str], None] | None = None) -> list[Row]:
    """Times all cases between two namespaces, which are removed at the end.

    Args:
        timeout: seconds before the measurement is aborted.
        progress: called with a line after every case.

    Returns:
        See :func:`link_rows`.

    Raises:
        NotAllowed: this process may not create namespaces, or the machine cannot limit a link.
        RankFailure: a rank failed or timed out.
    """
    with namespaces.joined_namespaces() as within:
        by_rank = run_ranks(
            f"{__name__}:time_on_rank",
            _STAGES,
            timeout=timeout,
            env=namespaces.environment(),
            news=progress,
            within=within,
            cases=cases,
        )
    return list(link_rows(cases, by_rank))


def link_rows(cases: LinkCases, by_rank: Sequence[Found]) -> Iterator[Row]:
    """Yields rows ``rate_mbit`` (``None``: no limit), ``measured_mbit, method, message_dtype, samples_per_s`` etc.

    ``seconds`` is the median time of ``batches`` batches; ``relative_to_unlimited`` is the median over repetitions of
    the throughput relative to the same form without a limit; ``bytes_per_micro_batch`` counts both directions,
    ``wire_bytes_per_micro_batch`` both directions at the interfaces. ``needed_mbit`` is the rate that the busier
    direction needs for the throughput without a limit: a method that never waits for a reply loses nothing at it.
    """
    (measured, first), (_, last) = by_rank
    rates = {case: _throughputs(cases, first[case], last[case]) for case in first}
    for rate, form in first:
        own, free = rates[rate, form], rates[UNLIMITED, form]
        ends = list(zip(first[rate, form], last[rate, form], strict=True))
        micro_batches = sum(one.batches for one, _ in ends) * cases.micro_batches
        down, up = (sum(end[side].sent for end in ends) / micro_batches for side in (0, 1))
        seconds = [_span(one, two) for one, two in ends]
        yield {
            "rate_mbit": rate,
            "measured_mbit": measured[rate],
            "method": form[0],
            "message_dtype": form[1],
            "samples_per_s": statistics.median(own),
            "relative_to_unlimited": statistics.median(a / b for a, b in zip(own, free, strict=True)),
            "needed_mbit": max(down, up) * 8 / 1e6 * statistics.median(free) / cases.micro_batch,
            "bytes_per_micro_batch": round(down + up),
            "wire_bytes_per_micro_batch": round(sum(one.wired + two.wired for one, two in ends) / micro_batches),
            "batches": ends[0][0].batches,
            "micro_batches": cases.micro_batches,
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "repeat": len(ends),
        }


def _throughputs(cases: LinkCases, first: Sequence[Run], last: Sequence[Run]) -> list[float]:
    """Returns the samples per second of each repetition."""
    samples = cases.micro_batches * cases.micro_batch
    return [one.batches * samples / _span(one, two) for one, two in zip(first, last, strict=True)]


def _span(one: Run, two: Run) -> float:
    return max(one.end, two.end) - min(one.start, two.start)


# ---- functions that run on each rank -----------------------------------------------------------------


def time_on_rank(cases: LinkCases) -> Found:
    """Runs all cases on one rank, within its namespace."""
    world_size()
    engines = {form: cases.engine(form) for form in FORMS}
    data = list(itertools.islice(workloads.random_batches(cases.model, size=cases.micro_batch), cases.micro_batches))
    paces = {form: _warm_up(engine, data) for form, engine in engines.items()}
    measured: dict[float | None, float] = {}
    runs: dict[tuple[float | None, Form], list[Run]] = {(rate, form): [] for rate in cases.all_rates for form in FORMS}
    for number, rate in itertools.product(range(cases.repeat), cases.all_rates):
        namespaces.run(namespaces.limit(rate))
        if rate not in measured:
            measured[rate] = _probe(rate)
        for form in FORMS[:: -1 if number % 2 else 1]:
            batches = _agree(_batches(cases, rate, *paces[form]))
            runs[rate, form].append(_run(engines[form], data, batches))
            if dist.get_rank() == 0:
                tell(f"{'no limit' if rate is None else f'{rate:g} Mbit/s'}: {' '.join(form)}")
    return measured, runs


def _warm_up(engine: Any, data: Sequence[Any]) -> tuple[float, int]:
    """Sends shapes and starts threads; returns seconds and bytes of a batch without a limit."""
    _run(engine, data, 1)
    run = _run(engine, data, 2)
    return (run.end - run.start) / 2, run.sent // 2


def _batches(cases: LinkCases, rate: float | None, pace: float, sent: int) -> int:
    """Returns the number of batches that fit into the time of a case, given compute and transfer times, at least 1."""
    travel = 0.0 if rate is None else sent * 8 / (rate * 1e6)
    return max(1, int(cases.seconds / (pace + travel)))


def _run(engine: Any, data: Sequence[Any], batches: int) -> Run:
    dist.barrier()
    before = namespaces.sent_bytes()
    engine.reset_stats()
    start, end = train(engine, itertools.cycle(data), micro_batches=len(data), batches=batches)
    if isinstance(engine, workloads.ds_al.ALPipelineEngine):
        engine.flush()
    sent = engine.stats().bytes_sent
    dist.barrier()
    return Run(start, end, batches, sent, namespaces.sent_bytes() - before)


def _agree(number: int) -> int:
    """Returns the minimum over the ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, number)
    return min(everyone)


def _probe(rate: float | None) -> float:
    """Measures the megabits per second of a plain transfer from the first rank to the second."""
    nbytes = _PROBE_MOST if rate is None else min(int(rate * 1e6 / 8 * _PROBE), _PROBE_MOST)
    payload, answer = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(1)
    dist.barrier()
    start = time.perf_counter()
    dist.broadcast(payload, 0)  # between two ranks a broadcast is a transfer
    dist.broadcast(answer, 1)
    seconds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seconds, time.perf_counter() - start)
    return nbytes * 8 / 1e6 / seconds[0]
