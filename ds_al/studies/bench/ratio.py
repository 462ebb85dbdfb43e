"""How many times as fast as 1F1B streaming is on the same cores and samples, beside the most that it could be.

1F1B takes M + P - 1 turns of a stage for M micro-batches, streaming M turns that are rho times as long:
it can be (M + P - 1) / (M rho) times as fast, if all stages are equal, and messages and engines cost nothing. rho is
measured in each process alone: an AL micro-batch, its step included, over one of the twin, which steps once in M.
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
        micro_batches: per batch, M.
        total: micro-batches of one timed run, whatever M is, rounded up to whole batches.
        repeat: runs of each, in turn.
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
    """The most times as fast as 1F1B that streaming can be on equal stages: ``(M + P - 1) / (M rho)``."""
    return (micro_batches + stages - 1) / (micro_batches * rho)


def rho_by_time(al: Sequence[LayerTime], twin: Sequence[LayerTime], *, micro_batches: int) -> float:
    """Seconds of an AL micro-batch over those of the twin's, layers summed up; the twin steps once in M."""
    return sum(time.cost() for time in al) / sum(
        time.forward + time.backward + time.step / micro_batches for time in twin
    )


def balance_of(costs: Sequence[StageCost]) -> float:
    """Mean over slowest stage: 1 where all are equal."""
    totals = [cost.forward + cost.backward + cost.step for cost in costs]
    return sum(totals) / len(totals) / max(totals)


def ratio_row(
    network: Network, repetitions: Sequence[Told], *, micro_batches: int, batches: int, rho_by_flops: float
) -> Row:
    """One row. Each rank tells ``{"spans": {method: {M: span}}, "al", "twin"}`` in every repetition, the last two the
    seconds ``(forward, backward, step)`` of each layer; ``al_cuts, twin_cuts`` stand beside.

    Columns: ``model, stages, micro_batch, micro_batches, batches, repeats``; ``streaming_samples_per_s``,
    ``bp_1f1b_samples_per_s``; ``ratio`` with its quartiles, of the repetitions' own ratios; ``rho`` measured and
    ``rho_by_flops``, ``bound`` and ``bound_by_flops`` with them; ``bound_balanced``, both schedules simulated on the
    stages' own measured times, so that neither form's imbalance is held against the other; ``share_of_bound,
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


# ---- what a rank does --------------------------------------------------------------------------------


def time_on_rank(network: Network, micro_batches: Sequence[int], total: int, repeat: int) -> None:
    """Both forms alone, then both methods with every M, in turn."""
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


_LOOKS = 5  # micro-batches of both forms before each repetition
