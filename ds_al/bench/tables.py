"""Tables of measurements, kept in a document between markers: ``<!-- NAME -->`` and ``<!-- end NAME -->``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.bench import link_tables, scaling_tables

Row = Mapping[str, Any]


def fill(document: Path, files: Sequence[Path]) -> list[str]:
    """Writes the table of each JSON file between the markers that bear its stem, and returns these names.

    Raises:
        ValueError: the document has no markers of that name.
    """
    text, names = document.read_text(), []
    for file in files:
        content = json.loads(file.read_text())
        name, header = file.stem, content["header"]
        if not 0 <= text.find(f"<!-- {name} -->\n") < text.find(f"<!-- end {name} -->"):
            raise ValueError(f"{document} has no markers '<!-- {name} -->' and '<!-- end {name} -->': add them")
        table = _table(content["rows"])
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{table}\n{_origin(header)}\n\n{end}{after}"
        names.append(name)
    document.write_text(text)
    return names


def bubble_tables(rows: Sequence[Row]) -> str:
    """The bubble of each method beside the expected one, mean of all stages, then where the idle time comes from.

    Equal stages, which sleep, have a formula; those of a network are simulated with the times of each.
    """
    equal = rows[0]["workload"] == "sleeping"
    expected, column = ("formula", "bubble_formula") if equal else ("simulated", "bubble_simulated")
    counts = sorted({row["micro_batches"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [
        "| method | " + " | ".join(f"M = {m}: bubble | {expected} | difference" for m in counts) + " |",
        "|---|" + "---:|" * (3 * len(counts)),
    ]
    for method in methods:
        cells = []
        for m in counts:
            own = _of(rows, method, m)
            bubble, wanted = _mean(own, "bubble"), _mean(own, column)
            cells += [f"{100 * bubble:.1f} %", f"{100 * wanted:.1f} %", f"{100 * (bubble - wanted):+.1f}"]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    most = counts[-1]
    causes = {
        "busy": "computes",
        "wait_input": "waits for input",
        "wait_queue": "to send",
        "wait_data": "for data",
        "wait_barrier": "for all stages",
        "drained": "has ended",
        "other": "other",
    }
    lines += [
        "",
        f"Where a stage's time goes, percent, M = {most}, first / last stage:",
        "",
        f"| method | {' | '.join(causes.values())} | bytes per micro-batch | critical path |",
        "|---|" + "---:|" * (len(causes) + 2),
    ]
    for method in methods:
        first, *_, last = _of(rows, method, most)
        shares = [f"{100 * first[name]:.1f} / {100 * last[name]:.1f}" for name in causes]
        sent = f"{first['bytes_per_micro_batch']:,.0f} / {last['bytes_per_micro_batch']:,.0f}"
        path = f"{100 * first['critical_path']:.0f} / {100 * last['critical_path']:.0f}"
        lines.append(f"| `{method}` | {' | '.join(shares)} | {sent} | {path} |")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    for column, make in _BY_COLUMN.items():
        if column in rows[0]:
            return make(rows)
    if "ratio" in rows[0]:
        return tracing_table(rows)
    return network_tables(rows) if "rho" in rows[0] else bubble_tables(rows)


_BY_COLUMN = {
    "times_less": link_tables.traffic_table,
    "rate_mbit": link_tables.slow_link_table,
    "study": scaling_tables.scaling_tables,
    "share_of_ceiling": scaling_tables.ceiling_table,
    "share_of_bound": scaling_tables.ratio_table,
}


def network_tables(rows: Sequence[Row]) -> str:
    """What networks cost: a table for images and one for texts, two numbers of layers side by side."""
    titles = {"images": "Images `(3, 32, 32)`, 10 classes:", "texts": "128 tokens, 4 classes, a vocabulary of 30,000:"}
    parts = []
    for kind, title in titles.items():
        lines = [
            title,
            "",
            "| network | bridge | K = 2: rho | bridges | parameters | K = 4: rho | bridges | parameters |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        own = [row for row in rows if row["kind"] == kind]
        for network, preset, bridge in dict.fromkeys((r["network"], r["preset"], r["bridge"]) for r in own):
            pair = [r for r in own if (r["network"], r["preset"], r["bridge"]) == (network, preset, bridge)]
            cells = [
                f"{r['rho']:.3f} | {100 * r['bridge_share']:.1f} % "
                f"| {r['parameters_f'] / 1000:,.0f} / {r['parameters_bridges'] / 1000:,.0f}"
                for r in pair
            ]
            name = f"`{network}` `{preset}`, twin {pair[0]['twin_flops'] / 1e6:,.1f}"
            lines.append(f"| {name} | {bridge} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def tracing_table(rows: Sequence[Row]) -> str:
    """How much longer a traced batch takes."""
    lines = [
        "| network | method | stages | M | ms per batch | traced, times as long (quartiles) | pairs |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(
            f"| {row['workload']} | `{row['method']}` | {row['stages']} | {row['micro_batches']} "
            f"| {1000 * row['seconds_without']:.1f} "
            f"| {row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f}) | {row['pairs']} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def _of(rows: Sequence[Row], method: str, micro_batches: int) -> list[Row]:
    return [row for row in rows if (row["method"], row["micro_batches"]) == (method, micro_batches)]


def _mean(rows: Sequence[Row], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)


def _origin(header: Row) -> str:
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return f"`{header['command']}`, {header['date']}, {machine['cores']} cores ({machine['cpu']}), {versions}."
