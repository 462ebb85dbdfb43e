"""Measures scaling over stages, and compares two stages on two cores with the limits of machine and schedule.

    python run/scaling.py --sleeping --study strong --json docs/results/scaling_sleeping_strong.json
    python run/scaling.py --model transformer --json docs/results/scaling_transformer.json
    python run/scaling.py --ceiling --model vgg,transformer --json docs/results/ceiling.json
    python run/scaling.py --against-1f1b --model vgg,transformer --json docs/results/against_1f1b.json
    python run/scaling.py --tables docs/performance.md docs/results/scaling_*.json docs/results/ceiling.json
    python run/scaling.py --draw docs/results/scaling_*.json docs/results/against_1f1b.json

Weak scaling: k layers on k stages. Strong scaling: 12 layers on an increasing number of stages. Every rank computes on
one thread. Sleeping layers take time but no core. The Transformer computes: with more stages than cores, wall clock
times are not meaningful; instead the processor time of every stage is measured, and the time of the schedule is
computed from it and marked as computed. Files are written after every case, so interrupted measurements are saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_al.errors import ALError
from ds_al.figures.terminal import Console
from ds_al.launch.ranks import RankFailure
from ds_al.models import AL_MODELS
from ds_al.planner import StageCost
from ds_al.studies.bench.arguments import numbers, positive
from ds_al.studies.bench.ceiling import measure_ceiling
from ds_al.studies.bench.forms import estimated_seconds, networks_on_two_stages
from ds_al.studies.bench.ratio import measure_ratio
from ds_al.studies.bench.scaling import METHODS, STUDIES, ScalingCases, cores, encoder_seconds, measure_scaling
from ds_al.studies.bench.texts import ag_news
from ds_al.studies.figures import draw_results
from ds_al.studies.progress import Bar
from ds_al.studies.results import Row, header, read, write
from ds_al.studies.tables.documents import fill, show
from ds_al.system.arguments import amount, fraction, output_file

Rows = Sequence[Row]


def choices(*known: str) -> Callable[[str], tuple[str, ...]]:
    """Returns an argument type: comma-separated names out of ``known``."""

    def parse(text: str) -> tuple[str, ...]:
        parts = tuple(part for part in text.split(",") if part)
        if not parts or any(part not in known for part in parts):
            raise argparse.ArgumentTypeError(f"got {text!r}: expected names of {','.join(known)}")
        return parts

    return parse


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("files", nargs="*", type=Path, metavar="JSON", help="with --tables and --draw: results files")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--sleeping", action="store_true", help="weak and strong scaling with sleeping layers")
    what.add_argument("--ceiling", action="store_true", help="streaming compared with two stages without messages")
    what.add_argument("--against-1f1b", action="store_true", help="streaming over 1F1B and its bound, two stages")
    what.add_argument("--tables", metavar="DOC", type=Path, help="write the tables of the JSON files into a document")
    what.add_argument("--draw", action="store_true", help="redraw the figures of the JSON files from their rows")
    add("--model", type=choices(*sorted(AL_MODELS)), help="alone: scaling with this model (transformer); with "
        "--ceiling or --against-1f1b: comma-separated (default: vgg,transformer)")  # fmt: skip
    add("--json", metavar="PATH", type=output_file, help="write header and rows to PATH, CSV and figure next to it")
    add("--micro-batches", type=numbers, help="micro-batches per batch (default: 16; 8 for networks); with "
        "--against-1f1b comma-separated (default: 2,4,8,16)")  # fmt: skip
    add("--micro-batch", type=positive, default=32, help="samples per micro-batch of a network (default: 32)")
    add("--repeat", type=positive, help="runs per case, alternating between cases (default: 2 of the sleeping weak "
        "study, 1 of the strong; 3 of the Transformer; 7 with --ceiling, 5 with --against-1f1b)")  # fmt: skip
    studies = p.add_argument_group("studies")
    add = studies.add_argument
    add("--study", type=choices(*STUDIES), default=STUDIES, help="comma-separated (default: weak,strong)")
    add("--methods", type=choices(*METHODS), default=METHODS, help=f"comma-separated (default: {','.join(METHODS)})")
    add("--weak", type=numbers, default=tuple(range(1, 9)), help="stages of the weak study (default: 1,2,...,8)")
    add("--strong", type=numbers, default=(1, 2, 3, 4, 6), help="stages of the strong study (default: 1,2,3,4,6)")
    add("--layers", type=positive, default=12, help="layers of the strong study (default: 12)")
    add("--batches", type=positive, help="consecutive batches of streaming, whose pipeline stays full between them "
        "(default: 4; 2 for networks)")  # fmt: skip
    add("--drained-batches", type=positive, default=1, help="batches of all other methods, whose batches all take "
        "the same time (default: 1)")  # fmt: skip
    add("--forward-ms", type=amount, default=50.0, help="sleep of a layer's forward (default: 50)")
    add("--backward-ms", type=amount, default=50.0, help="sleep of a layer's backward (default: 50)")
    add("--data", metavar="DIR", help="folder of AG News's parquet files (default: $DS_AL_DATA/ag-news if that is "
        "set, else the cache or the hub; random tokens if it is unavailable)")  # fmt: skip
    pairs = p.add_argument_group("two cores")
    pairs.add_argument("--dropout", type=fraction, default=0.0, help="with --against-1f1b: dropout of text networks, "
        "which takes much of their time on a CPU (default: 0)")  # fmt: skip
    pairs.add_argument("--total", type=positive, help="micro-batches per timed run (default: 64 with --ceiling, "
        "32 with --against-1f1b)")  # fmt: skip
    return p


def main() -> None:
    """Runs one measurement."""
    p = parser()
    args = p.parse_args()
    if args.files and not (args.tables or args.draw):
        p.error(f"got {args.files[0]}: JSON files go with --tables or --draw")
    alone = not (args.sleeping or args.ceiling or args.against_1f1b or args.tables or args.draw)
    if alone and args.model != ("transformer",):
        p.error("give --sleeping, --ceiling, --against-1f1b, --tables, --draw, or --model transformer for the studies")
    if args.sleeping and args.model:
        p.error("--sleeping layers are no --model: give one of them")
    if args.dropout and not args.against_1f1b:
        p.error("--dropout goes with --against-1f1b")
    if not args.against_1f1b and args.micro_batches and len(args.micro_batches) > 1:
        p.error(f"got {len(args.micro_batches)} numbers of micro-batches: give one, or use --against-1f1b")
    try:
        if args.tables:
            for name in fill(args.tables, args.files):
                print(f"{args.tables}: {name}")
        elif args.draw:
            for figure in (each for path in args.files for each in draw_results(read(path), path)):
                print(figure)
        elif args.ceiling or args.against_1f1b:
            (ceiling if args.ceiling else against_1f1b)(args, Console())
        else:
            studies(args, Console())
    except (RankFailure, ALError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; no rank is left, and what was measured is kept")


def studies(args: argparse.Namespace, console: Console) -> None:
    """Measures weak and strong scaling."""
    micro_batches = args.micro_batches[0] if args.micro_batches else 16 if args.sleeping else 8
    texts = None
    layer = StageCost(args.forward_ms / 1000, args.backward_ms / 1000)
    if not args.sleeping:
        known = os.environ.get("DS_AL_DATA")
        path = args.data or (os.path.join(known, "ag-news") if known else None)
        texts = ag_news(path, count=2 * micro_batches, micro_batch=args.micro_batch)
        layer = encoder_seconds(texts)
        console.print(f"data: {texts.origin}", highlight=False)
    common = {
        "methods": args.methods,
        "weak": args.weak,
        "strong": args.strong,
        "layers": args.layers,
        "micro_batches": micro_batches,
        "batches": args.batches or (4 if args.sleeping else 2),
        "drained_batches": args.drained_batches,
        "layer": layer,
        "texts": texts,
    }
    usual = {"weak": 2, "strong": 1} if args.sleeping else dict.fromkeys(STUDIES, 3)
    parts = [ScalingCases(studies=(s,), repeat=args.repeat or usual[s], **common) for s in args.study]
    most = max(stages for cases in parts for _, stages, _ in cases.worlds())
    if not all(cases.measured(stages) for cases in parts for _, stages, _ in cases.worlds()):
        console.print(
            f"up to {most} stages on {cores()} cores: above {cores()}, wall-clock times are not meaningful. The "
            "processor time of every stage is measured beside them, and efficiency and speed-up are computed from it",
            soft_wrap=True,
            highlight=False,
        )
    settings = {
        "forward": layer.forward if args.sleeping else None,
        "backward": layer.backward if args.sleeping else None,
        "micro_batch": None if args.sleeping else args.micro_batch,
        "data": texts.origin if texts else "none",
        "threads_per_rank": 1,
    }
    save = _saver(args, "scaling", settings)
    rows: list[Row] = []
    with _bar(console, sum(cases.total_seconds() for cases in parts)) as bar:
        for cases in parts:
            done = list(rows)

            def progress(
                case: Any,
                seconds: float,
                new: Rows,
                cases: ScalingCases = cases,
                done: Rows = done,
            ) -> None:
                line = f"{case.study}, stages: {case.stages}, layers: {case.layers}, {case.method}"
                bar.advance(cases.case_seconds(case), f"{line}: {seconds:.2f} s")
                save([*done, *new])

            rows = [*done, *measure_scaling(cases, progress=progress)]
    show(console, "scaling", rows)
    save(rows, console=console)


def ceiling(args: argparse.Namespace, console: Console) -> None:
    """Compares streaming with the ceiling."""
    micro_batches = args.micro_batches[0] if args.micro_batches else 8
    networks = networks_on_two_stages(args.model or ("vgg", "transformer"), micro_batch=args.micro_batch)
    repeat = args.repeat or 7
    batches = -(-(args.total or 64) // micro_batches)
    save = _saver(args, "ceiling", {"micro_batch": args.micro_batch, "threads_per_rank": 1, "optimizer": "AdamW"})
    each = 2 * micro_batches * batches
    with _bar(console, estimated_seconds(networks, repeat * each)) as bar:
        share = bar.total / (len(networks) * repeat)

        def progress(model: str, rows: list[dict[str, Any]]) -> None:
            own = next(r for r in rows if (r["model"], r["method"]) == (model, "streaming"))
            bar.advance(share, f"{model}, run {own['repeats']}: {own['share_of_ceiling']:.3f} of the ceiling")
            save(rows)

        rows = measure_ceiling(networks, micro_batches=micro_batches, batches=batches, repeat=repeat, progress=progress)
    show(console, "ceiling", rows)
    save(rows, console=console)


def against_1f1b(args: argparse.Namespace, console: Console) -> None:
    """Compares the speed of streaming over 1F1B with its bound."""
    numbers_of = args.micro_batches or (2, 4, 8, 16)
    networks = networks_on_two_stages(
        args.model or ("vgg", "transformer"), micro_batch=args.micro_batch, dropout=args.dropout
    )
    repeat, total = args.repeat or 5, args.total or 32
    settings = {"micro_batch": args.micro_batch, "threads_per_rank": 1, "optimizer": "AdamW", "total": total}
    settings["dropout"] = args.dropout
    save = _saver(args, "bound", settings)
    with _bar(console, estimated_seconds(networks, repeat * 2 * total * len(numbers_of))) as bar:
        share = bar.total / (len(networks) * repeat)

        def progress(model: str, rows: list[dict[str, Any]]) -> None:
            own = [row for row in rows if row["model"] == model]
            ratios = ", ".join(f"M = {row['micro_batches']}: {row['ratio']:.3f}" for row in own)
            bar.advance(share, f"{model}, run {own[0]['repeats']}: {ratios}")
            save(rows)

        rows = measure_ratio(networks, micro_batches=numbers_of, total=total, repeat=repeat, progress=progress)
    show(console, "bound", rows)
    save(rows, console=console)


def _saver(args: argparse.Namespace, kind: str, settings: dict[str, Any]) -> Callable[..., None]:
    """Returns a function that writes rows as they are measured, and draws them at the end."""
    about = header(**settings)

    def save(rows: Rows, *, console: Console | None = None) -> None:
        if not args.json:
            return
        write(args.json, kind=kind, header=about, rows=rows)
        if console is not None:
            for path in (args.json, args.json.with_suffix(".csv"), *draw_results(read(args.json), args.json)):
                console.print(f"{path}", highlight=False)

    return save


def _bar(console: Console, seconds: float) -> Bar:
    minutes, left = divmod(round(seconds), 60)
    console.print(f"about {minutes} min {left:02d} s", highlight=False)
    return Bar(console, seconds)


if __name__ == "__main__":
    main()
