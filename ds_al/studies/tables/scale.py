"""Declares the tables of the predictions for many stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.scale.predictions import BLOCKS, METHODS, OVERLAPPED, Block
from ds_al.studies.scale.views import FORMULA, rows_of, series, share_of_alone
from ds_al.studies.tables.write import BLANK, Column, crossed, groups

_FACTS: Mapping[str, Callable[[Block], str]] = {
    "stage": lambda b: "one Transformer block",
    "width, tokens, sequences per micro-batch": lambda b: f"{b.width:,}, {b.tokens:,}, {b.sequences}",
    "parameters of a block": lambda b: f"{b.parameters / 1e6:,.1f} M",
    "achieved operations per second": lambda b: f"{b.flops / 1e12:g} T",
    "forward / backward of a micro-batch": lambda b: f"{1e3 * b.forward:.2f} / {2e3 * b.forward:.2f} ms",
    "optimizer step (28 bytes per parameter)": lambda b: (
        f"{1e3 * b.work(1).step:.2f} ms ({b.work(1).step / (3 * b.forward):.0%} of forward and backward)"
    ),
    "memory: size, bandwidth": lambda b: f"{b.device_bytes / 1e9:g} GB, {b.memory_bytes_per_second / 1e12:g} TB/s",
    "rho": lambda b: f"{b.rho:g}",
    "activation between stages (2 bytes per element)": lambda b: f"{b.work(1).message_bytes / 1e6:.1f} MB",
    "held for backward per block (34 bytes per element)": lambda b: f"{b.work(1).activation_bytes / 1e6:,.0f} MB",
}


def label(method: str) -> str:
    """Returns a method's name, with a mark if its times come from a formula."""
    return f"`{method}`" + (" (f)" if method in FORMULA else "")


def assumptions() -> Table:
    """Returns the table of assumptions, with one column per workload."""
    rows = [
        {"fact": name, "block": block.name, "text": show(block)} for name, show in _FACTS.items() for block in BLOCKS
    ]
    return crossed(rows, [Column(BLANK, "{fact}", left=True)], [Column("{block}", "{text}")])


def links(rows: Sequence[Row], workload: str) -> Table:
    """Returns the time per batch of one workload by link speed; the fastest method that fits is bold."""
    own = []
    for case in groups(rows_of(rows, section="links", workload=workload), "stages", "micro_batches", "link"):
        best = min(row["times_compute"] for row in case if row["fits"])
        for row in case:
            text = _short(row["times_compute"]) + ("" if row["fits"] else "*")
            fastest = row["fits"] and row["times_compute"] <= best * (1 + 1e-9)
            own.append({**row, "label": label(row["method"]), "text": f"**{text}**" if fastest else text})
    places = {(row["stages"], row["micro_batches"]): place for place, row in enumerate(own)}
    own.sort(key=lambda row: (places[row["stages"], row["micro_batches"]], METHODS.index(row["method"])))
    lines = [Column("P", "{stages}"), Column("M", "{micro_batches}"), Column("method", "{label}", left=True)]
    return crossed(own, lines, [Column("{link}", "{text}")])


def dial(rows: Sequence[Row], micro_batches: int) -> Table:
    """Returns time and memory of K layers on P stages, each with its fastest schedule, beside the rivals; the fastest
    of each P that fits is bold."""
    own = []
    for case in groups(rows_of(rows, section="dial", micro_batches=micro_batches), "stages"):
        fitting = [row for row in case if row["fits"] and row["method"] != "bp_async"]
        best = min((row["times_compute"] for row in fitting), default=0.0)
        shown: dict[str, Row] = {}
        for row in case:
            head = f"K = {row['layers']}" if row["layers"] else label(row["method"])
            if head not in shown or row["times_compute"] < shown[head]["times_compute"] * (1 - 1e-9):
                shown[head] = row
        for head, row in shown.items():
            mark = "" if row["fits"] else "*"
            text = f"{row['times_compute']:.2f} {row['schedule']}".strip()
            text = f"**{text}**" if row in fitting and row["times_compute"] <= best * (1 + 1e-6) else text
            held = f"{row['memory_bytes'] / 1e9:,.0f}{mark} GB"
            own.append({**row, "head": head, "place": row["layers"] or float("inf"), "text": f"{text}, {held}"})
    own.sort(key=lambda row: row["place"])
    return crossed(own, [Column(BLANK, "{head}", left=True)], [Column("P = {stages}", "{text}")], by="stages")


def many_micro_batches(rows: Sequence[Row]) -> Table:
    """Returns the speed of each method relative to 1F1B by M."""
    own = [{"name": name, "M": m, "value": value} for name, points in series(rows).items() for m, value in points]
    return crossed(own, [Column("times as fast as 1F1B", "{name}", left=True)], [Column("M = {M}", "{value:.2f}")])


def memory(rows: Sequence[Row]) -> Table:
    """Returns the gigabytes held and sent by each method, by pipeline size."""
    own = [
        {
            **row, "label": label(row["method"]), "mark": "" if row["fits"] else "*",
            "held": row["memory_bytes"] / 1e9, "sent": row["bytes_per_batch"] / 1e9,
        }
        for row in rows_of(rows, section="links", link="400gbit")
        if row["method"] != OVERLAPPED
    ]  # fmt: skip
    cells = [Column("{workload}, P = {stages}, M = {micro_batches}", "{held:,.1f}{mark}, sends {sent:.2f}")]
    order = sorted(own, key=lambda row: METHODS.index(row["method"]))
    return crossed(order, [Column("method", "{label}", left=True)], cells)


def speeds(rows: Sequence[Row]) -> Table:
    """Returns the time per batch on heterogeneous machines."""
    lines = [Column("method", "`{method}`", left=True), Column("P", "{stages}")]
    return crossed(rows_of(rows, section="speeds"), lines, [Column("s = {speeds_sigma}", "{times_compute:.2f}")])


def stragglers(rows: Sequence[Row]) -> Table:
    """Returns throughput relative to a single stage, for streaming by queue depth and for 1F1B."""
    own = []
    for row in rows_of(rows, section="stragglers"):
        depth, (share, spread) = row["queue_depth"], share_of_alone(row)
        head = f"queue depth {depth}" if depth else f"`{row['method']}`"
        own.append({**row, "head": head, "place": depth or float("inf"), "share": f"{share:.3f} ± {spread:.3f}"})
    lines = [Column("jitter", "`{jitter}`", left=True), Column("P", "{stages}")]
    return crossed(own, lines, [Column("{head}", "{share}")], by="place")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
