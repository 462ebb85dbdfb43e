"""Breaks down the time of each method: timelines, measured bubble compared with the formula, idle time by cause.

    python run/profile.py --sleeping --stages 4 --micro-batches 4,8,16 --json docs/results/profile_sleeping.json
    python run/profile.py --model transformer --stages 2 --micro-batches 8 --json docs/results/profile_transformer.json
    python run/profile.py --tracing-cost --model transformer --stages 2 --json docs/results/tracing_cost.json
    python run/profile.py --tables docs/profiling.md docs/results/profile_sleeping.json docs/results/tracing_cost.json

Writes rows as JSON and CSV, and next to them a timeline for each number of micro-batches, with a model also the
memory over time. Sleeping layers take time but no core, so their times show the schedules on any machine. A model
computes on random data, so every stage needs its own core.
"""

from __future__ import annotations

import sys

if __name__ == "profile":
    # Python's cProfile imports a module of this name, which this file shadows for all scripts of its folder.
    import importlib.util
    import os

    _spec = importlib.util.spec_from_file_location("profile", os.path.join(os.path.dirname(os.__file__), "profile.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules["profile"] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
else:
    import argparse
    from functools import partial
    from pathlib import Path

    from ds_al.figures.terminal import Console
    from ds_al.launch.ranks import RankFailure
    from ds_al.models import AL_MODELS
    from ds_al.studies.bench.arguments import names, numbers, positive
    from ds_al.studies.bench.profile import ProfileCases
    from ds_al.studies.bench.recorded import Recorded
    from ds_al.studies.bench.tracing_cost import measure_tracing_cost
    from ds_al.studies.bench.workloads import METHODS, RECORDED
    from ds_al.studies.results import header, write
    from ds_al.studies.tables.documents import fill, show
    from ds_al.system.arguments import amount, output_file


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, metavar="JSON", help="with --tables: results files")
    p.add_argument(
        "--methods",
        type=partial(names, known=RECORDED),
        default=METHODS,
        help=f"comma-separated, of {','.join(RECORDED)} (default: all but the last one)",
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--sleeping", action="store_true", help="sleeping layers, one per stage")
    what.add_argument("--model", choices=sorted(AL_MODELS), help="a small network on random data")
    what.add_argument("--tables", metavar="DOC", type=Path, help="write the tables of the JSON files into a document")
    p.add_argument("--stages", type=positive, default=4, help="number of stages, one process each (default: 4)")
    p.add_argument(
        "--micro-batches", type=numbers, default=(4,), help="micro-batches per batch, comma-separated (default: 4)"
    )
    p.add_argument("--micro-batch", type=positive, default=32, help="samples per micro-batch of a model (default: 32)")
    p.add_argument("--batches", type=positive, default=3, help="batches per recorded run (default: 3)")
    p.add_argument("--repeat", type=positive, default=3, help="recordings per case; medians are reported (default: 3)")
    p.add_argument("--forward-ms", type=amount, default=50.0, help="sleep of a layer's forward (default: 50)")
    p.add_argument("--backward-ms", type=amount, default=50.0, help="sleep of a layer's backward (default: 50)")
    p.add_argument(
        "--json", metavar="PATH", type=output_file, help="write header and rows to PATH, CSV and figures next to it"
    )
    p.add_argument(
        "--figure", metavar="PATH", type=output_file, help="write only the timeline to PATH (PNG and SVG); "
        "needs a single number of micro-batches",
    )  # fmt: skip
    p.add_argument("--trace", metavar="DIR", type=Path, help="write trace.json and trace.csv of each case below DIR")
    p.add_argument("--tracing-cost", action="store_true", help="measure the slow-down of a batch by tracing instead")
    return p


def main() -> None:
    """Runs one measurement."""
    p = parser()
    args = p.parse_args()
    if args.files and not args.tables:
        p.error(f"got {args.files[0]}: JSON files go with --tables")
    if args.tables:
        try:
            for name in fill(args.tables, args.files):
                print(f"{args.tables}: {name}")
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        return
    if args.figure and len(args.micro_batches) > 1:
        p.error(f"--figure got {len(args.micro_batches)} numbers of micro-batches: give one, or use --json")
    cases = ProfileCases(
        methods=args.methods,
        stages=args.stages,
        micro_batches=args.micro_batches,
        batches=args.batches,
        repeat=args.repeat,
        model=args.model,
        micro_batch=args.micro_batch,
        forward=args.forward_ms / 1000,
        backward=args.backward_ms / 1000,
    )
    try:
        (tracing_cost if args.tracing_cost else profile)(cases, args, Console())
    except RankFailure as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; no rank is left")


def profile(cases: ProfileCases, args: argparse.Namespace, console: Console) -> None:
    """Records all cases, and writes tables and figures."""
    recorded, written = Recorded.of(cases, console), []
    show(console, "profile", recorded.rows)
    if args.json:
        settings = {key: getattr(cases, key) for key in ("batches", "repeat", "forward", "backward", "micro_batch")}
        write(args.json, kind="profile", header=header(**settings), rows=recorded.rows)
        written += [args.json, args.json.with_suffix(".csv")]
    for m in cases.micro_batches:
        if args.figure or args.json:
            written += recorded.draw(args.figure or args.json.with_name(f"{args.json.stem}-m{m}.png"), m)
        if args.json:
            written += recorded.draw_memory(args.json.with_name(f"{args.json.stem}-memory-m{m}.png"), m)
        if args.trace:
            written += recorded.write_traces(args.trace, m)
    for path in written:
        console.print(f"{path}", highlight=False)


def tracing_cost(cases: ProfileCases, args: argparse.Namespace, console: Console) -> None:
    """Times batches with and without a recorder, alternating."""
    rows = measure_tracing_cost(cases)
    show(console, "tracing_cost", rows)
    if args.json:
        settings = header(batches=cases.batches, micro_batch=cases.micro_batch)
        write(args.json, kind="tracing_cost", header=settings, rows=rows)


if __name__ == "__main__":
    main()
