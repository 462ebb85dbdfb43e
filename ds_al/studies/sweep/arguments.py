"""Arguments of the commands that train the runs of a sweep: run/compare.py and run/budgets.py."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ds_al.studies.bench.arguments import positive
from ds_al.system.arguments import more_than_zero, output_file

ROOT = Path(__file__).resolve().parents[3]
SWEEPS = ROOT / "ds_configs" / "suites"
TRAIN = ROOT / "run" / "train.py"


def add_sweep(parser: argparse.ArgumentParser, *, json: str) -> None:
    """Adds which runs there are, and how they are executed.

    Args:
        parser: the parser.
        json: help of ``--json``.
    """
    add = parser.add_argument
    add(
        "--suite", "--sweep", dest="suite", required=True, type=sweep_file, metavar="SUITE",
        help="path of the sweep file, or its name in ds_configs/suites",
    )  # fmt: skip
    add("--seeds", type=positive, default=3, help="number of seeds, starting at 0 (default: 3)")
    add("--json", metavar="PATH", type=output_file, required=True, help=json)
    add("--groups", default="", help="only groups whose name contains this text")
    add(
        "--minutes", type=more_than_zero,
        help="start no run that would not end within this time, by the time of finished runs; the rest is left for the "
        "same command another time",
    )  # fmt: skip
    add(
        "--set", dest="assignments", metavar="KEY=VALUE", action="append", default=[],
        help="set a config key for all runs, such as experiment.epochs=4; may be repeated",
    )  # fmt: skip
    add(
        "--data", metavar="DIR", type=Path, default=os.environ.get("DS_AL_DATA"),
        help="root folder of the sweep's data paths (default: $DS_AL_DATA, else the working directory)",
    )  # fmt: skip
    add("--jobs", type=positive, help="number of concurrent runs (default: one process per core)")
    add("--timeout", type=more_than_zero, default=3600.0, help="time limit of a run in seconds (default: 3600)")


def sweep_file(text: str) -> Path:
    """Returns the path of a sweep file, of which the text is the path or the name in ds_configs/suites."""
    return Path(text) if Path(text).suffix else SWEEPS / f"{text}.yaml"
