"""The predictions for many stages as a page with figures: every number in it comes from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_al.studies.scale.predictions import BLOCKS, LARGE, LINKS, OVERLAPPED, SMALL
from ds_al.studies.scale.views import Row, over_1f1b, row_of, rows_of, share_of_alone, steps_always
from ds_al.studies.tables import scale as tables
from ds_al.studies.tables.write import document


def page(header: Row, rows: Sequence[Row], *, figures: Mapping[str, str]) -> str:
    """``docs/scale.md``.

    Args:
        figures: paths of ``links``, ``sweep`` and ``stragglers``, relative to the page.
    """
    latencies = ", ".join(f"{link} {1000 * seconds:g} ms" for link, seconds in LINKS.items())
    return document(
        _INTRODUCTION,
        "## Assumptions",
        tables.assumptions(),
        f"Latency of a message, by link: {latencies}. Links are full duplex, one per neighbour.",
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
        "## Machines that are not alike",
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


_INTRODUCTION = """\
# 64 to 1,024 stages

**Predicted, not measured.** This page is what the planner's simulator ([ds_al/planner](../ds_al/planner/simulator.py))
and published formulas say of sizes that no machine here has. The simulator runs the same schedules as the engines; how
close it comes to what was measured, on small sizes, is in [performance.md](performance.md). What is assumed stands in
the first table; where a real cluster differs, `run/plan.py` takes its numbers.

What it shows. On links that computation hides behind, streaming takes rho and its optimizer steps, and nothing else,
whatever P and M are: no bubble, no waiting for gradients, the activations of one micro-batch. That is worth most with
many stages, few micro-batches and slow or far links. With many micro-batches the gain over 1F1B goes to nothing and
then below it, and zero-bubble pipelines get there without a change of the learning rule, where their memory and their
links are fast enough. Nothing here says how well a network of that depth learns: see the end."""

_LINKS = """\
Time per batch, as a multiple of what the twin's own computations take on a stage, M (F + B) / P: 1 is an ideal pipeline
of back-propagation without bubble, message or step. `streaming` steps once per micro-batch. `bp_1f1b` sends as
DeepSpeed does, by calls that block; in `bp_1f1b_overlapped` messages block nobody, a lower bound for any engine of
1F1B. (f) are formulas, lower bounds too, with the sources and limits that
[predict.py](../ds_al/planner/predict.py) gives. An asterisk marks what does not fit into the device's memory; data
parallel training needs the whole network on each. Bold: the fastest that fits."""

_MEMORY = """\
Gigabytes on the fullest stage: parameters, gradients and AdamW's state in fp32 (the same for all pipelines) and the
activations that wait for backward. Gigabytes sent per batch by a stage that has neighbours on both sides (by a replica,
with `bp_dp`). Activations travel forward only with AL, and come back as gradients with back-propagation."""

_STRAGGLERS = """\
Each micro-batch takes longer on some stage by chance: `lognormal:s` has a mean of 1, so a stage alone loses nothing;
`slow:p:k` is k times as slow with chance p, of which a stage alone would lose the mean. Throughput as a share of that
of one stage alone with the same jitter: what is lost because stages wait for each other. A queue between stages lets a
stage run ahead while its successor is late."""

_LIMITS = """\
## What this does not say

* **Accuracy.** A stage here is an AL layer (K = P), and accuracy falls with K: what it costs to have a hundred local
  objectives is not known, and no planner predicts it. Fewer, larger AL layers on groups of stages were not simulated.
* **rho at that depth.** It is assumed, for a light bridge; [models.md](models.md) counts what bridges cost.
* **The same update.** Streaming steps M times where back-propagation steps once. With one step per batch it pays u
  once, too (`steps_per_batch: 1`, in the table of many micro-batches).
* **Prediction.** It travels to the last stage and back.
* **Failures, sharing of links, topology, congestion, and devices that leave**: not modelled.
* **Other ways to use the machines.** Tensor parallelism, sharded data parallelism (ZeRO-3, FSDP), pipelines with data
  parallel groups, and compression of gradients or activations are not compared; on fast links they are what is used."""


def _winners(rows: Sequence[Row]) -> str:
    """Which method is fastest where, of those that fit, counted."""
    own = rows_of(rows, section="links")
    cases = dict.fromkeys((r["workload"], r["stages"], r["micro_batches"], r["link"]) for r in own)
    best: dict[str, list[str]] = {}
    gains = []
    for workload, stages, m, link in cases:
        case = rows_of(own, workload=workload, stages=stages, micro_batches=m, link=link)
        winner = min((r for r in case if r["fits"]), key=lambda r: r["seconds"])
        best.setdefault(winner["method"], []).append(link)
        gains.append(row_of(case, method=OVERLAPPED)["seconds"] / row_of(case, method="streaming")["seconds"])
    lines = ["Fastest among what fits, of all cases above:", ""]
    for method, links in sorted(best.items(), key=lambda item: -len(item[1])):
        counts = ", ".join(f"{links.count(link)} at {link}" for link in LINKS if link in links)
        lines.append(f"* {tables.label(method)}: {len(links)} of {len(cases)} ({counts})")
    lines += [
        "",
        f"Against 1F1B whose messages overlap, streaming is {min(gains):.2f} to {max(gains):.2f} times as fast.",
        "On the slowest links every pipeline is bound by them, and what is left of streaming's lead is that nobody "
        "waits for a message to come back: such a network is better not cut there, or its messages made smaller.",
    ]
    return "\n".join(lines)


def _sweep_text(rows: Sequence[Row]) -> str:
    own = rows_of(rows, section="sweep")
    stages = own[0]["stages"]
    streaming = [row for row in rows_of(own, method="streaming") if steps_always(row)]
    lost = [row["micro_batches"] for row in streaming if over_1f1b(own, row) < 1]
    where = f"from M = {min(lost)} on" if lost else "at no M that was looked at"
    least = own[0]["micro_batches"]
    gain = over_1f1b(own, row_of(own, method="streaming", micro_batches=least, steps_per_batch=least))
    return (
        "The gain over 1F1B is at most (M + P - 1) / (M rho), as long as messages hide behind computation, so it "
        f"vanishes as M grows. `{LARGE.name}`, P = {stages}, links of {own[0]['link']}: {gain:.2f} times as fast at "
        f"M = {least}; slower {where}, with a step per micro-batch. Interleaved and zero-bubble pipelines close much "
        "of the gap, or all of it."
    )


def _speeds_text(rows: Sequence[Row]) -> str:
    own = rows_of(rows, section="speeds", method="streaming")
    worst = max(own, key=lambda row: row["times_compute"])
    return (
        "Speeds of the machines are drawn once, lognormal around a median of 1. A pipeline of equal stages goes at the "
        f"pace of its slowest machine, whatever its schedule: with s = {worst['speeds_sigma']} and "
        f"P = {worst['stages']}, streaming takes {worst['times_compute']:.2f} times the compute of an average stage. "
        "AL does not change that; "
        'what does is a partition by measured speed (`"partition_method": "measured"`), which needs more layers than '
        f"stages. `{LARGE.name}`, M = {own[0]['micro_batches']}, links of {own[0]['link']}:"
    )


def _stragglers_text(rows: Sequence[Row], settled: int) -> str:
    own = rows_of(rows, section="stragglers", method="streaming")
    hardest = min(own, key=lambda row: share_of_alone(row)[0])
    deepest = max(rows_of(own, jitter=hardest["jitter"], stages=hardest["stages"]), key=lambda row: row["queue_depth"])
    return (
        f"`{LARGE.name}`, M = {own[0]['micro_batches']}, links of {own[0]['link']}; mean and standard deviation of "
        f"random runs. Streaming is timed from micro-batch {settled:,} to {2 * settled:,} of a run: the more stages, "
        "the longer it takes until all queues are as full as they will be, and until then even endless queues lose "
        "something, in proportion to the square root of stages over micro-batches (Glynn and Whitt, 1991, on "
        "departures from many queues in series). What `bp_1f1b` loses is its bubble and its messages, "
        f"beside the jitter. Of streaming the hardest case is `{hardest['jitter']}` on {hardest['stages']} stages: "
        f"{share_of_alone(hardest)[0]:.2f} with a queue of {hardest['queue_depth']}, {share_of_alone(deepest)[0]:.2f} "
        f"with one of {deepest['queue_depth']}. A queue costs a message's memory per place "
        f"({LARGE.work(1).message_bytes / 1e6:.0f} MB in `{LARGE.name}`, {SMALL.work(1).message_bytes / 1e6:.0f} MB in "
        f"`{SMALL.name}`) and changes no weight."
    )
