"""Finds the budget of each group of a suite: the epochs after which back-propagation hardly gains by a quarter more.

    python run/budgets.py --suite long --seeds 3 --json docs/results/budgets.json

The twin alone is trained at the growing numbers of epochs that each group lists as `budgets`, and judged on validation
samples. Finished trials are saved, so the same command resumes a stopped search; the JSON has the rule, every trial,
and the budgets of the groups that are settled, which run/compare.py then uses.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from ds_al.errors import ALError
from ds_al.studies.bench.arguments import positive
from ds_al.studies.results import header, write
from ds_al.studies.runs import RunFile
from ds_al.studies.sweep.budget import RULE, Budgets
from ds_al.studies.sweep.runner import is_done
from ds_al.studies.sweep.sitting import Sitting
from ds_al.studies.sweep.spec import read_sweep
from ds_al.system.arguments import more_than_zero, output_file

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = ROOT / "ds_configs" / "suites"


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", required=True, help="path of the sweep file, or its name in ds_configs/suites")
    p.add_argument("--seeds", type=positive, default=3, help="number of seeds, starting at 0 (default: 3)")
    p.add_argument(
        "--json", metavar="PATH", type=output_file, required=True, help="file of budgets; trials are saved next to it"
    )
    p.add_argument("--groups", default="", help="only groups whose name contains this text")
    p.add_argument(
        "--set", dest="assignments", metavar="KEY=VALUE", action="append", default=[],
        help="set a config key for all trials; may be repeated",
    )  # fmt: skip
    p.add_argument(
        "--data", metavar="DIR", type=Path, default=os.environ.get("DS_AL_DATA"),
        help="root folder of the sweep's data paths (default: $DS_AL_DATA, else the working directory)",
    )  # fmt: skip
    p.add_argument("--jobs", type=positive, help="number of concurrent runs (default: one process per core)")
    p.add_argument(
        "--timeout", type=more_than_zero, default=3600.0, help="time limit of a run in seconds (default: 3600)"
    )
    p.add_argument("--minutes", type=more_than_zero, help="start no trial that would not end within this time")
    return p


def main() -> None:
    """Runs the trials, and writes the budgets."""
    args, console = parser().parse_args(), Console()
    path = Path(args.suite) if Path(args.suite).suffix else SWEEPS / f"{args.suite}.yaml"
    file = RunFile.beside(args.json)
    begin = time.monotonic()
    try:
        budgets = Budgets(
            read_sweep(path), path.parent, seeds=args.seeds, groups=args.groups, assignments=args.assignments
        )
        if not budgets.trials:
            sys.exit("error: no group with `budgets` is left: look at --groups")
        while todo := budgets.next(file.read()):
            minutes = None if args.minutes is None else args.minutes - (time.monotonic() - begin) / 60
            if minutes is not None and minutes <= 0:
                break
            before = sum(is_done(run, file.read()) for run in todo)
            Sitting(file, ROOT / "run" / "train.py", args.data, args.jobs, args.timeout, minutes, console).work(todo)
            if sum(is_done(run, file.read()) for run in todo) == before:
                break  # all that were left have failed, or none fits into the time
        rows = budgets.rows(file.read())
    except ALError as error:
        sys.exit(f"error: {error}")
    if not rows:
        sys.exit("no group is settled yet: the same command goes on from here")
    settings = {"suite": args.suite, "seeds": args.seeds, "rule": RULE}
    write(args.json, kind="budgets", header=header(**settings), rows=rows, as_csv=False)
    for row in rows:
        tried = ", ".join(f"{epochs}: {100 * accuracy:.2f}" for epochs, accuracy in row["tried"].items())
        told = "" if row["settled"] else " (the largest tried; the twin still gains)"
        console.print(f"{row['group']}: {row['epochs']} epochs{told}; validation accuracy at {tried}", soft_wrap=True)


if __name__ == "__main__":
    main()
