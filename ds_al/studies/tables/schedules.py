"""Declares the tables of schedules and engines: sleeping layers, features, overhead, memory, time breakdowns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row, machine_and_versions
from ds_al.studies.tables.write import Column, crossed, document, groups, listed, number, text

METHOD = Column("method", "`{method}`", left=True)

SLEEPING = (
    METHOD,
    Column("stages", "{stages}"),
    Column("M", "{micro_batches}"),
    Column("seconds", "{seconds:.3f}"),
    Column("spread", "{seconds_min:.3f}..{seconds_max:.3f}"),
    Column("ideal", "{ideal:.3f}"),
    Column("efficiency", "{efficiency:.3f}"),
)
REPARTITION = (
    Column("layers", "{moves}", left=True),
    Column("phase", "{phase}", left=True),
    Column("slowdown", "{slowdown:g}"),
    Column("batches/s", "{batches_per_second:.3f}"),
    Column("in the second half", "{batches_per_second_late:.3f}"),
    Column("best partition", "{best:.3f}"),
    Column("bounds at the end", "{bounds}", left=True),
)
OVERHEAD = (
    Column("engine", "`{method}`", left=True),
    Column("stage", "{stage}", left=True),
    Column("process, us (lowest to highest)", "{cpu_us:.0f} ({cpu_us_min:.0f} to {cpu_us_max:.0f})"),
    Column("layers and losses alone", "{maths_us:.0f}"),
    Column("engine", "{engine_us:.0f}"),
    Column("on the clock", "{wall_us:.0f}"),
    Column("process / stock", number("cpu_share", ".2f")),
    Column("engine / stock", number("engine_share", ".2f")),
)
FEATURES = (
    Column("feature", "{feature}", left=True),
    Column("stages x copies", "{stages} x {copies}", left=True),
    Column("seconds", "{seconds:.3f}", left=True),
    Column("least to most", "{seconds_min:.3f} to {seconds_max:.3f}", left=True),
    Column("formula", "{ideal:.3f}", left=True),
    Column("formula / seconds", "{efficiency:.3f}", left=True),
)
TRACING_COST = (
    Column("network", "{workload}", left=True),
    METHOD,
    Column("stages", "{stages}"),
    Column("M", "{micro_batches}"),
    Column("ms per batch", "{seconds_without*1000:.1f}"),
    Column("traced, times as long (quartiles)", "{ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})"),
    Column("pairs", "{pairs}"),
)
CAUSES = {
    "busy": "computes",
    "wait_input": "waits for input",
    "wait_queue": "to send",
    "wait_data": "for data",
    "wait_barrier": "for all stages",
    "drained": "has ended",
    "other": "other",
}
PROFILE = (
    METHOD,
    Column("M", "{micro_batches}"),
    Column("stage", "{stage}"),
    *(Column(title, f"{{{name}*100:.0f}}") for name, title in CAUSES.items()),
    Column("bubble", "{bubble*100:.1f}"),
    Column("formula", "{bubble_formula*100:.1f}"),
)


def sleeping(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the seconds of sleeping layers, with efficiency in brackets; one table per number of stages."""
    return [
        crossed(
            own,
            [Column(f"{own[0]['stages']} stages", "`{method}`", left=True)],
            [Column("M = {micro_batches}", "{seconds:.2f} s ({efficiency:.3f})")],
            by="micro_batches",
        )
        for own in groups(sorted(rows, key=lambda row: row["stages"]), "stages")
    ]


def sleeping_listed(rows: Sequence[Row]) -> list[Table | str]:
    """Returns one line per case with its spread, for the terminal."""
    return [listed(rows, SLEEPING, caption="sleeping layers: seconds of all batches of M micro-batches")]


def repartition(rows: Sequence[Row]) -> list[Table | str]:
    """Returns a line per phase, without moves and with them."""
    shown = [{**row, "moves": "move" if row["moves"] else "stay"} for row in rows]
    return [listed(shown, REPARTITION, caption="sleeping layers, one stage slower for a while: batches per second")]


def overhead(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the overhead of each engine per micro-batch and stage."""
    return [listed(rows, OVERHEAD, caption="microseconds of a stage per micro-batch that computes nothing")]


def features(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the seconds of each feature, compared with the formula and with no feature."""
    plain = {row["copies"]: row["efficiency"] for row in reversed(rows) if row["feature"] in ("none", "2 copies")}

    def to_none(row: Row) -> str:
        return f"{plain[row['copies']] / row['efficiency']:.3f}" if row["copies"] in plain else ""

    return [listed(rows, [*FEATURES, Column("time to none", to_none, left=True)])]


def tracing_cost(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the slow-down of a traced batch."""
    return [listed(rows, TRACING_COST)]


def profile(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the measured and expected bubble of each method, mean over stages, then the time of a stage by cause.

    Equal stages, which sleep, have a formula; those of a network are simulated with the times of each.
    """
    equal = rows[0]["workload"] == "sleeping"
    expected, column = ("formula", "bubble_formula") if equal else ("simulated", "bubble_simulated")
    means = []
    for own in groups(rows, "method", "micro_batches"):
        bubble, wanted = (sum(row[name] for row in own) / len(own) for name in ("bubble", column))
        means.append({**own[0], "bubble": bubble, "wanted": wanted, "difference": bubble - wanted})
    most = max(row["micro_batches"] for row in rows)
    ends = [(own[0], own[-1]) for own in groups((row for row in rows if row["micro_batches"] == most), "method")]
    shares = [*(Column(title, f"{{{name}*100:.1f}}") for name, title in CAUSES.items())]
    shares += [Column("bytes per micro-batch", "{bytes_per_micro_batch:,.0f}")]
    shares += [Column("critical path", "{critical_path*100:.0f}")]
    pairs = [{"method": first["method"], "first": first, "last": last} for first, last in ends]
    return [
        crossed(
            means,
            [METHOD],
            [
                Column("M = {micro_batches}: bubble", "{bubble*100:.1f} %"),
                Column(expected, "{wanted*100:.1f} %"),
                Column("difference", "{difference*100:+.1f}"),
            ],
            by="micro_batches",
        ),
        f"Where a stage's time goes, percent, M = {most}, first / last stage:",
        listed(pairs, [METHOD, *(Column(each.title, _first_and_last(each)) for each in shares)]),
    ]


def _first_and_last(column: Column) -> Callable[[Row], str]:
    return lambda row: f"{text(column.show, row['first'])} / {text(column.show, row['last'])}"


def profile_listed(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the time breakdown of each stage, for the terminal."""
    return [listed(rows, PROFILE, caption="percent of the time, by stage")]


def memory(rows: Sequence[Row]) -> list[Table | str]:
    """Returns KiB held for backward on each stage of dense layers, for the largest measured case."""
    own, most = _fullest_case(rows)
    cells = [Column("stage {stage}", "{peak_bytes/1024:.1f}")]
    return [crossed(own, [Column(f"KiB, M = {most}", "`{method}`", left=True)], cells)]


def memory_by_size(rows: Sequence[Row]) -> list[Table | str]:
    """Returns the peak KiB over all stages of dense layers, by number of micro-batches."""
    dense = [row for row in rows if row["workload"] == "dense"]
    order = list(dict.fromkeys(row["method"] for row in dense))
    dense = sorted(dense, key=lambda row: (order.index(row["method"]), row["stages"], row["micro_batches"]))
    cases = groups(dense, "method", "stages", "micro_batches")
    fullest = [max(own, key=lambda row: row["peak_bytes"]) for own in cases]
    lines = [METHOD, Column("stages", "{stages}")]
    caption = "KiB held for backward on the fullest stage, by micro-batches"
    return [crossed(fullest, lines, [Column("{micro_batches}", "{peak_bytes/1024:.1f}")], caption=caption)]


def memory_page(header: Row, rows: Sequence[Row]) -> str:
    """Returns the text of ``docs/memory.md``."""
    own, most = _fullest_case(rows)
    recomputed = [row for row in rows if row["workload"] == "transformer"]
    kept = {row["layers"]: row["peak_bytes"] for row in recomputed if not row["checkpoint_interval"]}

    def share(row: Row) -> str:
        return f"{row['peak_bytes'] / 1024:,.0f} ({row['peak_bytes'] / kept[row['layers']]:.2f})"

    return document(
        "# Memory held for the backward pass",
        MEMORY_TEXT.format(**header["settings"]),
        "## Peak KiB over all stages, by number of micro-batches",
        *memory_by_size(rows),
        f"## KiB (tensors) on each of {own[0]['stages']} stages, {most} micro-batches",
        crossed(own, [METHOD], [Column("stage {stage}", "{peak_bytes/1024:.1f} ({peak_tensors})")]),
        "## With activation checkpointing",
        RECOMPUTED_TEXT,
        crossed(recomputed, [Column("AL layers", "{layers}")], [Column("interval {checkpoint_interval}", share)]),
        RECOMPUTED_NOTE,
        "## How it was measured",
        f"    {header['command']}",
        machine_and_versions(header),
    )


MEMORY_TEXT = """\
Peak memory of the tensors that autograd saves for backward during one batch, per stage: bytes of distinct
storages, without parameters. Each stage holds one layer, Linear-ReLU-Linear-ReLU of width {width}; a
micro-batch has {micro_batch} samples. For `streaming` the count includes the bridge, the target side and both
local losses. Message buffers outside the graph are not counted; a stage has at most `queue_depth` send
buffers and `receive_slots` receive buffers.

`streaming` holds one micro-batch, `bp_1f1b` min(stages - stage, micro-batches), `bp_gpipe` all of them."""

RECOMPUTED_TEXT = """\
`"pipeline": {"activation_checkpoint_interval": n}` recomputes f in its local backward, n blocks at a time,
and only saves the inputs of these groups; 0 disables recomputation. The table shows one stage with all blocks
of a Transformer (an embedding and encoder layers, preset `small`, 64 tokens), grouped into AL layers: peak
KiB, and in brackets the share of the peak without recomputation. Weights and buffers are bitwise identical;
the cost is one additional forward of f per micro-batch."""

RECOMPUTED_NOTE = """\
The grouping of blocks into layers hardly matters, since all layers of a stage run forward before the first
backward. With one block per layer, intervals above 1 have no effect."""


def _fullest_case(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Returns the dense rows with the most stages and micro-batches, and that number of micro-batches."""
    dense = [row for row in rows if row["workload"] == "dense"]
    stages, most = (max(row[name] for row in dense) for name in ("stages", "micro_batches"))
    return [row for row in dense if (row["stages"], row["micro_batches"]) == (stages, most)], most
