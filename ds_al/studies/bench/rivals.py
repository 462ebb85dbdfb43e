"""Measures local learning and exact back-propagation beside the strongest back-propagation pipelines, on two cores.

All pipelines of a network train the same micro-batches in turns: K = 2 layers by streaming, K = 1 layer by schedules
inside a group, DeepSpeed's 1F1B, and its rivals. Every pipeline is cut where its own slowest stage is fastest, by times
that are measured first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepspeed import comm as dist

from ds_al.baseline import build
from ds_al.models import build_al, build_twin
from ds_al.partition.part import blocks, run_of
from ds_al.studies.bench import workloads
from ds_al.studies.bench.cases import START_UP, Row, train, world_size
from ds_al.studies.bench.forms import Network, best_cuts, medians, time_forms
from ds_al.studies.bench.interleaved import Told, mean, measure, quartiles, tell_all, together, turns

FIRST = "bp_1f1b"
RIVALS = (FIRST, "bp_zb_h1", build.DUALPIPEV)
"""The back-propagation pipelines."""
_LOOKS = 7  # micro-batches of both forms that determine the cuts


class Pipeline(NamedTuple):
    """A pipeline to time: a method, K local layers, and the schedule inside a group where a layer spans stages."""

    method: str
    layers: int = 1
    schedule: str = ""

    @property
    def least(self) -> int:
        """Least number of micro-batches per batch, on two stages."""
        return workloads.least_micro_batches(self.method, 2)


PIPELINES = (
    Pipeline("streaming", 2),
    Pipeline("groups", 1, "1f1b"),
    Pipeline("groups", 1, "zb_h1"),
    *(Pipeline(method) for method in RIVALS),
)


def measure_cores(
    networks: Sequence[Network],
    *,
    micro_batches: Sequence[int],
    total: int,
    repeat: int,
    progress: Callable[[str, list[Row]], None] | None = None,
) -> list[Row]:
    """Measures every network with every pipeline and number of micro-batches per batch that it trains.

    Args:
        networks: networks on two stages.
        micro_batches: values of M, micro-batches per batch.
        total: micro-batches of one timed run for every M, rounded up to whole batches.
        repeat: runs of each case; cases alternate.
        progress: called after every repetition with the network's name and all rows so far.

    Returns:
        Rows as :func:`core_rows` describes them.

    Raises:
        RankFailure: a rank failed.
    """

    def rows_of(network: Network, told: list[Told]) -> list[Row]:
        return [row for m in micro_batches for row in core_rows(network, told, micro_batches=m, total=total)]

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


def core_rows(network: Network, repetitions: Sequence[Told], *, micro_batches: int, total: int) -> list[Row]:
    """Returns the rows of one M. Each rank sends ``{"number of the pipeline, M": span}`` in every repetition.

    Columns: ``model, stages, micro_batch, method, schedule, layers, micro_batches, repeats``; ``samples_per_s``, median
    and quartiles (``_low``, ``_high``); ``over_1f1b`` and ``over_rival``, medians of the ratios of all repetitions to
    DeepSpeed's 1F1B and to ``rival``, the back-propagation pipeline with the highest median.
    """
    samples = network.micro_batch * micro_batches * -(-total // micro_batches)
    rates = {
        pipeline: [
            samples / together([rank[f"{number}, {micro_batches}"] for rank in told["ranks"]]) for told in repetitions
        ]
        for number, pipeline in enumerate(PIPELINES)
        if micro_batches >= pipeline.least
    }
    best = max((each for each in rates if each.method in RIVALS), key=lambda each: quartiles(rates[each])[1])

    def over(own: Sequence[float], other: Pipeline) -> float:
        return quartiles([a / b for a, b in zip(own, rates[other], strict=True)])[1]

    rows = []
    for pipeline, own in rates.items():
        low, median, high = quartiles(own)
        rows.append(
            {
                "model": network.model,
                "stages": network.stages,
                "micro_batch": network.micro_batch,
                "method": pipeline.method,
                "schedule": pipeline.schedule,
                "layers": pipeline.layers,
                "micro_batches": micro_batches,
                "repeats": len(repetitions),
                "samples_per_s": median,
                "samples_per_s_low": low,
                "samples_per_s_high": high,
                "over_1f1b": over(own, Pipeline(FIRST)),
                "over_rival": over(own, best),
                "rival": best.method,
            }
        )
    return rows


# ---- functions that run on each rank -----------------------------------------------------------------


def time_on_rank(network: Network, micro_batches: Sequence[int], total: int, repeat: int) -> None:
    """Times all pipelines with every M, alternating."""
    world_size()
    engines = _engines(network)
    data = itertools.cycle(network.micro_batches())
    for pipeline, engine in engines.items():
        train(engine, data, micro_batches=max(*micro_batches, pipeline.least), batches=2)
    cases = [(number, m) for m in micro_batches for number, each in enumerate(PIPELINES) if m >= each.least]
    for turn in range(repeat):
        dist.barrier()
        own = {
            f"{number}, {m}": train(engines[PIPELINES[number]], data, micro_batches=m, batches=-(-total // m))
            for number, m in turns(cases, turn)
        }
        tell_all(own)


def one_layer_cuts(network: Network, cuts: Sequence[int]) -> list[int]:
    """Returns cuts of the twin as those of the f of one AL layer with the same weights on each stage: the blocks of f
    may be smaller, as a VGG's, which are single modules. Where the twin's last stage has the head alone, f's has its
    last block with weights."""
    modules = [spec.build() for spec in build_twin(network.model, **network.options)][:-1]
    (layer,) = build_al(network.model, **{**network.options, "num_layers": 1})
    f = layer.build().f
    weights = [len(list(run_of(f, range(block)).parameters())) for block in range(1, blocks(f))]
    before = [0, *itertools.accumulate(len(list(module.parameters())) for module in modules)]
    return [
        1 + max(at for at, count in enumerate(weights) if count <= min(before[cut], before[-1] - 1)) for cut in cuts
    ]


def _engines(network: Network) -> dict[Pipeline, Any]:
    looks = list(time_forms(network, repeat=_LOOKS))
    own: Any = medians([al for al, _ in looks]), medians([twin for _, twin in looks])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    al, twin = (mean([rank[form] for rank in everyone]) for form in (0, 1))

    def engine(pipeline: Pipeline) -> Any:
        parts = network.stages * (2 if pipeline.method == build.DUALPIPEV else 1)
        cuts = best_cuts(al if pipeline.method == "streaming" else twin, stages=parts)
        options, block = network.options, {}
        partition = f"cuts:{','.join(map(str, cuts[1:-1]))}"
        if pipeline.method == "streaming":
            options |= {"num_layers": [b - a for a, b in itertools.pairwise(cuts)]}
            partition = "uniform"
        elif pipeline.schedule:
            options |= {"num_layers": 1, "objective": "greedy"}
            block = {"group_schedule": pipeline.schedule}
            partition = f"cuts:{','.join(map(str, one_layer_cuts(network, cuts[1:-1])))}"
        return workloads.model_engine(
            "streaming" if pipeline.schedule else pipeline.method,
            model=network.model,
            stages=network.stages,
            micro_batch=network.micro_batch,
            options=options,
            partition=partition,
            optimizer=workloads.ADAMW,
            block=block,
        )

    return {pipeline: engine(pipeline) for pipeline in PIPELINES}
