"""Declares the tables of links: bytes between stages, and throughput on slow links."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_al.figures.parts import Table
from ds_al.studies.bench import published
from ds_al.studies.results import Row
from ds_al.studies.tables.write import BLANK, Column, crossed, groups, listed, more


def traffic(rows: Sequence[Row]) -> list[Table | str]:
    """Returns KiB per micro-batch at every boundary, by ``message_dtype`` and for 1F1B, and the rounding errors."""
    lines = []
    for own in groups(rows, "network", "boundary"):
        al = {row["message_dtype"]: row for row in own if row["method"] == "streaming"}
        (backprop,) = (row for row in own if row["method"] != "streaming")
        lines.append({**backprop, "al": al, "bp": backprop})
    columns = [
        Column("network", "{network}", left=True),
        Column("boundary", "{boundary}"),
        Column("1F1B, both ways", lambda row: _kib(row["bp"])),
        *_by_form("AL ", _kib),
        *_by_form("1F1B over AL: ", lambda al: f"{al['times_less']:.2f}"),
        *_by_form("error ", lambda al: f"{100 * al['relative_error']:.2f} %", forms=("bf16", "int8")),
    ]
    wrong = sum(row["bytes"] != row["formula"] for row in rows)
    agree = "all equal to the formula" if not wrong else f"{wrong} differ from the formula, which is in brackets"
    note = f"KiB per micro-batch of {rows[0]['samples']} samples, P = {rows[0]['stages']}; {agree}."
    return [listed(lines, columns), note]


def slow_link(rows: Sequence[Row]) -> list[Table | str]:
    """Returns samples per second at every rate with the change from no limit, and the rate that each form needs."""
    table = crossed(
        [{**row, "form": _form(row)} for row in rows],
        [Column("Mbit/s, each way", _rate, left=True), Column("a plain transfer", "{measured_mbit:,.0f}")],
        [Column("{form}", _throughput)],
    )
    free = [row for row in rows if row["rate_mbit"] is None]
    below = {
        "needs, busier way": [f"{row['needed_mbit']:,.0f} Mbit/s" for row in free],
        "KiB per micro-batch, both ways": [f"{row['bytes_per_micro_batch'] / 1024:,.0f}" for row in free],
        "the same at the interfaces": [f"{row['wire_bytes_per_micro_batch'] / 1024:,.0f}" for row in free],
    }
    change = published.SLOW_LINK
    return [
        more(table, [[name, BLANK, *cells] for name, cells in below.items()]),
        "Samples per second, and the change from no limit. Published, on 1 Gbit/s with two stages: "
        f"{100 * change['streaming']:+.1f} % for local learning, {100 * change['bp_1f1b']:+.0f} % for "
        "back-propagation (Yin et al., SOLO, arXiv 2609.35440: language models on GPUs).",
    ]


def _by_form(words: str, show: Callable[[Row], str], forms: Sequence[str] = ("fp32", "bf16", "int8")) -> list[Column]:
    """Returns one column per ``message_dtype`` of AL; the title of the first one starts with ``words``."""

    def of(form: str) -> Callable[[Row], str]:
        return lambda row: show(row["al"][form])

    return [Column(f"{words if form == forms[0] else ''}`{form}`", of(form)) for form in forms]


def _kib(row: Row) -> str:
    size = f"{row['bytes'] / 1024:,.1f}"
    return size if row["bytes"] == row["formula"] else f"{size} ({row['formula'] / 1024:,.1f})"


def _rate(row: Row) -> str:
    return "no limit" if row["rate_mbit"] is None else f"{row['rate_mbit']:,g}"


def _throughput(row: Row) -> str:
    change = "" if row["rate_mbit"] is None else f" ({100 * (row['relative_to_unlimited'] - 1):+.0f} %)"
    return f"{row['samples_per_s']:,.0f}{change}"


def _form(row: Row) -> str:
    return "1F1B" if row["method"] == "bp_1f1b" else f"AL `{row['message_dtype']}`"
