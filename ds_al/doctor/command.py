"""The ``doctor`` command: prints a table of findings; the exit code is 0 if training can start."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ds_al.doctor.abilities import abilities
from ds_al.doctor.finding import Finding, one_line
from ds_al.doctor.machine import compilation, machine, tools
from ds_al.doctor.software import IMPORT_FAILS, software
from ds_al.figures.terminal import Console

_STYLES: dict[str, str] = {"ok": "green", "limited": "yellow", "no": "red"}


def add_command(commands: Any) -> None:
    """Adds ``doctor`` to the sub-parsers of ``python -m ds_al``."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed and what will work on this machine",
        description="Exits with 1 where something essential is missing or out of range, else with 0.",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file")
    parser.set_defaults(run=lambda args: run(args.json))


def run(json_path: Path | None = None) -> int:
    """Prints the table, writes the findings to ``json_path`` if given, and returns the exit code."""
    with _quiet():
        rows = examine()
    _print(rows)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return exit_code(rows)


def exit_code(rows: list[Finding]) -> int:
    """Returns 1 if the status of an essential finding is ``no``, else 0."""
    return int(any(row.essential and row.status == "no" for row in rows))


def examine() -> list[Finding]:
    """Returns all findings, top to bottom. Those that need PyTorch or DeepSpeed are omitted if these cannot be
    imported."""
    rows = software()
    if any(row.value == IMPORT_FAILS for row in rows):
        return rows + tools()
    import torch
    from deepspeed.accelerator import get_accelerator

    try:
        accelerator = get_accelerator()
    except Exception as error:  # DS_ACCELERATOR names an accelerator that is not available
        remark = f"{one_line(error)}. Correct or unset DS_ACCELERATOR"
        return [*rows, Finding("machine", "accelerator", "none", "no", remark, essential=True), *tools()]
    return [*rows, *machine(accelerator), *tools(), *compilation(accelerator), *abilities(accelerator, torch)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences log messages and warnings of libraries during their import and use."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _print(rows: list[Finding]) -> None:
    table = Table("item", "value", "status", "remark", box=box.SIMPLE_HEAD)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        status = Text(row.status, _STYLES[row.status])
        ends = following is not None and following.group != row.group
        table.add_row(row.item, row.value, status, row.remark, end_section=ends)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    broken = [row.item for row in rows if row.essential and row.status == "no"]
    if broken:
        console.print(f"Not ready to train: {', '.join(broken)}", style="red")
    else:
        console.print("Ready to train.", style="green")
