"""Writes a report on runs: one self-contained HTML page, or a Markdown file with pictures.

python run/report.py runs/fashion_mnist_vgg_al --out report.html
python run/report.py runs/a/20261124-101500 runs/b/20261124-102000 profile.json --markdown docs/report.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_al.errors import ALError
from ds_al.report.content import QUESTION
from ds_al.system.arguments import output_file


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        type=Path,
        help="run folder (runs/<name>/<time>), a folder with runs at any depth, or a profile's .json file",
    )
    p.add_argument(
        "--out",
        metavar="PATH",
        type=output_file,
        help="path of the HTML page (default: report.html without --markdown)",
    )
    p.add_argument(
        "--markdown",
        metavar="PATH",
        type=output_file,
        help="path of a Markdown file; pictures go to a folder next to it",
    )
    p.add_argument("--title", help="heading (default: the names of the runs)")
    p.add_argument("--question", help=f"question that the report answers (default: {QUESTION!r})")
    p.add_argument("--wandb", action="store_true", help="also publish the runs as a W&B report, and print its URL")
    p.add_argument("--entity", help="with --wandb: W&B entity (default: the account's own)")
    p.add_argument("--project", default="ds_al", help="with --wandb: W&B project (default: ds_al)")
    return p


def main() -> int:
    """Reads runs, writes reports and returns the exit code."""
    args = parser().parse_args()
    from ds_al.report import content, read, write_markdown, write_page

    try:
        runs, profiles = read(args.paths)
        report = content(runs, profiles=profiles, title=args.title, question=args.question)
        if args.out or not (args.markdown or args.wandb):
            _say(write_page(report, args.out or Path("report.html")))
        if args.markdown:
            for file in write_markdown(report, args.markdown):
                _say(file)
        if args.wandb:
            from ds_al.report.wandb_report import publish

            print(publish([run.folder for run in runs], title=report.title, entity=args.entity, project=args.project))
    except (ALError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _say(file: Path) -> None:
    count = file.stat().st_size
    print(f"{file}  {count / 1e6:.2f} MB" if count >= 1e5 else f"{file}  {count / 1e3:.1f} kB")


if __name__ == "__main__":
    sys.exit(main())
