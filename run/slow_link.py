"""Measures throughput on a slow link: streaming with each message_dtype, and 1F1B. Needs root.

    python run/slow_link.py --json docs/results/slow_link.json --figure docs/results/slow_link.png

Two stages run in two network namespaces of this machine, joined by a virtual interface whose rate is limited by `tc`;
other traffic is not affected. Namespaces and interfaces are removed at the end, also after an error or ctrl-C. The
measurement takes about 6 minutes. The exit code is 3 if the machine does not allow it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from ds_al.figures.terminal import Console
from ds_al.launch.ranks import RankFailure
from ds_al.studies.bench.arguments import numbers, positive
from ds_al.studies.bench.namespaces import NotAllowed
from ds_al.studies.bench.slow_link import LinkCases, measure_slow_link
from ds_al.studies.figures import draw_slow_link
from ds_al.studies.results import header, write
from ds_al.studies.tables.documents import show
from ds_al.system.arguments import more_than_zero, output_file

NOT_ALLOWED = 3


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--rates", type=numbers, default=(10, 100, 1000), help="Mbit/s, comma-separated (default: 10,100,1000)")
    add(
        "--model",
        default="vgg",
        choices=("vgg", "transformer", "mlp"),
        help="small network, trained on random data (default: vgg)",
    )
    add("--cut", type=positive, default=2, help="first layer of the second stage, counted from 0 (default: 2)")
    add("--micro-batch", type=positive, default=64, help="samples per micro-batch (default: 64)")
    add("--micro-batches", type=positive, default=8, help="micro-batches per batch (default: 8)")
    add(
        "--seconds", type=more_than_zero, default=6.0, help="time limit of a case, with at least one batch (default: 6)"
    )
    add("--repeat", type=positive, default=3, help="repetitions per case; cases alternate (default: 3)")
    add(
        "--timeout", type=more_than_zero, default=480.0, help="seconds before the measurement is aborted (default: 480)"
    )
    add("--json", metavar="PATH", type=output_file, help="write header and rows to PATH, and a CSV file next to it")
    add("--figure", metavar="PATH", type=output_file, help="draw to PATH (PNG and SVG)")
    return p


def main() -> None:
    """Measures all cases, and writes tables and figure."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that namespaces are removed
    console = Console()
    cases = LinkCases(
        rates=[float(rate) for rate in args.rates],
        model=args.model,
        cut=args.cut,
        micro_batch=args.micro_batch,
        micro_batches=args.micro_batches,
        seconds=args.seconds,
        repeat=args.repeat,
    )
    try:
        with console.status("starting two stages") as status:

            def progress(line: str) -> None:
                status.update(line)
                if not console.is_terminal:
                    print(line, flush=True)

            rows = measure_slow_link(cases, timeout=args.timeout, progress=progress)
    except NotAllowed as error:
        print(f"not measured: {error}", file=sys.stderr)
        sys.exit(NOT_ALLOWED)
    except RankFailure as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; no rank and no namespace is left")
    show(console, "slow_link", rows)
    if args.json:
        settings = {name: getattr(cases, name) for name in ("model", "cut", "micro_batch", "micro_batches", "seconds")}
        write(args.json, kind="slow_link", header=header(**settings), rows=rows)
    if args.figure:
        for path in draw_slow_link(rows, args.figure):
            console.print(f"{path}", highlight=False)


def _end(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
