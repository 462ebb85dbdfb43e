"""Finds the budget of each group of a suite: the epochs after which back-propagation hardly gains by a quarter more.

    python run/budgets.py --suite long --seeds 3 --json docs/results/budgets.json

The twin alone is trained at the growing numbers of epochs that each group lists as `budgets`, and judged on validation
samples. Finished trials are saved, so the same command resumes a stopped search; the JSON has the rule, every trial,
and the budgets of the groups that are settled, which run/compare.py then uses.
"""

from __future__ import annotations

import argparse
import sys
import time

from ds_al.errors import ALError
from ds_al.figures.terminal import Console
from ds_al.studies.results import header, write
from ds_al.studies.runs import RunFile
from ds_al.studies.sweep.arguments import TRAIN, add_sweep
from ds_al.studies.sweep.budget import RULE, Budgets
from ds_al.studies.sweep.runner import is_done
from ds_al.studies.sweep.sitting import Sitting
from ds_al.studies.sweep.spec import read_sweep


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sweep(p, json="file of budgets; trials are saved next to it")
    p.add_argument("--table-only", action="store_true", help="run nothing; write the budgets of the stored trials")
    return p


def main() -> None:
    """Runs the trials, and writes the budgets."""
    args, console = parser().parse_args(), Console()
    file = RunFile.beside(args.json)
    begin = time.monotonic()
    try:
        budgets = Budgets(
            read_sweep(args.suite), args.suite.parent, seeds=args.seeds, assignments=args.assignments
        )  # fmt: skip
        if not any(args.groups in group for group in budgets.trials):
            sys.exit("error: no group with `budgets` is left: look at --groups")
        while not args.table_only and (todo := budgets.next(file.read(), groups=args.groups)):
            minutes = None if args.minutes is None else args.minutes - (time.monotonic() - begin) / 60
            if minutes is not None and minutes <= 0:
                break
            before = sum(is_done(run, file.read()) for run in todo)
            Sitting(file, TRAIN, args.data, args.jobs, args.timeout, minutes, console).work(todo)
            if sum(is_done(run, file.read()) for run in todo) == before:
                break  # all that were left have failed, or none fits into the time
        found = file.read()
        rows = budgets.rows(found)
    except ALError as error:
        sys.exit(f"error: {error}")
    if not rows:
        sys.exit("no group is settled yet: the same command goes on from here")
    about = header(runs=found.values(), suite=args.suite.stem, seeds=args.seeds, rule=RULE)
    write(args.json, kind="budgets", header=about, rows=rows, as_csv=False)
    for row in rows:
        tried = ", ".join(f"{epochs}: {100 * accuracy:.2f}" for epochs, accuracy in row["tried"].items())
        told = "" if row["settled"] else " (the largest tried; the twin still gains)"
        console.print(f"{row['group']}: {row['epochs']} epochs{told}; validation accuracy at {tried}", soft_wrap=True)


if __name__ == "__main__":
    main()
