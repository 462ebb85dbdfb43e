"""Declares the tables of the study on one GPU."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.figures.parts import Table
from ds_al.studies.results import Row
from ds_al.studies.tables.parts import cell, in_cells
from ds_al.studies.tables.write import Template, number


def engines(rows: Sequence[Row]) -> Table:
    """Returns the processor time of a micro-batch whose layers compute nothing."""
    columns: dict[str, Template] = {
        "engine": lambda row: f"`{row['engine']}`" + (f": {cell(row['failure'])}" if row["failure"] else ""),
        "CPU µs per micro-batch": number("cpu_us", ".0f"),
        "least": number("cpu_us_min", ".0f"),
        "most": number("cpu_us_max", ".0f"),
        "of which layers and losses": number("maths_us", ".0f"),
        "of which engine": number("engine_us", ".0f"),
    }
    return in_cells(rows, columns)


def networks(rows: Sequence[Row]) -> Table:
    """Returns one line per network and form; of a network that failed the reason."""
    columns: dict[str, Template] = {
        "network": "`{network}`",
        "form": lambda row: cell(row["failure"]) or row["form"] + (f", K = {row['layers']}" if row["layers"] else ""),
        "samples": number("samples", "d"),
        "ms": lambda row: "-" if row["failure"] else f"{row['ms']:.2f} ({row['ms_min']:.2f} to {row['ms_max']:.2f})",
        "rho": number("rho", ".3f"),
        "rho by operations": number("rho_by_flops", ".3f"),
        "CPU ms": number("cpu_ms", ".2f"),
        "kernels": number("kernels", ".0f"),
        "GPU ms": number("device_ms", ".2f"),
        "GPU busy": number("busy", ".0f", unit=" %", times=100),
        "peak MiB": number("peak_bytes", ",.0f", times=2**-20),
        "counted MiB": number("counted_bytes", ",.0f", times=2**-20),
    }
    return in_cells(rows, columns)


def accuracy(rows: Sequence[Row]) -> Table:
    """Returns one line per run; of a run that failed the reason."""
    columns: dict[str, Template] = {
        "network": "`{network}`",
        "form": lambda row: "twin" if row["K"] is None else f"AL, K = {row['K']}",
        "samples": number("samples", ",d"),
        "batch": lambda row: (
            "-" if row["failure"] else f"{row['micro_batches']} x {row['batch'] // row['micro_batches']}"
        ),
        "epochs": number("epochs", "d"),
        "s per epoch": number("seconds_per_epoch", ".1f"),
        "validation accuracy, %": lambda row: cell(row["failure"]) or f"{100 * row['validation_accuracy'][-1]:.2f}",
        "test accuracy, %": number("test_accuracy", ".2f", times=100),
    }
    return in_cells(rows, columns)
