"""Writes the frontier: accuracy over time per sample and over memory per stage, for K = 1, 2, 4, 8 and the rivals.

    python run/frontier.py --accuracy docs/results/frontier.json --dial docs/results/dial.json \\
        --json docs/results/frontier_points.json --figure docs/figures/frontier.png

Nothing is trained or timed: accuracies are those of a finished sweep (run/compare.py --suite frontier), times those of
run/bench.py --dial, labelled measured, and of the planner for the network of the sweep, labelled so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_al.errors import ALError
from ds_al.figures.terminal import Console
from ds_al.studies.bench.arguments import numbers, positive
from ds_al.studies.frontier.picture import draw_frontier
from ds_al.studies.frontier.points import frontier
from ds_al.studies.results import header, read, write
from ds_al.studies.sweep.over_layers import Accuracies
from ds_al.studies.sweep.spec import read_sweep, runs_of
from ds_al.studies.tables.documents import show
from ds_al.system.arguments import output_file

SUITE = Path(__file__).resolve().parents[1] / "ds_configs" / "suites" / "frontier.yaml"


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--accuracy", metavar="JSON", type=Path, required=True, help="results of the sweep")
    add("--suite", metavar="YAML", type=Path, default=SUITE, help="the sweep, for the network (default: frontier.yaml)")
    add("--group", metavar="TEXT", default="", help="group with this text in its name (default: the first)")
    add("--dial", metavar="JSON", type=Path, help="measured times; without, those of the planner alone")
    add("--stages", type=positive, default=8, help="P (default: 8)")
    add("--micro-batches", type=numbers, default=(8,), help="M, a panel of times for each (default: 8)")
    add("--json", metavar="PATH", type=output_file, required=True, help="write the points to PATH, and a CSV file")
    add("--figure", metavar="PATH", type=output_file, help="draw them to PATH (PNG and SVG)")
    return p


def main() -> None:
    """Writes points and picture."""
    args, console = parser().parse_args(), Console()
    try:
        known = Accuracies.of(read(args.accuracy).rows, group=args.group)
        runs = runs_of(read_sweep(args.suite), folder=args.suite.parent, seeds=1)
        config = next((run.config for run in runs if (run.group, run.method) == (known.group, known.best)), None)
        if config is None:
            sys.exit(f"error: {args.suite} has no group {known.group!r} with {known.best!r}: give --suite")
        measured = read(args.dial) if args.dial else None
        rows = frontier(known, measured, config, stages=args.stages, micro_batches=args.micro_batches)
    except ALError as error:
        sys.exit(f"error: {error}")
    show(console, "frontier", rows)
    settings = {"group": known.group, "method": known.best, "seeds": known.twin["seeds"]}
    write(args.json, kind="frontier", header=header(**settings), rows=rows)
    if args.figure:
        for path in draw_frontier(rows, args.figure, title=f"{known.group}, {known.twin['seeds']} seeds"):
            console.print(f"{path}", highlight=False)


if __name__ == "__main__":
    main()
