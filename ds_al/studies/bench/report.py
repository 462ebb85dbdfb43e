"""What a measurement leaves behind: JSON with a header, CSV beside it, tables for the terminal and for docs."""

from __future__ import annotations

import csv
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ds_al.system import provenance

_PACKAGES = ("ds_al", "torch", "deepspeed")

Row = Mapping[str, Any]


def header(**settings: Any) -> dict[str, Any]:
    """Date, command, machine, versions, and the settings of a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": provenance.command(),
        "machine": {"cores": os.cpu_count(), "cpu": provenance.cpu(), "system": platform.system()},
        "versions": {**{name: provenance.version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "settings": settings,
    }


def machine_and_versions(header: Row) -> str:
    """When, where and with what a measurement was taken, as a line of text."""
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    return f"{header['date']}, {machine['cores']} cores ({machine['cpu']}), {versions}."


def write(path: Path, *, header: Row, rows: Sequence[Row]) -> None:
    """Writes ``{"header": ..., "rows": [...]}`` to a JSON file, and the rows to a CSV file of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sleeping_table(rows: Sequence[Row]) -> Table:
    """Seconds beside the ideal, for the terminal."""
    table = Table(title="sleeping layers: seconds of all batches of M micro-batches", title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("stages", "M", "seconds", "spread", "ideal", "efficiency"):
        table.add_column(column, justify="right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if before and (before["stages"], before["micro_batches"]) != (row["stages"], row["micro_batches"]):
            table.add_section()
        table.add_row(
            row["method"],
            str(row["stages"]),
            str(row["micro_batches"]),
            f"{row['seconds']:.3f}",
            f"{row['seconds_min']:.3f}..{row['seconds_max']:.3f}",
            f"{row['ideal']:.3f}",
            f"{row['efficiency']:.3f}",
        )
    return table


def overhead_table(rows: Sequence[Row]) -> Table:
    """Microseconds per micro-batch, for the terminal."""
    table = Table(
        title="microseconds of a stage per micro-batch that computes nothing",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns = {"stage": "stage", "cpu_us": "cpu", "wall_us": "clock", "maths_us": "maths", "engine_us": "engine"}
    for column in ("method", *columns.values(), "cpu/stock", "engine/stock"):
        table.add_column(column, no_wrap=True, justify="left" if column == "method" else "right")
    for row in rows:
        shares = ["" if row[name] is None else f"{row[name]:.2f}" for name in ("cpu_share", "engine_share")]
        cells = [f"{row[name]:.0f}" if name != "stage" else str(row[name]) for name in columns] + shares
        table.add_row(row["method"], *cells, end_section=row["stage"] == "mean")
    return table


def memory_table(rows: Sequence[Row]) -> Table:
    """Held bytes of the fullest stage, for the terminal."""
    rows = [row for row in rows if row["workload"] == "dense"]
    counts = sorted({row["micro_batches"] for row in rows})
    table = Table(title="KiB held for backward on the fullest stage, by micro-batches", title_justify="left")
    table.add_column("method")
    for column in ("stages", *map(str, counts)):
        table.add_column(column, justify="right")
    for method, stages, cells in _fullest(rows, counts):
        table.add_row(method, str(stages), *cells)
    return table


def profile_table(rows: Sequence[Row]) -> Table:
    """Where the time went, stage by stage, in percent, for the terminal."""
    table = Table(
        title="percent of the time, by stage", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("method", no_wrap=True)
    shares = {
        "busy": "busy",
        "wait_input": "input",
        "wait_queue": "queue",
        "wait_data": "data",
        "wait_barrier": "all",
        "drained": "done",
        "other": "other",
        "bubble": "bubble",
        "bubble_formula": "formula",
    }
    for column in ("M", "stage", *shares.values()):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{100 * row[column]:.{1 if column.startswith('bubble') else 0}f}" for column in shares]
        end = row["stage"] == row["stages"] - 1
        table.add_row(row["method"], str(row["micro_batches"]), str(row["stage"]), *cells, end_section=end)
    table.caption = "waits: for input, a place in the queue, data, all stages; done: while later stages were not"
    table.caption_justify = "left"
    return table


def memory_markdown(header: Row, rows: Sequence[Row]) -> str:
    """``docs/memory.md``."""
    recomputed = [row for row in rows if row["workload"] == "transformer"]
    rows = [row for row in rows if row["workload"] == "dense"]
    counts = sorted({row["micro_batches"] for row in rows})
    most_stages, most = max(row["stages"] for row in rows), counts[-1]
    settings = header["settings"]
    lines = [
        "# Memory held for the backward pass",
        "",
        "What autograd keeps of the forward passes until their backward passes, counted on every stage at its",
        "fullest during one batch: bytes of distinct storages, without parameters. Each stage holds one layer,",
        f"Linear-ReLU-Linear-ReLU of width {settings['width']}; a micro-batch has {settings['micro_batch']} samples.",
        "For `streaming` this includes the bridge, the target side and both local losses. Message buffers outside",
        "the graph are not part of it; there are at most `queue_depth` of them for sending and `receive_slots` for",
        "receiving.",
        "",
        "`streaming` holds one micro-batch, `bp_1f1b` min(stages - stage, micro-batches), `bp_gpipe` all of them.",
        "",
        "## KiB on the fullest stage, by number of micro-batches",
        "",
        f"| method | stages | {' | '.join(map(str, counts))} |",
        f"|---|---:|{'---:|' * len(counts)}",
        *(f"| `{method}` | {stages} | {' | '.join(cells)} |" for method, stages, cells in _fullest(rows, counts)),
        "",
        f"## KiB (tensors) on each of {most_stages} stages, {most} micro-batches",
        "",
        f"| method | {' | '.join(f'stage {stage}' for stage in range(most_stages))} |",
        f"|---|{'---:|' * most_stages}",
        *(
            f"| `{method}` | {' | '.join(cells)} |"
            for method, cells in _by_stage(rows, stages=most_stages, micro_batches=most)
        ),
        "",
        "## With activation checkpointing",
        "",
        '`"pipeline": {"activation_checkpoint_interval": n}`: n blocks of an f are run again in its local backward,',
        "and only what enters them is kept until then; 0 keeps all. One stage with all blocks of a Transformer (an",
        "embedding and encoder layers, preset `small`, 64 tokens), grouped into AL layers: KiB at the fullest, in",
        "brackets the share of what is held without. Weights and buffers stay the same in every bit; the price is one",
        "more forward of f per micro-batch.",
        "",
        *recomputed_lines(recomputed),
        "",
        "How blocks are grouped into layers hardly matters, since all layers of a stage run forward before the first",
        "goes back. With one block per layer, intervals above 1 change nothing.",
        "",
        "## How it was measured",
        "",
        f"    {header['command']}",
        "",
        machine_and_versions(header),
    ]
    return "\n".join(lines) + "\n"


def recomputed_lines(rows: Sequence[Row]) -> list[str]:
    """A table by number of layers and interval."""
    intervals = list(dict.fromkeys(row["checkpoint_interval"] for row in rows))
    peaks = {(row["layers"], row["checkpoint_interval"]): row["peak_bytes"] for row in rows}
    lines = [f"| AL layers | {' | '.join(f'interval {n}' for n in intervals)} |", "|---:|" + "---:|" * len(intervals)]
    for layers in dict.fromkeys(row["layers"] for row in rows):
        plain = peaks[layers, 0]
        cells = [f"{peaks[layers, n] / 1024:,.0f} ({peaks[layers, n] / plain:.2f})" for n in intervals]
        lines.append(f"| {layers} | {' | '.join(cells)} |")
    return lines


def layers_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of each layer, for the terminal."""
    table = Table(title="milliseconds of a layer per micro-batch, and u", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("model", "layer", "f", "forward", "backward", "step", "step, not fused", "u"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("model", "f") else "right")
    for row in rows:
        times = [f"{row[name]:.2f}" for name in ("forward_ms", "backward_ms", "step_ms", "step_loop_ms")]
        table.add_row(row["model"], str(row["layer"]), row["name"], *times, f"{row['u']:.3f}")
    return table


def _fullest(rows: Sequence[Row], counts: Sequence[int]) -> list[tuple[str, int, list[str]]]:
    table = []
    for method, stages in dict.fromkeys((row["method"], row["stages"]) for row in _by_method(rows)):
        case = [row for row in rows if (row["method"], row["stages"]) == (method, stages)]
        peaks = [max(row["peak_bytes"] for row in case if row["micro_batches"] == m) for m in counts]
        table.append((method, stages, [f"{peak / 1024:.1f}" for peak in peaks]))
    return table


def _by_stage(rows: Sequence[Row], *, stages: int, micro_batches: int) -> list[tuple[str, list[str]]]:
    case = [row for row in rows if (row["stages"], row["micro_batches"]) == (stages, micro_batches)]
    return [
        (method, [f"{row['peak_bytes'] / 1024:.1f} ({row['peak_tensors']})" for row in case if row["method"] == method])
        for method in dict.fromkeys(row["method"] for row in case)
    ]


def _by_method(rows: Sequence[Row]) -> list[Row]:
    order = list(dict.fromkeys(row["method"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["method"]), row["stages"]))
