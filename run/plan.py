"""Says which method would be fastest, and by how much, for a network cut into P stages on a link of some speed.

    python run/plan.py --forward-ms 400 --backward-ms 800 --rho 1.05 --stages 4,8,64 --micro-batches 4,8,16,32,64
    python run/plan.py --profile results/profile_transformer.json --stages 2,4 --micro-batches 4,8,16 --link 1gbit

Times are given, or taken from what run/profile.py measured of `streaming` and `bp_1f1b`. Stages are taken to be equal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ds_al.bench import report
from ds_al.bench.arguments import numbers
from ds_al.planner import Link, Work, advice, break_even, grid
from ds_al.planner.show import bytes_per_second, draw, table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--profile", metavar="JSON", type=Path, help="take times, rho and bytes from this file of run/profile.py")
    add("--forward-ms", type=float, help="forward of one micro-batch through the whole plain network")
    add("--backward-ms", type=float, help="backward of the same (default: twice the forward)")
    add("--step-ms", type=float, help="one optimizer step of the whole network (default: 0)")
    add("--rho", type=float, help="compute of the AL form over that of the twin (default: 1; see docs/models.md)")
    add("--activation-mb", type=float, help="megabytes that go from stage to stage per micro-batch (default: 0)")
    add("--target-mb", type=float, help="megabytes that an AL message has beside them (default: 0)")
    add("--parameters", type=float, default=0.0, help="of the network, 4 bytes each, for data parallel training")
    add("--stages", type=numbers, default=(2, 4, 8), help="comma-separated (default: 2,4,8)")
    add("--micro-batches", type=numbers, default=(4, 8, 16, 32, 64), help="comma-separated (default: 4,8,16,32,64)")
    add("--link", default=None, help="speed between neighbours, such as 100mbit or 400gbit (default: no limit)")
    add("--latency-ms", type=float, default=0.0, help="of a message (default: 0)")
    add("--json", metavar="PATH", type=Path, help="write header and rows to PATH, CSV beside it")
    add("--figure", metavar="PATH", type=Path, help="draw times over M to PATH (PNG, and SVG beside it)")
    return p


def main() -> None:
    """Predicts, and advises."""
    p = parser()
    args = p.parse_args()
    try:
        work = _work(args)
        link = Link(bytes_per_second(args.link) if args.link else float("inf"), args.latency_ms / 1000)
    except ValueError as error:
        sys.exit(f"error: {error}")
    console = Console()
    with console.status("simulating"):
        found = list(grid(work, stages=list(args.stages), micro_batches=list(args.micro_batches), link=link))
    console.print(table(found))
    for stages in args.stages:
        even = break_even(work, stages=stages, link=link, most=max(256, *args.micro_batches)) if stages < 256 else None
        for m in args.micro_batches:
            own = [each for each in found if (each.stages, each.micro_batches) == (stages, m)]
            console.print(advice(own, work, even=even), highlight=False, soft_wrap=True)
    if args.json:
        header = report.header(work=asdict(work), link=args.link, latency_ms=args.latency_ms)
        report.write(args.json, header=header, rows=[asdict(each) for each in found])
    if args.figure:
        for path in draw(found, args.figure):
            console.print(f"{path}", highlight=False)


def _work(args: argparse.Namespace) -> Work:
    """What the network costs: measured, with what is given instead.

    Raises:
        ValueError: neither a profile nor a forward time is given, or the profile lacks a method.
    """
    measured = _measured(args.profile) if args.profile else {}
    given = {
        "forward": args.forward_ms and args.forward_ms / 1000,
        "backward": args.backward_ms and args.backward_ms / 1000,
        "step": args.step_ms and args.step_ms / 1000,
        "rho": args.rho,
        "message_bytes": args.activation_mb and args.activation_mb * 1e6,
        "target_bytes": args.target_mb and args.target_mb * 1e6,
    }
    values = {**measured, **{key: value for key, value in given.items() if value is not None}}
    if "forward" not in values:
        raise ValueError("no times: give --forward-ms, or --profile with a file of run/profile.py")
    return Work(**{"backward": 2 * values["forward"], **values}, parameter_bytes=4 * args.parameters)


def _measured(path: Path) -> dict[str, float]:
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no file of run/profile.py: {error}") from error
    al, bp = (_of(rows, method, path) for method in ("streaming", "bp_1f1b"))
    forward, backward, step = (sum(row[f"{name}_ms"] for row in bp) / 1000 for name in ("forward", "backward", "step"))
    local = sum(row["forward_ms"] + row["backward_ms"] for row in al) / 1000
    message = bp[0]["bytes_per_micro_batch"]
    return {
        "forward": forward,
        "backward": backward,
        "step": step,
        "rho": local / (forward + backward),
        "message_bytes": message,
        "target_bytes": max(al[0]["bytes_per_micro_batch"] - message, 0.0),
    }


def _of(rows: Sequence[dict[str, Any]], method: str, path: Path) -> list[dict[str, Any]]:
    own = [row for row in rows if row["method"] == method]
    if not own:
        raise ValueError(f"{path} has no {method}: profile it with --methods streaming,bp_1f1b")
    most = max(row["micro_batches"] for row in own)
    return [row for row in own if row["micro_batches"] == most]


if __name__ == "__main__":
    main()
