"""Injects faults, kills and inputs, and writes a page of what came of them, within 30 minutes.

    python run/reliability.py --json docs/results/reliability.json --page docs/reliability.md

Finished parts are kept in the results file; the same command continues with the others. --page-only runs nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_al.studies.parts import run_parts
from ds_al.studies.reliability.page import broken, page
from ds_al.studies.reliability.study import KIND, study
from ds_al.studies.results import read
from ds_al.studies.tables.parts import outcome
from ds_al.system.arguments import more_than_zero

ROOT = Path(__file__).resolve().parents[1]


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results, text = ROOT / "docs/results/reliability.json", ROOT / "docs/reliability.md"
    p.add_argument("--json", metavar="PATH", type=Path, default=results, help="results file")
    p.add_argument("--page", metavar="PATH", type=Path, default=text, help="page of the results")
    p.add_argument("--minutes", type=more_than_zero, default=29.0, help="time of all parts together (default: 29)")
    names = [part.name for part in study()]
    p.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=f"of {', '.join(names)}")
    p.add_argument("--page-only", action="store_true", help="run nothing; write the page of the results that are there")
    return p


def main() -> None:
    """Runs the parts that are not finished, and writes the page."""
    args = parser().parse_args()
    if not args.page_only:
        parts = [part for part in study() if part.name in args.only]
        run_parts(parts, path=args.json, minutes=args.minutes, machine={}, kind=KIND, device="cpu", say=_say)
    results = read(args.json) if args.json.exists() else None
    args.page.write_text(page(results))
    rows = results.rows if results is not None else []
    unfinished = [f"{row['title']}: {outcome(row)}" for row in rows if not row["done"]]
    count = broken(row for part in rows for row in part["rows"])
    print("\n".join([f"{args.page} was written", *unfinished, *(f"{n} {name}" for name, n in count.items())]))
    sys.exit(1 if unfinished or count else 0)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
