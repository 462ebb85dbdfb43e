"""Common code of ratio measurements: both sides alternate in every repetition; results are gathered and summarized."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deepspeed import comm as dist

from ds_al.launch.ranks import run_ranks, tell
from ds_al.partition.layer_times import LayerTime
from ds_al.studies.bench.cases import Row
from ds_al.studies.bench.forms import Network, best_cuts, medians, time_forms

Span = tuple[float, float]
"""Start and end of a run on one rank, in seconds of the clock that all ranks share."""
Told = Mapping[str, Any]
"""One repetition as sent by :func:`tell_all`: ``{"ranks": [value of each rank], ...}``."""
_LOOKS = 7  # micro-batches of both forms that determine the cuts


def together(spans: Sequence[Span]) -> float:
    """Returns the seconds from the first rank's start to the last rank's end."""
    return max(end for _, end in spans) - min(start for start, _ in spans)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def turns(items: Sequence[Any], number: int) -> Sequence[Any]:
    """Returns the items in an order that is reversed every second time, so that none is always first."""
    return items[::-1] if number % 2 else items


def seconds_of_batch(engine: Any, batches: Iterator[Any]) -> float:
    """Returns the seconds in which an engine trains the next batch, of one micro-batch."""
    data = iter([next(batches)])  # created before timing starts
    start = time.perf_counter()
    engine.train_batch(data)
    return time.perf_counter() - start


def measure(
    networks: Sequence[Network],
    *,
    target: str,
    timeout: float,
    rows_of: Callable[[Network, list[Told]], list[Row]],
    progress: Callable[[str, list[Row]], None] | None,
    **options: Any,
) -> list[Row]:
    """Measures one network after the other, each on its own set of ranks.

    Args:
        target: function that each rank runs, ``"module:function"``; it is called with ``network`` and the options,
            and sends each repetition by :func:`tell_all`.
        timeout: seconds per network.
        rows_of: computes the rows of a network from its repetitions so far.
        progress: called after every repetition with the network's name and all rows so far.

    Returns:
        The rows of all networks.

    Raises:
        RankFailure: a rank failed.
    """
    told: dict[Network, list[Told]] = {network: [] for network in networks}

    def rows() -> list[Row]:
        return [row for network, each in told.items() if each for row in rows_of(network, each)]

    for network in networks:

        def news(line: str, network: Network = network) -> None:
            told[network].append(json.loads(line))
            if progress is not None:
                progress(network.model, rows())

        run_ranks(target, network.stages, timeout=timeout, news=news, network=network, **options)
    return rows()


def decide_cuts(network: Network) -> tuple[list[int], list[int]]:
    """Returns the cuts of the AL form and of the twin, measured on all ranks at once and equal on all ranks."""
    looks = list(time_forms(network, repeat=_LOOKS))
    own = medians([al for al, _ in looks]), medians([twin for _, twin in looks])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    al, twin = (mean([rank[form] for rank in everyone]) for form in (0, 1))
    return best_cuts(al, stages=network.stages), best_cuts(twin, stages=network.stages)


def mean(ranks: Sequence[Sequence[LayerTime]]) -> list[LayerTime]:
    """Returns the mean times of each layer over the ranks."""
    return [
        LayerTime(
            forward=statistics.fmean(time.forward for time in layer),
            backward=statistics.fmean(time.backward for time in layer),
            step=statistics.fmean(time.step for time in layer),
        )
        for layer in zip(*ranks, strict=True)
    ]


def tell_all(own: Any, **shared: Any) -> None:
    """Gathers ``own`` from all ranks; the first rank sends it with ``shared``. Collective: every rank must call it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if dist.get_rank() == 0:
        tell(json.dumps({**shared, "ranks": everyone}))
