"""What the measurements of ratios share: repetitions in which both sides take turns, gathered and summed up."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepspeed import comm as dist

from ds_al.launch.ranks import run_ranks, tell
from ds_al.partition.layer_times import LayerTime
from ds_al.studies.bench.cases import Row
from ds_al.studies.bench.forms import Network, best_cuts, medians, time_forms

Span = tuple[float, float]
"""Start and end of a run on one rank, in seconds of the clock that all ranks share."""
Told = Mapping[str, Any]
"""One repetition, as :func:`tell_all` tells it: ``{"ranks": [what each has], ...}``."""
_LOOKS = 7  # micro-batches of both forms that decide where they are cut


def together(spans: Sequence[Span]) -> float:
    """From the first rank's start to the last one's end."""
    return max(end for _, end in spans) - min(start for start, _ in spans)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def turns(items: Sequence[Any], number: int) -> Sequence[Any]:
    """The items, in reverse order every second time, so that none always comes first."""
    return items[::-1] if number % 2 else items


def measure(
    networks: Sequence[Network],
    *,
    target: str,
    timeout: float,
    rows_of: Callable[[Network, list[Told]], list[Row]],
    progress: Callable[[str, list[Row]], None] | None,
    **options: Any,
) -> list[Row]:
    """Runs a measurement on the ranks of one network after the other.

    Args:
        target: what each rank runs, ``"module:function"``; called with ``network`` and the options, it tells one
            repetition after the other by :func:`tell_all`.
        timeout: seconds per network.
        rows_of: the rows of a network from its repetitions so far.
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
    """Where to cut the AL form and the twin: measured on all ranks at once, and the same on all of them."""
    looks = list(time_forms(network, repeat=_LOOKS))
    own = medians([al for al, _ in looks]), medians([twin for _, twin in looks])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    al, twin = (mean([rank[form] for rank in everyone]) for form in (0, 1))
    return best_cuts(al, stages=network.stages), best_cuts(twin, stages=network.stages)


def mean(ranks: Sequence[Sequence[LayerTime]]) -> list[LayerTime]:
    """Of each layer, over ranks."""
    return [
        LayerTime(
            forward=statistics.fmean(time.forward for time in layer),
            backward=statistics.fmean(time.backward for time in layer),
            step=statistics.fmean(time.step for time in layer),
        )
        for layer in zip(*ranks, strict=True)
    ]


def tell_all(own: Any, **shared: Any) -> None:
    """Called on every rank: the first one tells what each of them has, and what they share."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if dist.get_rank() == 0:
        tell(json.dumps({**shared, "ranks": everyone}))
