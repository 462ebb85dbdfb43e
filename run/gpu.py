"""Tests and measures on one GPU, within ten minutes, and writes a page of it.

    python run/gpu.py --json docs/results/gpu.json --page docs/gpu.md

Finished parts are kept in the results file; the same command continues with the others. --page-only runs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ds_al.studies.gpu import packages

ROOT = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results, page = ROOT / "docs/results/gpu.json", ROOT / "docs/gpu.md"
    p.add_argument("--json", metavar="PATH", type=Path, default=results, help="results file (docs/results/gpu.json)")
    p.add_argument("--page", metavar="PATH", type=Path, default=page, help="page of the results (docs/gpu.md)")
    p.add_argument("--minutes", type=minutes, default=9.0, help="time of all parts together (default: 9)")
    p.add_argument("--accuracy-minutes", type=minutes, default=5.0, help="time of all trainings together (default: 5)")
    p.add_argument("--data-path", metavar="DIR", help="folder of CIFAR-10, with train and test parquet files")
    p.add_argument("--dry-run", action="store_true", help="run and write nothing; say what would run, what is missing")
    p.add_argument("--page-only", action="store_true", help="run nothing; write the page of the results that are there")
    return p


def minutes(text: str) -> float:
    """Parses a positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}: expected a number of minutes above 0")
    return value


def main() -> None:
    """Runs the parts that are not finished, and writes the page."""
    args = parser().parse_args()
    if not args.page_only:
        missing = packages.missing(packages.needed(ROOT))
        machine = None if "torch" in missing else _machine()
        if missing and (machine is not None or "torch" in missing or args.dry_run):
            sys.exit(packages.remedy(missing, ROOT))
        if args.dry_run:
            return _explain(args, machine or {})
        if machine is None:
            return
        _measure(args, machine)
    unfinished = _write(args)
    print(f"{args.page} was written" + "".join(f"\n{line}" for line in unfinished))
    sys.exit(1 if unfinished else 0)


def _machine() -> dict[str, Any] | None:
    """Returns the facts of the GPU; says so where there is none."""
    from ds_al.studies.gpu.machine import gpu

    machine = gpu()
    if machine is None:
        print("PyTorch finds no NVIDIA GPU here: nothing was run, and nothing was written")
    return machine


def _explain(args: argparse.Namespace, machine: dict[str, Any]) -> None:
    from ds_al.studies.gpu.study import data_path, study
    from ds_al.studies.parts import plan

    data = data_path(args.data_path)
    print(f"CIFAR-10: {data or 'not found, give --data-path'}")
    parts = study(data=data, accuracy_minutes=args.accuracy_minutes)
    for part, seconds in plan(parts, path=args.json, minutes=args.minutes, machine=machine):
        print(f"{part.title}: {'done' if seconds is None else f'at most {seconds:.0f} s'}")


def _measure(args: argparse.Namespace, machine: dict[str, Any]) -> None:
    from ds_al.studies.gpu.study import data_path, study
    from ds_al.studies.parts import run_parts

    parts = study(data=data_path(args.data_path), accuracy_minutes=args.accuracy_minutes)
    run_parts(parts, path=args.json, minutes=args.minutes, machine=machine, say=_say)


def _write(args: argparse.Namespace) -> list[str]:
    """Writes the page and the picture; returns a line for each part that is not done or reports failures."""
    from ds_al.studies.gpu.page import page
    from ds_al.studies.gpu.picture import draw_accuracy
    from ds_al.studies.results import read
    from ds_al.studies.tables.parts import outcome

    results = read(args.json) if args.json.exists() else None
    rows = results.rows if results is not None else ()
    trained = next((row["rows"] for row in rows if row["part"] == "accuracy"), ())
    files = draw_accuracy(trained, args.json.with_suffix(".png"))
    args.page.write_text(page(results, picture=os.path.relpath(files[0], args.page.parent) if files else None))
    return [f"{row['title']}: {outcome(row)}" for row in rows if outcome(row) != "done"]


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
