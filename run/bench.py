"""Measures the schedules on ranks of this machine. One measurement must be selected.

    python run/bench.py --sleeping --json docs/results/sleeping.json
    python run/bench.py --dial --stages 4,8 --batches 2 --forward-ms 30 --backward-ms 60 --json docs/results/dial.json
    python run/bench.py --cores --json docs/results/cores.json
    python run/bench.py --repartition --json docs/results/repartition.json
    python run/bench.py --recovery --json docs/results/recovery.json
    python run/bench.py --features --json docs/results/features.json
    python run/bench.py --overhead --json docs/results/overhead.json
    python run/bench.py --layers --model vgg,transformer --json docs/results/layers.json
    python run/bench.py --bytes --json docs/results/bytes.json
    python run/bench.py --memory --json docs/results/memory.json --markdown docs/memory.md
    python run/bench.py --check docs/results/sleeping.json

Sleeping layers take time but no core, so their times show the cost of the schedules on any machine. The
back-propagation methods run the twin of the same layers with DeepSpeed's engine, without clipping.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ds_al.errors import ALConfigError
from ds_al.figures.terminal import Console
from ds_al.launch.ranks import RankFailure
from ds_al.studies.bench import guard
from ds_al.studies.bench.again import measure_again, time_sleeping
from ds_al.studies.bench.arguments import names, numbers, positive
from ds_al.studies.bench.cases import SleepingCases, measure_memory
from ds_al.studies.bench.dial import DialCases, measure_dial
from ds_al.studies.bench.features import FeatureCases, measure_features
from ds_al.studies.bench.forms import networks_on_two_stages
from ds_al.studies.bench.layers import measure_layers
from ds_al.studies.bench.overhead import METHODS as OVERHEAD_METHODS
from ds_al.studies.bench.overhead import measure_overhead
from ds_al.studies.bench.recovery import RecoveryCases, measure_recovery
from ds_al.studies.bench.repartition import RepartitionCases, measure_repartition
from ds_al.studies.bench.rivals import measure_cores
from ds_al.studies.bench.traffic import measure_traffic
from ds_al.studies.bench.workloads import METHODS
from ds_al.studies.results import Row, StudyError, header, read, write
from ds_al.studies.tables.documents import show
from ds_al.studies.tables.schedules import memory_page
from ds_al.studies.tables.write import terminal
from ds_al.system.arguments import amount, fraction, output_file

OVERHEAD_TURNS = 15
MEMORY_METHODS = ("streaming", "bp_1f1b", "bp_gpipe")


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--sleeping", action="store_true", help="time all methods on sleeping layers, and compare with the ideal"
    )
    what.add_argument(
        "--dial", action="store_true",
        help="time K layers on P stages, with each schedule inside a group, beside streaming, 1F1B and its rivals",
    )  # fmt: skip
    what.add_argument(
        "--cores", action="store_true",
        help="samples per second of real networks on two cores: streaming, one layer, 1F1B and its rivals",
    )  # fmt: skip
    what.add_argument(
        "--repartition", action="store_true",
        help="time sleeping layers while a stage is slower for a while, with and without layers that move",
    )  # fmt: skip
    what.add_argument(
        "--recovery", action="store_true",
        help="kill a stage, and time its recovery beside a restart of the whole job, and of 1F1B",
    )  # fmt: skip
    what.add_argument(
        "--features", action="store_true", help="time features of DeepSpeed on sleeping layers: do stages wait?"
    )
    what.add_argument(
        "--layers", action="store_true", help="time forward, backward and step of every layer of preset models"
    )
    what.add_argument("--memory", action="store_true", help="measure peak memory held for backward on every stage")
    what.add_argument(
        "--bytes", dest="traffic", action="store_true", help="count the bytes between stages per micro-batch"
    )
    what.add_argument(
        "--overhead", action="store_true",
        help="measure engine overhead: processor time of a micro-batch whose layers compute nothing",
    )  # fmt: skip
    what.add_argument(
        "--check", metavar="JSON", type=Path,
        help="repeat some cases of this --sleeping or --overhead file; fail if a ratio has fallen",
    )  # fmt: skip
    p.add_argument(
        "--current", metavar="JSON", type=Path, help="with --check: compare this file (of any kind), do not measure"
    )
    p.add_argument(
        "--tolerance",
        type=amount,
        default=guard.TOLERANCE,
        help="with --check: decrease a ratio may have (default: 0.1)",
    )
    p.add_argument(
        "--json", metavar="PATH", type=output_file, help="write header and rows to PATH, and a CSV file next to it"
    )
    p.add_argument(
        "--markdown", metavar="PATH", type=output_file, help="with --memory: write the tables as a page to PATH"
    )
    p.add_argument(
        "--methods", type=names, help=f"comma-separated, of {','.join(METHODS)} (default: all; --memory: "
        f"{','.join(MEMORY_METHODS)})",
    )  # fmt: skip
    p.add_argument("--stages", type=numbers, help="comma-separated (default: 2,4; --memory: 2,4,8; --bytes: 4)")
    p.add_argument(
        "--micro-batches",
        type=numbers,
        help="micro-batches per batch, comma-separated (default: 4,8,16; --memory: 4,8,16,32; --cores: 2,4,8,16)",
    )
    p.add_argument("--total", type=positive, default=32, help="with --cores: micro-batches per timed run (default: 32)")
    p.add_argument(
        "--batches",
        type=positive,
        help="batches per timed run, or of a phase (default: 3; --repartition: 20; --recovery: 60)",
    )
    p.add_argument(
        "--every", type=positive, default=32, help="with --recovery: micro-batches between two saves (default: 32)"
    )
    p.add_argument(
        "--repeat", type=positive, default=3, help="repetitions per case; the median is reported (default: 3)"
    )
    p.add_argument("--forward-ms", type=amount, default=50.0, help="sleep of a layer's forward (default: 50)")
    p.add_argument("--backward-ms", type=amount, default=50.0, help="sleep of a layer's backward (default: 50)")
    p.add_argument(
        "--model", default="vgg,transformer", help="with --layers and --cores: comma-separated (default: %(default)s)"
    )
    p.add_argument(
        "--dropout", type=fraction, default=0.0, help="with --cores: dropout of networks of texts, which takes much of "
        "their time on a CPU (default: 0)",
    )  # fmt: skip
    p.add_argument("--preset", default="small", help="with --layers: preset of the models (default: small)")
    p.add_argument("--width", type=positive, default=64, help="with --memory: width of the layers (default: 64)")
    p.add_argument(
        "--micro-batch", type=positive, help="samples per micro-batch (--memory: 8; --layers, --cores: 32; --bytes: 64)"
    )
    return p


def main() -> None:
    """Runs one measurement."""
    p = parser()
    args = p.parse_args()
    if args.markdown and not args.memory:
        p.error("--markdown goes with --memory")
    if args.dropout and not args.cores:
        p.error("--dropout goes with --cores")
    if args.current and not args.check:
        p.error("--current goes with --check")
    run = next(
        each
        for each in (sleeping, dial, cores, repartition, recovery, features, overhead, layers, traffic, check, memory)
        if getattr(args, each.__name__)
    )
    try:
        run(args, Console())
    except (RankFailure, StudyError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; no rank is left")


def sleeping(args: argparse.Namespace, console: Console) -> None:
    """Times the schedules."""
    cases = SleepingCases(
        methods=args.methods or METHODS,
        stages=args.stages or (2, 4),
        micro_batches=args.micro_batches or (4, 8, 16),
        batches=args.batches or 3,
        forward=args.forward_ms / 1000,
        backward=args.backward_ms / 1000,
        repeat=args.repeat,
    )
    rows = time_sleeping(cases, console)
    settings = {name: getattr(cases, name) for name in ("forward", "backward", "batches", "repeat")}
    _keep(args, console, "sleeping", rows, **settings)


def dial(args: argparse.Namespace, console: Console) -> None:
    """Times K layers on P stages."""
    cases = DialCases(
        stages=args.stages or (4, 8),
        layers=(1, 2, 4),
        micro_batches=args.micro_batches or (4, 8, 16),
        batches=args.batches or 3,
        forward=args.forward_ms / 1000,
        backward=args.backward_ms / 1000,
        repeat=args.repeat,
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("timing", total=cases.total())
        rows = measure_dial(cases, progress=lambda row: bar.update(task, advance=1, description=str(row["schedule"])))
    settings = {name: getattr(cases, name) for name in ("forward", "backward", "batches", "repeat")}
    _keep(args, console, "dial", rows, **settings)


def cores(args: argparse.Namespace, console: Console) -> None:
    """Measures real networks on two cores."""
    micro_batch, repeat = args.micro_batch or 32, args.repeat
    models = tuple(args.model.split(","))
    try:
        networks = networks_on_two_stages(models, micro_batch=micro_batch, dropout=args.dropout)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("timing", total=repeat * len(networks))
        rows = measure_cores(
            networks,
            micro_batches=args.micro_batches or (2, 4, 8, 16),
            total=args.total,
            repeat=repeat,
            progress=lambda name, _: bar.update(task, advance=1, description=name),
        )
    settings = {"micro_batch": micro_batch, "total": args.total, "repeat": repeat, "dropout": args.dropout}
    _keep(args, console, "cores", rows, **settings)


def repartition(args: argparse.Namespace, console: Console) -> None:
    """Times a stage that is slower for a while."""
    stages = (args.stages or (4,))[0]
    cases = RepartitionCases(
        stages=stages,
        layers=4 * stages,
        micro_batches=(args.micro_batches or (4,))[0],
        batches=max(args.batches or 20, 2),
        forward=args.forward_ms / 1000,
        backward=args.backward_ms / 1000,
        slowdown=2.0,
    )
    with console.status(f"timing {stages} stages of which one is slower for a while"):
        rows = measure_repartition(cases)
    _keep(args, console, "repartition", rows, **asdict(cases))


def recovery(args: argparse.Namespace, console: Console) -> None:
    """Kills stages."""
    cases = RecoveryCases(
        stages=(args.stages or (3,))[0],
        micro_batches=(args.micro_batches or (4,))[0],
        batches=args.batches or 60,
        every=args.every,
        repeat=args.repeat,
    )
    with tempfile.TemporaryDirectory() as folder, console.status("starting jobs") as status:

        def progress(line: str) -> None:
            status.update(line)
            if not console.is_terminal:
                print(line, flush=True)

        rows = measure_recovery(cases, Path(folder), progress=progress)
    _keep(args, console, "recovery", rows, **asdict(cases))


def features(args: argparse.Namespace, console: Console) -> None:
    """Times features."""
    cases = FeatureCases(
        micro_batches=(args.micro_batches or (8,))[0],
        batches=args.batches or 3,
        forward=args.forward_ms / 1000,
        backward=args.backward_ms / 1000,
        repeat=args.repeat,
    )
    with console.status("timing features on 4 ranks"):
        rows = measure_features(cases)
    _keep(args, console, "features", rows, **asdict(cases))


def traffic(args: argparse.Namespace, console: Console) -> None:
    """Counts bytes."""
    sizes: dict[str, Any] = {"stages": (args.stages or (4,))[0], "micro_batch": args.micro_batch or 64}
    with console.status("counting"):
        rows = measure_traffic(("vgg", "transformer"), **sizes)
    _keep(args, console, "traffic", rows, **sizes)


def overhead(args: argparse.Namespace, console: Console) -> None:
    """Measures the overhead of the engines."""
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
    _keep(args, console, "overhead", rows)


def layers(args: argparse.Namespace, console: Console) -> None:
    """Times layers in this process."""
    torch.set_num_threads(1)
    micro_batch = args.micro_batch or 32
    models = tuple(args.model.split(","))
    try:
        rows = measure_layers(models=models, preset=args.preset, micro_batch=micro_batch, repeat=5 * args.repeat)
    except ALConfigError as error:
        sys.exit(f"error: {error}")
    _keep(args, console, "layers", rows, micro_batch=micro_batch, threads=1)


def check(args: argparse.Namespace, console: Console) -> None:
    """Compares ratios with a baseline, and fails if one has fallen."""
    baseline = read(args.check)
    current = read(args.current) if args.current else measure_again(baseline, repeat=args.repeat, console=console)
    verdicts = guard.check(baseline, current, tolerance=args.tolerance, part=args.current is None)
    console.print(terminal(guard.table(verdicts)))
    if fallen := [each for each in verdicts if not each.holds]:
        sys.exit(f"{len(fallen)} of {len(verdicts)} ratios fell by more than {100 * args.tolerance:g} %")


def memory(args: argparse.Namespace, console: Console) -> None:
    """Counts activations."""
    stages, sizes = args.stages or (2, 4, 8), {"width": args.width, "micro_batch": args.micro_batch or 8}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("counting", total=len(stages))
        rows = measure_memory(
            methods=args.methods or MEMORY_METHODS,
            stages=stages,
            micro_batches=args.micro_batches or (4, 8, 16, 32),
            **sizes,
            progress=lambda count: bar.update(task, advance=1, description=f"{count} stages"),
        )
    _keep(args, console, "memory", rows, **sizes)
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(memory_page(header(**sizes), rows))


def _keep(args: argparse.Namespace, console: Console, kind: str, rows: Sequence[Row], **settings: Any) -> None:
    """Shows the rows and, with ``--json``, writes them."""
    show(console, kind, rows)
    if args.json:
        write(args.json, kind=kind, header=header(**settings), rows=rows)


if __name__ == "__main__":
    main()
