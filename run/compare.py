"""Compares methods: same network, same data, same budget; accuracy and time of the same runs.

    python run/compare.py --suite ds_configs/suites/small.yaml --seeds 3 --json docs/results/small.json

Writes JSON, and beside it CSV, tables in Markdown and a picture per group. May be stopped and started again: what
is done stays done. --groups and --methods say what is run; the tables hold all there is of the suite. Of a suite with
trials it writes which of them is the best of each method, by validation accuracy.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ds_al.errors import ALError
from ds_al.launch.ranks import start_quickly
from ds_al.studies.figures import draw_group
from ds_al.studies.results import header, write
from ds_al.studies.runs import RunFile
from ds_al.studies.sweep.choice import choose
from ds_al.studies.sweep.exits import exit_table
from ds_al.studies.sweep.page import results_page
from ds_al.studies.sweep.runner import is_done, result_of, run_cells
from ds_al.studies.sweep.suite import Cell, Suite, cells, read_suite, waiting, with_methods
from ds_al.studies.sweep.table import rows
from ds_al.studies.tables import sweep as tables
from ds_al.studies.tables.write import document

ROOT = Path(__file__).resolve().parents[1]
SUITES = ROOT / "ds_configs" / "suites"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", required=True, help="path of a suite, or the name of one of ds_configs/suites")
    p.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on (default: 3)")
    p.add_argument("--json", metavar="PATH", type=Path, required=True, help="where the results go; runs beside it")
    p.add_argument(
        "--runs", "--cells", metavar="FILE", type=Path,
        help="file of finished runs, NAME.runs.jsonl (default: beside PATH); suites that share it share the runs that "
        "they have in common",
    )  # fmt: skip
    p.add_argument("--groups", help="only groups whose name contains this text")
    p.add_argument(
        "--methods",
        help="only these methods, separated by commas: those of the suite, or any schedule, objective, recipe or "
        "baseline (bp_1f1b, bp_gpipe, bp_naive, bp_dp, bp_single) that it has not",
    )
    p.add_argument(
        "--data", metavar="DIR", type=Path, default=os.environ.get("DS_AL_DATA"),
        help="folder that the suite's data paths start from (default: $DS_AL_DATA, else the working directory)",
    )  # fmt: skip
    p.add_argument("--jobs", type=int, help="cells at a time (default: as many as there are cores for)")
    p.add_argument("--timeout", type=float, default=3600.0, help="seconds after which a cell has failed (3600)")
    p.add_argument("--page", metavar="PATH", type=Path, help="also writes a page: tables, pictures, what is missing")
    p.add_argument("--table-only", action="store_true", help="run nothing; write the tables of what is there")
    return p


def main() -> None:
    """Runs the suite."""
    args = parser().parse_args()
    path = Path(args.suite)
    if not path.suffix:
        path = SUITES / f"{args.suite}.yaml"
    console = Console()
    try:
        suite = read_suite(path)
        with_methods(suite, args.methods.split(",") if args.methods else ())
        every = list(cells(suite, folder=path.parent, seeds=args.seeds))
        todo = [cell for cell in every if _selected(cell, args)]
        waits = waiting(suite, path.parent)
        runs = RunFile(args.runs) if args.runs else RunFile.beside(args.json)
        runs.read()
    except ALError as error:
        sys.exit(f"error: {error}")
    for group in waits:
        console.print(f"{group}: waits for settings to be chosen", highlight=False, soft_wrap=True)
    if not args.table_only:
        if not todo:
            sys.exit("error: no cell is left: look at --groups and --methods")
        try:
            _run(todo, runs, args, console)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    found = runs.read()
    results = [result for cell in every if (result := result_of(cell, found)) is not None]
    _tell_failures(results)
    if any(group.trials or group.own_trials for group in suite.groups):
        _write_choice(results, suite, args, console)
    elif results or args.page:
        _write_tables(results, every, waits, suite, found, args, console)
    else:
        sys.exit("error: there is no result yet")
    sys.exit(1 if any("failure" in result for result in results) else 0)


def _write_tables(
    results: list[dict[str, Any]],
    every: list[Cell],
    waits: list[str],
    suite: Suite,
    found: dict[str, Any],
    args: argparse.Namespace,
    console: Console,
) -> None:
    """Tables, pictures and the page, of all cells that are there."""
    table, exits, about = rows(results), exit_table(results), header(suite=suite.name, seeds=args.seeds)
    text = document(*tables.sweep(table))
    if table:
        write(args.json, kind="sweep", header=about, rows=table)
        args.json.with_suffix(".md").write_text(text)
    if exits:
        write(args.json.with_suffix(".exits.json"), kind="exits", header=about, rows=exits)
    pictures: dict[str, Path] = {}
    for number, group in enumerate((group.name for group in suite.groups), start=1):
        own = [result for result in results if result["group"] == group]
        for file in draw_group(own, args.json.with_name(f"{args.json.stem}-{number}.png")):
            console.print(f"{group}: {file}", highlight=False, soft_wrap=True)
            pictures.setdefault(group, file)
    if args.page:
        done = [is_done(cell, found) for cell in every]
        page = results_page(
            every,
            done,
            waits=waits,
            results=results,
            table=table,
            exits=exits,
            pictures=pictures,
            header=about,
            seeds=args.seeds,
            page=args.page,
        )
        args.page.write_text(page)
    console.print(text, highlight=False, soft_wrap=True)


def _tell_failures(results: list[dict[str, Any]]) -> None:
    for result in results:
        if "failure" in result:
            print(f"failed: {result['group']}, {result['suite_method']}, K = {result['K']}: {result['failure']}")


def _write_choice(results: list[dict[str, Any]], suite: Suite, args: argparse.Namespace, console: Console) -> None:
    """Of a suite of trials: what was tried and what is chosen, by validation accuracy alone."""
    found = choose(results, suite)
    if not found:
        sys.exit("error: no method has all of its trials yet: nothing is chosen")
    text = document(*tables.trials(found))
    write(args.json, kind="trials", header=header(suite=suite.name, seeds=args.seeds), rows=found, as_csv=False)
    args.json.with_suffix(".md").write_text(text)
    console.print(text, highlight=False, soft_wrap=True)


def _selected(cell: Cell, args: argparse.Namespace) -> bool:
    methods = None if args.methods is None else args.methods.split(",")
    return (args.groups is None or args.groups in cell.group) and (methods is None or cell.method in methods)


def _run(todo: list[Cell], runs: RunFile, args: argparse.Namespace, console: Console) -> None:
    from deepspeed.accelerator import get_accelerator  # imports all of DeepSpeed

    forks = get_accelerator().device_name() == "cpu"  # a fork cannot take over an accelerator
    if forks:
        start_quickly()
    found = runs.read()
    left = [cell for cell in todo if not is_done(cell, found)]
    jobs = args.jobs or max(1, (os.cpu_count() or 1) // max((cell.stages for cell in left), default=1))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("starting", total=len(todo), completed=len(todo) - len(left))

        def done(cell: Cell, result: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=cell.title)
            console.print(f"{cell.title}: {_outcome(result)}", highlight=False, soft_wrap=True)

        run_cells(
            left,
            runs=runs,
            script=None if forks else ROOT / "run" / "train.py",
            data=None if args.data is None else Path(args.data).resolve(),
            jobs=jobs,
            timeout=args.timeout,
            done=done,
        )


def _outcome(result: dict[str, Any]) -> str:
    if "failure" in result:
        return "failed"
    part = "validation" if result["test_accuracy"] is None else "test"
    return f"{part} accuracy {result[f'{part}_accuracy'][-1]:.4f}"


if __name__ == "__main__":
    main()
