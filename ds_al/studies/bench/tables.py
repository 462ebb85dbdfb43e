"""Tables of measurements, kept in a document between markers: ``<!-- NAME -->`` and ``<!-- end NAME -->``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_al.studies.bench import link_tables, report, scaling_tables
from ds_al.studies.bench.predictions import against_table
from ds_al.studies.bench.recipe_time import recipe_time_table
from ds_al.studies.sweep.choice import choice_markdown
from ds_al.studies.sweep.table import markdown

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
    """The table of what these rows measured, which the first of the columns below tells that they have."""
    kinds: dict[str, Callable[[Any], str]] = {
        "trials": choice_markdown,
        "test_accuracy": markdown,
        "predicted": against_table,
        "times_less": link_tables.traffic_table,
        "rate_mbit": link_tables.slow_link_table,
        "study": scaling_tables.scaling_tables,
        "share_of_ceiling": scaling_tables.ceiling_table,
        "share_of_bound": scaling_tables.ratio_table,
        "engine_us": overhead_table,
        "twin_ms": recipe_time_table,
        "ratio": tracing_table,
        "u": layer_tables,
        "rho": network_tables,
        "peak_bytes": memory_table,
        "ideal": sleeping_tables,
    }
    return next((make for column, make in kinds.items() if column in rows[0]), bubble_tables)(rows)


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


def sleeping_tables(rows: Sequence[Row]) -> str:
    """Seconds of layers that sleep, in brackets the share of the ideal; a table for each number of stages."""
    parts = []
    for stages in sorted({row["stages"] for row in rows}):
        own = [row for row in rows if row["stages"] == stages]
        counts = sorted({row["micro_batches"] for row in own})
        lines = [
            f"| {stages} stages | {' | '.join(f'M = {m}' for m in counts)} |",
            "|---|" + "---:|" * len(counts),
        ]
        for method in dict.fromkeys(row["method"] for row in own):
            cells = [f"{row['seconds']:.2f} s ({row['efficiency']:.3f})" for m in counts for row in _of(own, method, m)]
            lines.append(f"| `{method}` | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def memory_table(rows: Sequence[Row]) -> str:
    """KiB held for backward on each stage, of the most stages and micro-batches that were counted, of dense layers."""
    rows = [row for row in rows if row["workload"] == "dense"]
    stages, most = max(row["stages"] for row in rows), max(row["micro_batches"] for row in rows)
    own = [row for row in rows if (row["stages"], row["micro_batches"]) == (stages, most)]
    lines = [
        f"| KiB, M = {most} | {' | '.join(f'stage {stage}' for stage in range(stages))} |",
        "|---|" + "---:|" * stages,
    ]
    for method in dict.fromkeys(row["method"] for row in own):
        cells = [f"{row['peak_bytes'] / 1024:.1f}" for row in own if row["method"] == method]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def overhead_table(rows: Sequence[Row]) -> str:
    """What an engine costs per micro-batch and stage."""
    lines = [
        "| engine | stage | process, us (lowest to highest) | layers and losses alone | engine | on the clock "
        "| process / stock | engine / stock |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| `{row['method']}` | {row['stage']} | {row['cpu_us']:.0f} ({row['cpu_us_min']:.0f} to "
            f"{row['cpu_us_max']:.0f}) | {row['maths_us']:.0f} | {row['engine_us']:.0f} | {row['wall_us']:.0f} "
            f"| {row['cpu_share']:.2f} | {row['engine_share']:.2f} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def layer_tables(rows: Sequence[Row]) -> str:
    """What each layer costs, then what ``steps_per_batch`` saves: the whole model's time per micro-batch."""
    columns = {"forward_ms": "forward ms", "backward_ms": "backward ms", "step_ms": "step ms"}
    columns |= {"step_loop_ms": "step ms, not fused"}
    lines = [f"| model | layer | parameters | {' | '.join(columns.values())} | u |", "|---|---|" + "---:|" * 6]
    for row in rows:
        times = [*(f"{row[name]:.2f}" for name in columns), f"{row['u']:.3f}"]
        name = f"{row['layer']} `{row['name']}`"
        lines.append(f"| `{row['model']}` | {name} | {row['parameters']:,} | {' | '.join(times)} |")
    counts, most = (8, 4, 2, 1), 8
    lines += [
        "",
        f"All layers, ms per micro-batch, by optimizer steps in a batch of {most} micro-batches (in brackets, how much",
        "faster than a step after each):",
        "",
        f"| model | u | {' | '.join(f'`steps_per_batch` {n}' for n in counts)} |",
        "|---|---:|" + "---:|" * len(counts),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        maths, step = sum(r["forward_ms"] + r["backward_ms"] for r in own), sum(r["step_ms"] for r in own)
        spent = [maths + step * n / most for n in counts]
        cells = [f"{each:.2f} ({spent[0] / each:.2f}x)" for each in spent]
        lines.append(f"| `{model}` | {step / maths:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    return f"`{header['command']}`, {report.machine_and_versions(header)}"
