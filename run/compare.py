"""Compares the accuracy and time of methods on the same network, data and budget.

    python run/compare.py --suite ds_configs/suites/small.yaml --seeds 3 --json docs/results/small.json

Writes JSON, and next to it CSV, Markdown tables and a figure per group. Finished runs are saved, so the same command
resumes a stopped sweep; --minutes ends a sitting in time, and the time that is left is told before and after it.
--groups, --methods and --only-seeds select the runs to execute; the tables contain all finished runs of the sweep. For
a sweep with trials, the output is the best trial of each method by validation accuracy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_al.errors import ALError
from ds_al.figures.terminal import Console
from ds_al.studies.sweep.arguments import TRAIN, add_sweep
from ds_al.studies.sweep.output import Output
from ds_al.studies.sweep.sitting import Sitting
from ds_al.system.arguments import output_file


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sweep(p, json="results file; runs are saved next to it")
    p.add_argument(
        "--runs", "--cells", metavar="FILE", type=Path,
        help="file of finished runs, NAME.runs.jsonl (default: next to PATH); sweeps that use the same file share "
        "their common runs",
    )  # fmt: skip
    p.add_argument(
        "--methods", default="",
        help="only these methods, comma-separated: methods of the sweep, or any other schedule, objective, recipe or "
        "baseline (bp_1f1b, bp_gpipe, bp_naive, bp_zb_h1, bp_zb_h2, bp_dualpipev, bp_dp, bp_async, bp_single)",
    )  # fmt: skip
    p.add_argument(
        "--only-seeds", metavar="SEEDS", type=lambda text: [int(seed) for seed in text.split(",")],
        help="only runs of these seeds, comma-separated, such as 1,2",
    )  # fmt: skip
    p.add_argument(
        "--page", metavar="PATH", type=output_file,
        help="also write a page of what to decide by, and beside it NAME_groups.md with all tables and figures",
    )  # fmt: skip
    p.add_argument("--table-only", action="store_true", help="run nothing; write the tables of the stored runs")
    return p


def main() -> None:
    """Runs the sweep and writes its tables."""
    args, console = parser().parse_args(), Console()

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    try:
        sweep = Output.of(
            args.suite,
            seeds=args.seeds,
            json=args.json,
            runs=args.runs,
            methods=args.methods,
            assignments=args.assignments,
        )
        for group in sweep.waits:
            tell(f"{group}: waits for settings to be chosen, or for its budget")
        if not args.table_only:
            _run(sweep, args, console)
        results = sweep.results()
        for each in (result for result in results if "failure" in result):
            print(f"failed: {each['group']}, {each['suite_method']}, K = {each['K']}: {each['failure']}")
        if not (results or args.page):
            sys.exit("error: there is no result yet")
        tell(sweep.write_choice(results) if sweep.chooses else sweep.write_tables(results, page=args.page, tell=tell))
    except ALError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if any("failure" in result for result in results) else 0)


def _run(sweep: Output, args: argparse.Namespace, console: Console) -> None:
    todo = [
        run for run in sweep.every
        if args.groups in run.group and (not sweep.methods or run.method in sweep.methods)
        and (args.only_seeds is None or run.seed in args.only_seeds)
    ]  # fmt: skip
    if not todo:
        sys.exit("error: no run is left: look at --groups, --methods and --only-seeds")
    Sitting(sweep.file, TRAIN, args.data, args.jobs, args.timeout, args.minutes, console).work(todo)


if __name__ == "__main__":
    main()
