"""Writes the predictions for many stages as a page with figures; every number comes from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.scale.predictions import BLOCKS, LARGE, LINKS, OVERLAPPED, SMALL
from ds_al.studies.scale.views import Row, over_1f1b, row_of, rows_of, share_of_alone, steps_always
from ds_al.studies.tables import scale as tables
from ds_al.studies.tables.write import document, groups


def page(header: Row, rows: Sequence[Row], *, figures: Mapping[str, str]) -> str:
    """Returns the text of ``docs/scale.md``.

    Args:
        header: header of the results file.
        rows: rows of :meth:`~ds_al.studies.scale.predictions.Study.rows`.
        figures: paths of ``links``, ``sweep`` and ``stragglers``, relative to the page.
    """
    latencies = ", ".join(f"{link} {1000 * seconds:g} ms" for link, seconds in LINKS.items())
    return document(
        _INTRODUCTION,
        "## Assumptions",
        tables.assumptions(),
        f"Message latency by link: {latencies}. Links are full duplex; a stage has one link to each neighbour.",
        *_dial(rows),
        "## Links",
        _LINKS,
        f"![Time per batch over the speed of the links]({figures['links']})",
        *(part for block in BLOCKS for part in (f"`{block.name}`:", tables.links(rows, block.name))),
        _winners(rows),
        "## Many micro-batches",
        _sweep_text(rows),
        f"![Streaming, interleaved and zero bubble against 1F1B over M]({figures['sweep']})",
        tables.many_micro_batches(rows),
        "## Memory and bytes",
        _MEMORY,
        tables.memory(rows),
        "## Heterogeneous machines",
        _speeds_text(rows),
        tables.speeds(rows),
        "## Stragglers",
        _STRAGGLERS,
        f"![Throughput over queue depth]({figures['stragglers']})",
        tables.stragglers(rows),
        _stragglers_text(rows, header["settings"]["settled"]),
        _LIMITS,
        f"`{header['command']}`, {header['date']}; the rows are deterministic.",
    )


EXACT = ("bp_1f1b", "bp_zb_h1", "bp_zb_h2", "bp_dualpipev")
"""Pipelines of exact gradients."""

_INTRODUCTION = """\
# 2 to 1,024 stages

**Predicted, not measured.** These results come from the planner's simulator
([ds_al/planner](../ds_al/planner/simulator.py)) and from published formulas, for sizes that could not be measured. The
simulator runs the same schedules as the engines; [performance.md](performance.md) compares its predictions with
measurements at small sizes. The first table lists the assumptions; `run/plan.py` accepts the figures of a real cluster.

**Summary.** Where communication overlaps with computation, streaming costs rho and its optimizer steps, and nothing
else, for any P and M: it has no bubble, does not wait for gradients, and holds the activations of one micro-batch. The
gain is largest with many stages, few micro-batches and slow or long-distance links. With many micro-batches the gain
over 1F1B vanishes and then becomes a loss. Zero-bubble pipelines reach the same speed without a change of the learning
rule if their memory and links are fast enough. Between the two lie groups: K layers on P > K stages have the bubble and
the memory of a pipeline of P / K stages. How well a network of that depth learns is not predicted (see
[the limits](#limits-of-these-predictions))."""

_DIAL = """\
K AL layers on P stages of `large`, in groups of G = P / K ([dial.md](dial.md)), 100gbit links, one optimizer step per
batch for every method; K = 1 is exact back-propagation, K = P streaming. Time per batch as a multiple of M (F + B) / P,
with the fastest schedule inside a group and, after the comma, the memory of the fullest stage: parameters, gradients,
AdamW's state and activations, of `streaming` also message buffers. Bold is the fastest that fits, without `bp_async`,
whose gradients are a step late. `bp_zb_h1` and `bp_zb_h2` are simulated with messages that block no stage. A rival that
needs more micro-batches has no entry: `bp_dualpipev` 2 P, `bp_async` P."""

_LINKS = """\
Time per batch as a multiple of M (F + B) / P, the compute time of the backprop twin on one stage: 1 is an ideal
back-propagation pipeline without bubble, messages or optimizer step. `streaming` steps once per micro-batch. `bp_1f1b`
sends with blocking calls, as DeepSpeed does; `bp_1f1b_overlapped` assumes messages that block no stage, a lower bound
for any 1F1B engine. Methods marked (f) are computed by formulas, which are also lower bounds;
[predict.py](../ds_al/planner/predict.py) gives their sources and limits. An asterisk marks configurations that exceed
the device's memory; data parallel training needs the whole network on each device. The fastest configuration that fits
is bold. `bp_zb_h1`, `bp_zb_h2` and `bp_dualpipev` run in this package ([dial.md](dial.md)); the first two are simulated
with messages that block no stage, and without the processor time of splitting. `bp_dualpipev` has no row below 2 P
micro-batches."""

_MEMORY = """\
Gigabytes on the stage that needs most memory: parameters, gradients and AdamW's state in fp32 (the same for all
pipelines) and the activations held for backward. Gigabytes sent per batch by a stage with two neighbours (with `bp_dp`,
by a replica). With AL, activations are only sent forward; back-propagation also sends their gradients back."""

_STRAGGLERS = """\
The time of each micro-batch on each stage is random: `lognormal:s` has a mean of 1, so a single stage loses nothing;
`slow:p:k` is k times as slow with probability p, so a single stage loses the mean slowdown. The table gives throughput
relative to a single stage with the same jitter; the rest is lost because stages wait for each other. A queue between
stages lets a stage run ahead while its successor is late."""

_LIMITS = """\
## Limits of these predictions

* **Accuracy.** On images accuracy falls with K ([dial.md](dial.md#what-k-buys)); unless K is named, each stage is one
  AL layer (K = P). The accuracy cost of a hundred local objectives is unknown, and no planner predicts it.
* **Split backward passes.** `zb_h1` and `zb_h2` are predicted without the processor time that splitting costs, and with
  half of a backward for the gradients of weights.
* **rho at that depth.** rho is assumed, for a light bridge; [models.md](models.md) counts the cost of bridges.
* **Number of updates.** Streaming steps M times where back-propagation steps once. With one step per batch
  (`steps_per_batch: 1`, in the table of many micro-batches) streaming also pays u once.
* **Inference.** A prediction passes through all stages to the last one, and its result is sent back.
* **Failures, shared links, topology, congestion, and devices that leave** are not modelled.
* **Other forms of parallelism.** Tensor parallelism, sharded data parallelism (ZeRO-3, FSDP), pipelines with data
  parallel groups, and compression of gradients or activations are not compared; on fast links they are the usual
  choice."""


def _dial(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a table for each number of micro-batches, and a sentence on the least K that costs no time; empty where
    this section was not predicted."""
    blocks: list[Table | str] = []
    for own in groups(rows_of(rows, section="dial"), "micro_batches"):
        m, most = own[0]["micro_batches"], max(row["stages"] for row in own)
        case = rows_of(own, stages=most)
        local = [row for row in case if row["layers"]]
        least = min(row["times_compute"] for row in local)
        enough = min(row["layers"] for row in local if row["times_compute"] <= 1.05 * least)
        rival = min((row for row in case if row["method"] in EXACT), key=lambda row: row["times_compute"])
        streaming = next(row for row in case if row["method"] == "streaming")
        blocks += [
            f"M = {m}:",
            tables.dial(rows, m),
            f"On {most} stages K = {enough} is within 5 % of the least time of all K; the fastest pipeline of exact "
            f"gradients, `{rival['method']}`, takes {rival['times_compute'] / least:.2f} times that, and holds "
            f"{rival['memory_bytes'] / streaming['memory_bytes']:.1f} times the memory of K = P.",
        ]
    return ["## K layers on P stages", _DIAL, *blocks] if blocks else []


def _winners(rows: Sequence[Row]) -> str:
    """Counts, for each method, the cases in which it is the fastest that fits."""
    own = rows_of(rows, section="links")
    cases = dict.fromkeys((r["workload"], r["stages"], r["micro_batches"], r["link"]) for r in own)
    best: dict[str, list[str]] = {}
    gains, over_best = [], []
    for workload, stages, m, link in cases:
        case = rows_of(own, workload=workload, stages=stages, micro_batches=m, link=link)
        winner = min((r for r in case if r["fits"]), key=lambda r: r["seconds"])
        best.setdefault(winner["method"], []).append(link)
        streaming = row_of(case, method="streaming")["seconds"]
        gains.append(row_of(case, method=OVERLAPPED)["seconds"] / streaming)
        if rivals := [r["seconds"] for r in case if r["fits"] and r["method"] != "streaming"]:
            over_best.append(min(rivals) / streaming)
    lines = ["Fastest configuration that fits, over all cases above:", ""]
    for method, links in sorted(best.items(), key=lambda item: -len(item[1])):
        counts = ", ".join(f"{links.count(link)} at {link}" for link in LINKS if link in links)
        lines.append(f"* {tables.label(method)}: {len(links)} of {len(cases)} ({counts})")
    lines += [
        "",
        f"Streaming is {min(gains):.2f} to {max(gains):.2f} times as fast as 1F1B with overlapped messages, and "
        f"{min(over_best):.2f} to {max(over_best):.2f} times as fast as the fastest rival that fits; none fits in "
        f"{len(cases) - len(over_best)} of {len(cases)} cases.",
        "On the slowest links every pipeline is limited by communication, and streaming only gains because no stage "
        "waits for a reply. Such a network should not be split at that link, or should send smaller messages.",
    ]
    return "\n".join(lines)


def _sweep_text(rows: Sequence[Row]) -> str:
    own = rows_of(rows, section="sweep")
    stages = own[0]["stages"]
    streaming = [row for row in rows_of(own, method="streaming") if steps_always(row)]
    lost = [row["micro_batches"] for row in streaming if over_1f1b(own, row) < 1]
    where = f"from M = {min(lost)} on" if lost else "at none of these M"
    least = own[0]["micro_batches"]
    gain = over_1f1b(own, row_of(own, method="streaming", micro_batches=least, steps_per_batch=least))
    return (
        "The gain over 1F1B is at most (M + P - 1) / (M rho) while communication overlaps with computation, so it "
        f"vanishes as M grows. For `{LARGE.name}`, P = {stages} and {own[0]['link']} links, streaming with a step per "
        f"micro-batch is {gain:.2f} times as fast at M = {least}, and slower {where}. Interleaved and zero-bubble "
        "pipelines close much or all of the gap."
    )


def _speeds_text(rows: Sequence[Row]) -> str:
    own = rows_of(rows, section="speeds", method="streaming")
    worst = max(own, key=lambda row: row["times_compute"])
    return (
        "Machine speeds are drawn once, from a lognormal distribution with a median of 1. A pipeline of equal stages "
        f"runs at the speed of its slowest machine under every schedule: with s = {worst['speeds_sigma']} and "
        f"P = {worst['stages']}, streaming takes {worst['times_compute']:.2f} times the compute of an average stage. "
        'AL does not change that; a partition by measured speed (`"partition_method": "measured"`) does, but needs '
        f"more layers than stages. `{LARGE.name}`, M = {own[0]['micro_batches']}, {own[0]['link']} links:"
    )


def _stragglers_text(rows: Sequence[Row], settled: int) -> str:
    own = rows_of(rows, section="stragglers", method="streaming")
    hardest = min(own, key=lambda row: share_of_alone(row)[0])
    deepest = max(rows_of(own, jitter=hardest["jitter"], stages=hardest["stages"]), key=lambda row: row["queue_depth"])
    return (
        f"`{LARGE.name}`, M = {own[0]['micro_batches']}, {own[0]['link']} links; mean and standard deviation over "
        f"random runs. Streaming is timed from micro-batch {settled:,} to {2 * settled:,} of a run: with more stages "
        "the queues take longer to reach their steady state, and until then even unbounded queues lose throughput, in "
        "proportion to the square root of stages over micro-batches (Glynn and Whitt, 1991, on departures from many "
        "queues in series). `bp_1f1b` loses its bubble and its messages in addition to the jitter. The hardest case "
        f"for streaming is `{hardest['jitter']}` on {hardest['stages']} stages: "
        f"{share_of_alone(hardest)[0]:.2f} with a queue depth of {hardest['queue_depth']}, "
        f"{share_of_alone(deepest)[0]:.2f} with {deepest['queue_depth']}. Each queue slot takes the memory of one "
        f"message ({LARGE.work(1).message_bytes / 1e6:.0f} MB in `{LARGE.name}`, "
        f"{SMALL.work(1).message_bytes / 1e6:.0f} MB in `{SMALL.name}`); the queue depth changes no weight."
    )
