"""Shows recovery: streams over a slow link, kills a stage twice, and compares with the undisturbed run to the last bit.

    python run/demo.py --picture docs/figures/recovery.png

Three jobs of three stages learn Fashion-MNIST on two cores, in less than three minutes: streaming undisturbed,
streaming while stage 1 is killed twice, and DeepSpeed's 1F1B, which a kill ends. The exit code is 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ds_al.figures.terminal import Console
from ds_al.studies.bench.arguments import positive
from ds_al.studies.demo import demonstrate
from ds_al.system.arguments import output_file


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batches", type=positive, default=60, help="batches of 4 micro-batches per job (default: 60)")
    p.add_argument(
        "--picture", type=output_file, default=Path("recovery.png"), help="PNG file to write (default: recovery.png)"
    )
    return p


def main() -> None:
    """Runs the demonstration."""
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not demonstrate(Path(folder), args.picture, Console(), batches=args.batches):
            sys.exit(1)


if __name__ == "__main__":
    main()
