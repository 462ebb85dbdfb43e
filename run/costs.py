"""Counts the operations and parameters of every network's AL form and twin, and writes the tables of docs/models.md.

    python run/costs.py --json docs/results/costs.json --tables docs/models.md
    python run/costs.py --time --json docs/results/recipe_time.json --tables docs/accuracy.md

Operations are counted on torch's meta device, so the results are the same on every machine. Counting takes about a
minute, mostly for LSTMs, which need values. --time instead measures a micro-batch of every recipe, all layers in one
process, alternating with one of the twin; this takes minutes and needs an idle machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ds_al.experiment.recipes import RECIPES
from ds_al.figures.terminal import Console
from ds_al.studies.bench.costs import cost_rows
from ds_al.studies.bench.recipe_time import measure_recipe
from ds_al.studies.results import header, write
from ds_al.studies.tables.documents import fill
from ds_al.system.arguments import output_file


def main() -> None:
    """Counts or measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json",
        metavar="PATH",
        type=output_file,
        required=True,
        help="write the rows to PATH, and a CSV file next to it",
    )
    parser.add_argument("--tables", metavar="DOC", type=Path, help="document whose tables are updated")
    parser.add_argument("--time", action="store_true", help="measure the recipes' time instead of counting")
    args = parser.parse_args()
    console = Console()
    with console.status("measuring" if args.time else "counting"):
        rows = _measured(console) if args.time else _counted(console)
    write(args.json, kind="recipe_time" if args.time else "costs", header=header(), rows=rows)
    if args.tables:
        fill(args.tables, [args.json])
    console.print(f"{len(rows)} rows in {args.json}", highlight=False)


def _counted(console: Console) -> list[dict[str, Any]]:
    rows = []
    for row in cost_rows():
        rows.append(row)
        if not console.is_terminal:
            print(f"{row['network']} {row['preset']}, K = {row['K']}, {row['bridge']}: rho {row['rho']:.3f}")
    return rows


def _measured(console: Console) -> list[dict[str, Any]]:
    def progress(row: dict[str, Any]) -> None:
        what = " ".join(filter(None, (row["network"], row["variant"])))
        console.print(f"{row['recipe']}, {what}, K = {row['K']}: {row['ratio']:.3f} times as long")

    return [row for recipe in RECIPES for row in measure_recipe(recipe=recipe, progress=progress)]


if __name__ == "__main__":
    main()
