"""Predicts pipelines of 2 to 1,024 stages: K layers on P stages, slow links, heterogeneous machines, stragglers.

    python run/scale.py --json docs/results/scale.json --markdown docs/scale.md
    python run/scale.py --section dial --json docs/results/scale.json --markdown docs/scale.md

Nothing is measured; ds_al/studies/scale/predictions.py and the page list the assumptions. The predictions take about
25 minutes of one core, mostly of zero bubble. --section predicts one section and keeps the others of the file; --draw
predicts nothing: it rewrites the figures and the page from existing results.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from ds_al.figures.terminal import Console
from ds_al.studies.bench.arguments import numbers, positive
from ds_al.studies.results import Row, header, read, write
from ds_al.studies.scale import page as scale_page
from ds_al.studies.scale.picture import draw_scale
from ds_al.studies.scale.predictions import SECTIONS, Study
from ds_al.system.arguments import output_file


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Study()
    add = p.add_argument
    add(
        "--json",
        metavar="PATH",
        type=output_file,
        required=True,
        help="write the rows to PATH, and a CSV file next to it",
    )
    add(
        "--markdown", metavar="PATH", type=output_file, help="write the page to PATH, its figures to the folder figures"
    )
    add("--draw", action="store_true", help="read the rows from --json instead of predicting them")
    add("--section", choices=SECTIONS, help="predict this section alone, and keep the others of --json")
    add("--dial", type=numbers, default=default.dial, help="P at which K varies from 1 to P (default: 2..64)")
    add("--stages", type=numbers, default=default.stages, help="numbers of stages (default: 64,256,1024)")
    add("--micro-batches", type=numbers, default=default.micro_batches, help="micro-batches (default: 64,256)")
    add("--sweep", type=numbers, default=default.sweep, help="values of M in the sweep (default: 16..1024)")
    add("--repeat", type=positive, default=default.repeat, help=f"random runs per case (default: {default.repeat})")
    add("--jobs", type=positive, default=1, help="number of processes (default: 1)")
    return p


def main() -> None:
    """Predicts, and writes the results, the page and the figures."""
    args, console = parser().parse_args(), Console()
    rows: list[Row]
    if args.draw:
        results = read(args.json)
        about, rows = dict(results.header), list(results.rows)
    else:
        study = Study(args.stages, args.micro_batches, args.dial, sweep=args.sweep, repeat=args.repeat)
        rows = _others(args) if args.section else []
        with console.status("predicting") as status:
            for row in study.rows(jobs=args.jobs, section=args.section):
                rows.append(row)
                done = f"{row['section']}: {row['workload']}, P = {row['stages']}, M = {row['micro_batches']}"
                status.update(done)
                if not console.is_terminal:
                    print(f"{done}, {row['link']}, {row['method']}: {row['seconds']:.4g} s", flush=True)
        about = header(**asdict(study))
        write(args.json, kind="scale", header=about, rows=rows)
    if args.markdown:
        files = draw_scale(rows, args.markdown.parent / "figures")
        shown = {name: os.path.relpath(paths[0], args.markdown.parent) for name, paths in files.items()}
        args.markdown.write_text(scale_page.page(about, rows, figures=shown))
    console.print(f"{len(rows)} rows in {args.json}", highlight=False)


def _others(args: argparse.Namespace) -> list[Row]:
    """Returns the rows of the other sections."""
    return [row for row in read(args.json).rows if row["section"] != args.section]


if __name__ == "__main__":
    main()
