"""Counts what every network costs, in its AL form and as its twin, and writes the tables of docs/models.md.

    python run/costs.py --json results/costs.json --tables docs/models.md

Operations are counted on torch's meta device, so this gives the same on every machine;
LSTMs, which need values, take most of its minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ds_al.bench import report, tables
from ds_al.bench.costs import cost_rows


def main() -> None:
    """Counts, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", type=Path, required=True, help="where the rows go; CSV beside it")
    parser.add_argument("--tables", metavar="DOC", type=Path, help="document whose tables are to be written anew")
    args = parser.parse_args()
    console = Console()
    rows = []
    with console.status("counting"):
        for row in cost_rows():
            rows.append(row)
            if not console.is_terminal:
                print(f"{row['network']} {row['preset']}, K = {row['K']}, {row['bridge']}: rho {row['rho']:.3f}")
    report.write(args.json, header=report.header(), rows=rows)
    if args.tables:
        tables.fill(args.tables, [args.json])
    console.print(f"{len(rows)} rows in {args.json}", highlight=False)


if __name__ == "__main__":
    main()
