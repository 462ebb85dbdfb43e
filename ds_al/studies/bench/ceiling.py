"""Compares the throughput of streaming with that of the same stages without messages and without an engine.

The ceiling is the throughput that the machine allows: every rank trains its own layers on one stored micro-batch with
only the stage's forward, backward and step, all ranks at once. Both alternate in the same processes, with the same
layers and the same number of micro-batches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from deepspeed import comm as dist

from ds_al.studies.bench.cases import START_UP, Row, train, world_size
from ds_al.studies.bench.forms import ALForm, Network
from ds_al.studies.bench.interleaved import Span, Told, decide_cuts, measure, quartiles, tell_all, together, turns


def measure_ceiling(
    networks: Sequence[Network],
    *,
    micro_batches: int,
    batches: int,
    repeat: int,
    progress: Callable[[str, list[Row]], None] | None = None,
) -> list[Row]:
    """Measures every network.

    Args:
        networks: networks to measure.
        micro_batches: micro-batches per batch, M.
        batches: batches of one run of streaming; the ceiling runs as many micro-batches.
        repeat: runs of each; the two alternate.
        progress: called after every repetition with the network's name and all rows so far.

    Returns:
        Rows as :func:`ceiling_rows` describes them.

    Raises:
        RankFailure: a rank failed.
    """
    return measure(
        networks,
        target=f"{__name__}:time_on_rank",
        timeout=10 * START_UP,
        rows_of=partial(ceiling_rows, micro_batches=micro_batches, batches=batches),
        progress=progress,
        micro_batches=micro_batches,
        batches=batches,
        repeat=repeat,
    )


def ceiling_rows(network: Network, repetitions: Sequence[Told], *, micro_batches: int, batches: int) -> list[Row]:
    """Returns two rows per network, ``streaming`` and ``ceiling``, from both time spans of each rank and repetition.

    Columns: ``model, method, stages, cuts, micro_batch, micro_batches, batches, repeats``; ``samples_per_s`` with its
    quartiles ``_low, _high``, limited by the slowest stage; ``share_of_ceiling`` with its quartiles, the median of the
    ratios of all repetitions; ``balance``, the time of the fastest stage over that of the slowest, without the engine.
    """
    samples = network.micro_batch * micro_batches * batches
    rates: dict[str, list[float]] = {"streaming": [], "ceiling": []}
    balances = []
    for told in repetitions:
        alone = [end - start for start, end in (rank["ceiling"] for rank in told["ranks"])]
        rates["streaming"].append(samples / together([rank["streaming"] for rank in told["ranks"]]))
        rates["ceiling"].append(samples / max(alone))
        balances.append(min(alone) / max(alone))
    shares = {name: [a / b for a, b in zip(each, rates["ceiling"], strict=True)] for name, each in rates.items()}
    rows = []
    for method in rates:
        low, median, high = quartiles(rates[method])
        share_low, share, share_high = quartiles(shares[method])
        rows.append(
            {
                "model": network.model,
                "method": method,
                "stages": network.stages,
                "cuts": repetitions[-1]["cuts"],
                "micro_batch": network.micro_batch,
                "micro_batches": micro_batches,
                "batches": batches,
                "repeats": len(repetitions),
                "samples_per_s": median,
                "samples_per_s_low": low,
                "samples_per_s_high": high,
                "share_of_ceiling": share,
                "share_low": share_low,
                "share_high": share_high,
                "balance": quartiles(balances)[1],
            }
        )
    return rows


# ---- functions that run on each rank -----------------------------------------------------------------


def time_on_rank(network: Network, micro_batches: int, batches: int, repeat: int) -> None:
    """Alternates between streaming and the stages without an engine."""
    world_size()
    cuts, _ = decide_cuts(network)
    engine = network.engine("streaming", cuts)
    kept = network.micro_batches()
    s, t = ALForm(network).inputs(cuts[dist.get_rank()], *kept[0])
    data = itertools.cycle(kept)

    def stream() -> Span:
        return train(engine, data, micro_batches=micro_batches, batches=batches)

    def alone() -> Span:
        return _alone(engine, s, t, micro_batches=micro_batches * batches)

    runs = [("streaming", stream), ("ceiling", alone)]
    for _, run in runs:
        run()
    for number in range(repeat):
        tell_all({name: run() for name, run in turns(runs, number)}, cuts=cuts)


def _alone(engine: Any, s: Any, t: Any, *, micro_batches: int) -> Span:
    """Runs only the stage's computation."""
    stage, optimizer = engine.stage, engine.optimizer
    dist.barrier()
    start = time.perf_counter()
    for _ in range(micro_batches):
        stage.forward(s, t)
        stage.backward(scale=1.0)
        optimizer.step()
        optimizer.zero_grad()
    end = time.perf_counter()
    stage.take_losses(micro_batches)  # otherwise the next batch of the pipeline would report them
    return start, end
