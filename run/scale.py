"""Predicts what 64 to 1,024 stages would do: links from 100 Mbit/s to 400 Gbit/s, unlike machines, stragglers.

    python run/scale.py --json docs/results/scale.json --markdown docs/scale.md

Nothing is measured: the assumptions stand in ds_al/studies/scale/predictions.py and on the page. Some 10 minutes of
one core.
With --draw an existing file of rows is only drawn and written as a page anew.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ds_al.studies.bench.arguments import numbers, positive
from ds_al.studies.figures import draw_scale
from ds_al.studies.results import header, read, write
from ds_al.studies.scale import page as scale_page
from ds_al.studies.scale.predictions import Study


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Study()
    add = p.add_argument
    add("--json", metavar="PATH", type=Path, required=True, help="where the rows go; CSV beside it")
    add("--markdown", metavar="PATH", type=Path, help="write the page to PATH, its figures to figures/ beside it")
    add("--draw", action="store_true", help="predict nothing, read --json instead")
    add("--stages", type=numbers, default=default.stages, help="such as 64,256,1024 (the default)")
    add("--micro-batches", type=numbers, default=default.micro_batches, help="such as 64,256 (the default)")
    add("--sweep", type=numbers, default=default.sweep, help="M of the section on many micro-batches (16..4096)")
    add("--repeat", type=positive, default=default.repeat, help=f"random runs (default: {default.repeat})")
    add("--jobs", type=positive, default=1, help="processes that predict (default: 1)")
    return p


def main() -> None:
    """Predicts, writes, draws."""
    args, console = parser().parse_args(), Console()
    if args.draw:
        results = read(args.json)
        about, rows = dict(results.header), list(results.rows)
    else:
        study = Study(args.stages, args.micro_batches, args.sweep, args.repeat)
        rows = []
        with console.status("predicting") as status:
            for row in study.rows(jobs=args.jobs):
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


if __name__ == "__main__":
    main()
