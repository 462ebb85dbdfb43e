"""Measures the speed of streaming relative to 1F1B on the same cores and samples, compared with its upper bound.

1F1B takes M + P - 1 time slots of a stage for M micro-batches, streaming M slots that are rho times as long. Streaming
can therefore be (M + P - 1) / (M rho) times as fast, if all stages are equal and messages and engines cost nothing. rho
is measured in each process alone: the time of an AL micro-batch including its step over that of the twin, which steps
once per M micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

from deepspeed import comm as dist

from ds_al.partition.layer_times import LayerTime
from ds_al.planner import StageCost
from ds_al.studies.bench.cases import START_UP, Row, train, world_size
from ds_al.studies.bench.forms import Network, medians, stage_costs, time_forms
from ds_al.studies.bench.interleaved import Told, decide_cuts, mean, measure, quartiles, tell_all, together, turns
from ds_al.studies.bench.scaling_rows import schedule_seconds

METHODS = ("streaming", "bp_1f1b")


def measure_ratio(
    networks: Sequence[Network],
    *,
    micro_batches: Sequence[int],
    total: int,
    repeat: int,
    progress: Callable[[str, list[Row]], None] | None = None,
) -> list[Row]:
    """Measures every network with every number of micro-batches per batch.

    Args:
        networks: networks to measure.
        micro_batches: values of M, micro-batches per batch.
        total: micro-batches of one timed run for every M, rounded up to whole batches.
        repeat: runs of each case; cases alternate.
        progress: called after every repetition with the network's name and all rows so far.

    Returns:
        Rows as :func:`ratio_row` describes them.

    Raises:
        RankFailure: a rank failed.
    """
    flops = {network: network.rho_by_flops() for network in networks}

    def rows_of(network: Network, told: list[Told]) -> list[Row]:
        return [
            ratio_row(network, told, micro_batches=m, batches=-(-total // m), rho_by_flops=flops[network])
            for m in micro_batches
        ]

    return measure(
        networks,
        target=f"{__name__}:time_on_rank",
        timeout=20 * START_UP,
        rows_of=rows_of,
        progress=progress,
        micro_batches=micro_batches,
        total=total,
        repeat=repeat,
    )


def ratio_bound(*, micro_batches: int, stages: int, rho: float) -> float:
    """Returns the upper bound of streaming's speed-up over 1F1B on equal stages: ``(M + P - 1) / (M rho)``."""
    return (micro_batches + stages - 1) / (micro_batches * rho)


def rho_by_time(al: Sequence[LayerTime], twin: Sequence[LayerTime], *, micro_batches: int) -> float:
    """Returns the seconds of an AL micro-batch over those of the twin, summed over layers; the twin steps once in M."""
    return sum(time.cost() for time in al) / sum(
        time.forward + time.backward + time.step / micro_batches for time in twin
    )


def balance_of(costs: Sequence[StageCost]) -> float:
    """Returns the mean stage time over that of the slowest stage: 1 if all stages are equal."""
    totals = [cost.forward + cost.backward + cost.step for cost in costs]
    return sum(totals) / len(totals) / max(totals)


def ratio_row(
    network: Network, repetitions: Sequence[Told], *, micro_batches: int, batches: int, rho_by_flops: float
) -> Row:
    """Returns one row. Each rank sends ``{"spans": {method: {M: span}}, "al", "twin"}`` in every repetition; ``al`` and
    ``twin`` are the seconds ``(forward, backward, step)`` of each layer. All ranks share ``al_cuts, twin_cuts``.

    Columns: ``model, stages, micro_batch, micro_batches, batches, repeats``; ``streaming_samples_per_s``,
    ``bp_1f1b_samples_per_s``; ``ratio``, median and quartiles of the ratios of all repetitions; measured ``rho`` and
    ``rho_by_flops``, with the corresponding ``bound`` and ``bound_by_flops``; ``bound_balanced``, from both schedules
    simulated with the measured stage times, which accounts for the imbalance of each form; ``share_of_bound,
    share_of_balanced``; ``al_cuts, twin_cuts, al_balance, twin_balance``; ``wins``: whether the ratio is above 1.
    """
    samples = network.micro_batch * micro_batches * batches
    rates = {
        method: [
            samples / together([rank["spans"][method][str(micro_batches)] for rank in told["ranks"]])
            for told in repetitions
        ]
        for method in METHODS
    }
    low, ratio, high = quartiles([a / b for a, b in zip(rates["streaming"], rates["bp_1f1b"], strict=True)])
    al, twin = (
        medians([mean([[LayerTime(*time) for time in rank[form]] for rank in told["ranks"]]) for told in repetitions])
        for form in ("al", "twin")
    )
    al_cuts, twin_cuts = repetitions[-1]["al_cuts"], repetitions[-1]["twin_cuts"]
    al_costs, twin_costs = stage_costs(al, al_cuts), stage_costs(twin, twin_cuts)
    rho = rho_by_time(al, twin, micro_batches=micro_batches)
    bound = ratio_bound(micro_batches=micro_batches, stages=network.stages, rho=rho)
    size = {"micro_batches": micro_batches, "batches": batches}
    balanced = schedule_seconds("bp_1f1b", twin_costs, **size) / schedule_seconds("streaming", al_costs, **size)
    return {
        "model": network.model,
        "stages": network.stages,
        "micro_batch": network.micro_batch,
        **size,
        "repeats": len(repetitions),
        "streaming_samples_per_s": quartiles(rates["streaming"])[1],
        "bp_1f1b_samples_per_s": quartiles(rates["bp_1f1b"])[1],
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "rho": rho,
        "rho_by_flops": rho_by_flops,
        "bound": bound,
        "bound_by_flops": ratio_bound(micro_batches=micro_batches, stages=network.stages, rho=rho_by_flops),
        "bound_balanced": balanced,
        "share_of_bound": ratio / bound,
        "share_of_balanced": ratio / balanced,
        "al_cuts": al_cuts,
        "twin_cuts": twin_cuts,
        "al_balance": balance_of(al_costs),
        "twin_balance": balance_of(twin_costs),
        "wins": ratio > 1,
    }


# ---- functions that run on each rank -----------------------------------------------------------------


def time_on_rank(network: Network, micro_batches: Sequence[int], total: int, repeat: int) -> None:
    """Times both forms alone, then both methods with every M, alternating."""
    world_size()
    al_cuts, twin_cuts = decide_cuts(network)
    engines = {"streaming": network.engine("streaming", al_cuts), "bp_1f1b": network.engine("bp_1f1b", twin_cuts)}
    data = itertools.cycle(network.micro_batches())
    forms = time_forms(network, repeat=_LOOKS * repeat)
    for engine in engines.values():
        train(engine, data, micro_batches=max(micro_batches), batches=2)
    for number in range(repeat):
        dist.barrier()
        looks = list(itertools.islice(forms, _LOOKS))
        spans: dict[str, dict[int, Any]] = {method: {} for method in METHODS}
        for m in micro_batches:
            for method in turns(METHODS, number):
                spans[method][m] = train(engines[method], data, micro_batches=m, batches=-(-total // m))
        own = {
            "spans": spans,
            "al": [astuple(time) for time in medians([al for al, _ in looks])],
            "twin": [astuple(time) for time in medians([twin for _, twin in looks])],
        }
        tell_all(own, al_cuts=al_cuts, twin_cuts=twin_cuts)


_LOOKS = 5  # timed micro-batches of both forms before each repetition
