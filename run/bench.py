"""Measures the schedules on ranks of this machine; choose a measurement.

    python run/bench.py --sleeping --json docs/results/sleeping.json
    python run/bench.py --features --json docs/results/features.json
    python run/bench.py --overhead --json docs/results/overhead.json
    python run/bench.py --layers --model vgg,transformer --json docs/results/layers.json
    python run/bench.py --bytes --json docs/results/bytes.json
    python run/bench.py --memory --json docs/results/memory.json --markdown docs/memory.md
    python run/bench.py --check docs/results/sleeping.json

Sleeping layers take time but no core, so the times show what the schedules cost, on any machine. The
back-propagation methods run the twin of the same layers through DeepSpeed's engine, without clipping.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ds_al.errors import ALConfigError
from ds_al.launch.ranks import RankFailure
from ds_al.studies.bench import SleepingCases, guard, measure_memory, measure_sleeping, report
from ds_al.studies.bench.arguments import names, numbers, positive
from ds_al.studies.bench.features import FeatureCases, features_table, measure_features
from ds_al.studies.bench.layers import measure_layers
from ds_al.studies.bench.link_tables import traffic_table
from ds_al.studies.bench.overhead import METHODS as OVERHEAD_METHODS
from ds_al.studies.bench.overhead import measure_overhead
from ds_al.studies.bench.traffic import measure_traffic
from ds_al.studies.bench.workloads import METHODS

OVERHEAD_TURNS = 15
MEMORY_METHODS = ("streaming", "bp_1f1b", "bp_gpipe")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--sleeping", action="store_true", help="time all methods on sleeping layers, beside the ideal time"
    )
    what.add_argument(
        "--features", action="store_true", help="time features of DeepSpeed on sleeping layers, beside none: who waits?"
    )
    what.add_argument(
        "--layers", action="store_true", help="time forward, backward and step of every layer of preset models"
    )
    what.add_argument("--memory", action="store_true", help="count what autograd holds for backward on every stage")
    what.add_argument(
        "--bytes", dest="traffic", action="store_true", help="count what passes between stages per micro-batch"
    )
    what.add_argument(
        "--overhead", action="store_true",
        help="processor time of a micro-batch whose layers compute nothing, beside DeepSpeed's own engine",
    )  # fmt: skip
    what.add_argument(
        "--check", metavar="JSON", type=Path,
        help="measure some cases of this file of --sleeping or --overhead anew; fail where a ratio has fallen",
    )  # fmt: skip
    p.add_argument(
        "--current", metavar="JSON", type=Path, help="with --check: compare all of this file instead, of any kind"
    )
    p.add_argument(
        "--tolerance", type=float, default=guard.TOLERANCE, help="with --check: share a ratio may fall (default: 0.1)"
    )
    p.add_argument(
        "--json", metavar="PATH", type=Path, help="write header and rows to PATH and the rows as CSV beside it"
    )
    p.add_argument("--markdown", metavar="PATH", type=Path, help="with --memory: write the tables as a page to PATH")
    p.add_argument(
        "--methods", type=names, help=f"comma-separated, of {','.join(METHODS)} (default: all; --memory: "
        f"{','.join(MEMORY_METHODS)})",
    )  # fmt: skip
    p.add_argument("--stages", type=numbers, help="comma-separated (default: 2,4; --memory: 2,4,8; --bytes: 4)")
    p.add_argument(
        "--micro-batches",
        type=numbers,
        help="micro-batches per batch, comma-separated (default: 4,8,16; --memory: 4,8,16,32)",
    )
    p.add_argument("--batches", type=positive, default=3, help="batches of a timed run (default: 3)")
    p.add_argument(
        "--repeat", type=positive, default=3, help="times that each case is timed; the median counts (default: 3)"
    )
    p.add_argument("--forward-ms", type=float, default=50.0, help="sleep of a layer's forward (default: 50)")
    p.add_argument("--backward-ms", type=float, default=50.0, help="sleep of a layer's backward (default: 50)")
    p.add_argument("--model", default="vgg,transformer", help="with --layers: comma-separated (default: %(default)s)")
    p.add_argument("--preset", default="small", help="with --layers: of the models (default: small)")
    p.add_argument("--width", type=positive, default=64, help="with --memory: width of the layers (default: 64)")
    p.add_argument(
        "--micro-batch", type=positive, help="samples per micro-batch (--memory: 8; --layers: 32; --bytes: 64)"
    )
    return p


def main() -> None:
    """Runs one measurement."""
    p = parser()
    args = p.parse_args()
    if args.markdown and not args.memory:
        p.error("--markdown goes with --memory")
    if args.current and not args.check:
        p.error("--current goes with --check")
    run = next(
        each for each in (sleeping, features, overhead, layers, traffic, check, memory) if getattr(args, each.__name__)
    )
    try:
        run(args, Console())
    except (RankFailure, guard.GuardError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; no rank is left")


def sleeping(args: argparse.Namespace, console: Console) -> None:
    """Times the schedules."""
    cases = SleepingCases(
        methods=args.methods or METHODS,
        stages=args.stages or (2, 4),
        micro_batches=args.micro_batches or (4, 8, 16),
        batches=args.batches,
        forward=args.forward_ms / 1000,
        backward=args.backward_ms / 1000,
        repeat=args.repeat,
    )
    rows = _time_sleeping(cases, console)
    console.print(report.sleeping_table(rows))
    if args.json:
        settings = {
            "forward": cases.forward,
            "backward": cases.backward,
            "batches": cases.batches,
            "repeat": cases.repeat,
        }
        report.write(args.json, header=report.header(**settings), rows=rows)


def _time_sleeping(cases: SleepingCases, console: Console) -> list[dict[str, Any]]:
    total = sum(cases.total_seconds(stages=stages) for stages in cases.stages)
    console.print(f"at least {total:.0f} s of sleep", highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def progress(case: dict[str, Any]) -> None:
            done = f"{case['stages']} stages, {case['micro_batches']} micro-batches, {case['method']}"
            bar.update(task, advance=case["ideal"], description=done)
            if not console.is_terminal:
                print(f"{done}: {case['seconds']:.3f} s", flush=True)

        return measure_sleeping(cases, progress=progress)


def features(args: argparse.Namespace, console: Console) -> None:
    """Times features."""
    cases = FeatureCases(
        micro_batches=(args.micro_batches or (8,))[0],
        batches=args.batches,
        forward=args.forward_ms / 1000,
        backward=args.backward_ms / 1000,
        repeat=args.repeat,
    )
    with console.status("timing features on 4 ranks"):
        rows = measure_features(cases)
    print(features_table(rows))
    if args.json:
        report.write(args.json, header=report.header(**asdict(cases)), rows=rows)


def traffic(args: argparse.Namespace, console: Console) -> None:
    """Counts bytes."""
    stages, micro_batch = (args.stages or (4,))[0], args.micro_batch or 64
    with console.status("counting"):
        rows = measure_traffic(("vgg", "transformer"), stages=stages, micro_batch=micro_batch)
    print(traffic_table(rows))
    if args.json:
        report.write(args.json, header=report.header(stages=stages, micro_batch=micro_batch), rows=rows)


def overhead(args: argparse.Namespace, console: Console) -> None:
    """What the engines cost."""
    methods = tuple(args.methods or OVERHEAD_METHODS)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("timing the engines", total=OVERHEAD_TURNS * len(methods))
        rows = measure_overhead(
            methods=methods,
            stages=(args.stages or (2,))[0],
            micro_batches=(args.micro_batches or (8,))[0],
            repeat=OVERHEAD_TURNS,
            progress=lambda: bar.update(task, advance=1),
        )
    console.print(report.overhead_table(rows))
    if args.json:
        report.write(args.json, header=report.header(), rows=rows)


def layers(args: argparse.Namespace, console: Console) -> None:
    """Times layers, in this process."""
    torch.set_num_threads(1)
    micro_batch = args.micro_batch or 32
    models = tuple(args.model.split(","))
    try:
        rows = measure_layers(models=models, preset=args.preset, micro_batch=micro_batch, repeat=5 * args.repeat)
    except ALConfigError as error:
        sys.exit(f"error: {error}")
    console.print(report.layers_table(rows))
    if args.json:
        report.write(args.json, header=report.header(micro_batch=micro_batch, threads=1), rows=rows)


def check(args: argparse.Namespace, console: Console) -> None:
    """Compares ratios with a baseline's; fails where one fell."""
    baseline = guard.read(args.check)
    if args.current:
        current, part = guard.read(args.current), False
    else:
        current, part = {"header": {}, "rows": _anew(baseline, args, console)}, True
    verdicts = guard.check(baseline, current, tolerance=args.tolerance, part=part)
    console.print(guard.table(verdicts))
    if fallen := [each for each in verdicts if not each.holds]:
        sys.exit(f"{len(fallen)} of {len(verdicts)} ratios fell by more than {100 * args.tolerance:g} %")


def _anew(baseline: dict[str, Any], args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Rows of the baseline's short cases, measured with its settings."""
    rows, settings = baseline["rows"], baseline["header"].get("settings", {})
    kind = guard.kind(rows)
    if kind == "overhead":
        first = rows[0]
        return measure_overhead(
            methods=tuple(dict.fromkeys(row["method"] for row in rows)),
            stages=first["stages"],
            micro_batches=first["micro_batches"],
            batches=first["batches"],
        )
    if kind != "sleeping":
        raise guard.GuardError(f"{args.check} is of kind {kind!r}: measure it anew by its command, and give --current")
    numbers = sorted({row["micro_batches"] for row in rows})
    cases = SleepingCases(
        methods=("streaming", "bp_1f1b"),
        stages=tuple(sorted({row["stages"] for row in rows} & {2, 4})),
        micro_batches=(numbers[len(numbers) // 2],),
        batches=settings["batches"],
        forward=settings["forward"],
        backward=settings["backward"],
        repeat=args.repeat,
    )
    return _time_sleeping(cases, console)


def memory(args: argparse.Namespace, console: Console) -> None:
    """Counts activations."""
    stages = args.stages or (2, 4, 8)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("counting", total=len(stages))
        rows = measure_memory(
            methods=args.methods or MEMORY_METHODS,
            stages=stages,
            micro_batches=args.micro_batches or (4, 8, 16, 32),
            width=args.width,
            micro_batch=args.micro_batch or 8,
            progress=lambda count: bar.update(task, advance=1, description=f"{count} stages"),
        )
    console.print(report.memory_table(rows))
    header = report.header(width=args.width, micro_batch=args.micro_batch or 8)
    if args.json:
        report.write(args.json, header=header, rows=rows)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(report.memory_markdown(header, rows))


if __name__ == "__main__":
    main()
