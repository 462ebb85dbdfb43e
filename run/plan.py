"""Predicts which method is fastest, and by how much, for a network on P stages and a given link speed.

    python run/plan.py --config ds_configs/ag_news_transformer_al.json --stages 2,4 --link 1gbit --micro-batches 4..64
    python run/plan.py --profile docs/results/profile_transformer.json --stages 2,4 --micro-batches 4,8,16 --link 1gbit
    python run/plan.py --forward-ms 400 --backward-ms 800 --rho 1.05 --stages 4,8,64 --micro-batches 4..64
    python run/plan.py --config ds_configs/cifar10_vgg_al.json --layers 1,2,4 --stages 4,8 --memory-limit-gbyte 16 \
        --accuracy docs/results/long.json --accuracy-group "CIFAR-10 (10,000 images), VGG" --loss 1
    python run/plan.py --against docs/results/sleeping.json --json docs/results/planner.json

Times come from a config (operations and bytes are counted and converted to seconds by the rates of a device; --measure
times the layers on this machine), from a run/profile.py file with `streaming` and `bp_1f1b`, or from options. With
more stages than AL layers, K < P, a layer spans a group of stages (docs/dial.md). The last command predicts measured
runs and reports the prediction errors.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from ds_al.config.base import read_file
from ds_al.errors import ALConfigError, ALError
from ds_al.figures.terminal import Console
from ds_al.planner import (
    COMPARED,
    METHODS,
    Link,
    Machines,
    Prediction,
    Wishes,
    Work,
    advice,
    best_of_all,
    break_even,
    grid,
    summary,
)
from ds_al.planner.network import Device, PlannedNetwork
from ds_al.planner.show import bytes_per_second, cases, draw, markdown, overview, table
from ds_al.studies.bench.arguments import numbers, positive
from ds_al.studies.bench.predictions import against, work_of_profile
from ds_al.studies.results import header, read, write
from ds_al.studies.sweep.over_layers import Accuracies
from ds_al.studies.tables.documents import fill, show
from ds_al.system.arguments import amount, more_than_zero, output_file

_LARGEST = 1 << 22
"""Stages x micro-batches up to which a schedule is simulated in reasonable time."""


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--config", metavar="JSON", type=Path, help="plan for the network of this config of run/train.py")
    add("--measure", action="store_true", help="with --config: time the layers on this machine")
    add("--tflops", type=more_than_zero, default=10.0, help="with --config: operations per second (default: 10e12)")
    add(
        "--memory-gbyte",
        type=more_than_zero,
        default=500.0,
        help="with --config: GB/s of memory, for the step (default: 500)",
    )
    add("--profile", metavar="JSON", type=Path, help="read times, rho and bytes from this file of run/profile.py")
    add("--forward-ms", type=more_than_zero, help="forward of one micro-batch through the whole twin")
    add("--backward-ms", type=amount, help="backward of one micro-batch (default: twice the forward)")
    add("--step-ms", type=amount, help="one optimizer step of the whole network (default: 0)")
    add(
        "--rho",
        type=more_than_zero,
        help="compute of the AL form relative to the twin (default: 1; see docs/models.md)",
    )
    add("--activation-mb", type=amount, help="megabytes sent from stage to stage per micro-batch (default: 0)")
    add("--target-mb", type=amount, help="additional megabytes of an AL message (default: 0)")
    add("--parameters", type=amount, help="parameters of the network (4 bytes each), for data parallel training")
    add("--stages", type=numbers, default=(2, 4, 8), help="comma-separated (default: 2,4,8)")
    add("--layers", type=numbers, default=(1, 2, 4), help="K, numbers of AL layers below P (default: 1,2,4)")
    add("--micro-batches", type=numbers, default=(4, 8, 16, 32, 64), help="micro-batches per batch (default: 4..64)")
    add("--link", default=None, help="speed between neighbours, such as 100mbit or 400gbit (default: no limit)")
    add("--latency-ms", type=amount, default=0.0, help="message latency (default: 0)")
    add("--queue-depth", type=positive, help="messages in flight per AL stage (default: the config's, or 2)")
    add("--memory-limit-gbyte", type=more_than_zero, help="memory of a device (default: no limit)")
    add("--accuracy", metavar="JSON", type=Path, help="accuracy over K, from this file of run/compare.py")
    add("--accuracy-group", metavar="TEXT", default="", help="with --accuracy: the group with this text in its name")
    add("--loss", type=amount, default=1.0, help="with --accuracy: points that AL may lose to the twin (default: 1)")
    add("--methods", type=_methods, default=COMPARED, help=f"comma-separated (default: {','.join(COMPARED)})")
    add(
        "--all", action="store_true", help="print a row per prediction, with memory and bytes, and advice for each P, M"
    )
    add("--against", metavar="JSON", type=Path, nargs="+", help="predict the measured runs of these files")
    add("--overheads", metavar="JSON", type=Path, default=Path("docs/results/profile_sleeping.json"),
        help="with --against: profile of sleeping layers, for overheads (default: %(default)s)")  # fmt: skip
    add("--tables", metavar="DOC", type=Path, help="with --against and --json: document whose table is updated")
    add("--json", metavar="PATH", type=output_file, help="write header and rows to PATH, and a CSV file next to it")
    add("--markdown", metavar="PATH", type=output_file, help="write the table and the advice to PATH")
    add("--figure", metavar="PATH", type=output_file, help="draw times over M to PATH (PNG and SVG)")
    return p


def main() -> None:
    """Predicts times and prints advice."""
    args = parser().parse_args()
    console = Console()
    if args.tables and not (args.against and args.json):
        sys.exit("error: --tables goes with --against and --json")
    if args.against:
        return compare(args, console)
    try:
        with console.status("looking at the network"):
            work, machines, origin, layers, micro_batch = _given(args)
            wishes, judged = _wishes(args)
        link = Link(bytes_per_second(args.link) if args.link else float("inf"), args.latency_ms / 1000)
    except (ValueError, ALError) as error:
        sys.exit(f"error: {error}")
    if max(args.stages) * max(args.micro_batches) > _LARGEST:
        sys.exit(
            f"error: got --stages {max(args.stages)} and --micro-batches {max(args.micro_batches)}: expected a product "
            f"of {_LARGEST:,} at most, since schedules are simulated"
        )
    machines = replace(machines, links=link, queue_depth=args.queue_depth or machines.queue_depth)
    with console.status("simulating"):
        found = list(
            grid(
                work,
                stages=list(args.stages),
                micro_batches=list(args.micro_batches),
                machines=machines,
                methods=args.methods,
                layers=layers,
            )
        )
        sentences = _advice(found, work, machines, wishes)
    notes = [origin, *judged, *_caveats(work, args.stages)]
    best = best_of_all(found, wishes, micro_batch=micro_batch)
    console.print(table(found) if args.all else overview(found))
    for line in (*notes, *(sentences if args.all else summary(found, wishes)), *best):
        console.print(line, highlight=False, soft_wrap=True)
    origin_of = header(work=asdict(work), origin=origin, link=args.link, latency_ms=args.latency_ms)
    if args.json:
        write(args.json, kind="predictions", header=origin_of, rows=[asdict(each) for each in found])
    if args.markdown:
        _write_page(args.markdown, origin_of["command"], notes, [*sentences, *best], found)
    if args.figure:
        for path in draw(found, args.figure):
            console.print(f"{path}", highlight=False)


def compare(args: argparse.Namespace, console: Console) -> None:
    """Compares predictions with measured runs."""
    try:
        rows = against(args.against, profile=args.overheads)
        show(console, "planner", rows)
        if args.json:
            write(args.json, kind="planner", header=header(overheads=str(args.overheads)), rows=rows)
        if args.tables:
            fill(args.tables, [args.json])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not {"streaming", "bp_1f1b"} <= set(names) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"got {text!r}: expected streaming, bp_1f1b, and any of {', '.join(METHODS)}")
    return names


def _wishes(args: argparse.Namespace) -> tuple[Wishes, list[str]]:
    """Returns the limits of memory and accuracy, and a description of the source of accuracies.

    Raises:
        StudyError: the file has no accuracies over K.
    """
    memory = args.memory_limit_gbyte * 1e9 if args.memory_limit_gbyte else float("inf")
    if not args.accuracy:
        return Wishes(memory_bytes=memory), []
    known = Accuracies.of(read(args.accuracy).rows, group=args.accuracy_group)
    told = (
        f"Accuracies of {args.accuracy}: {known.group}, `{known.best}`, the best on validation samples among the "
        "methods with the most runs."
    )
    return Wishes(memory, known.points(), args.loss), [told]


class Given(NamedTuple):
    """The network and machines to plan for.

    Attributes:
        work: cost of the network.
        machines: the machines, without their links.
        origin: description of the source.
        layers: cost of the network in K layers, by K.
        micro_batch: samples of a micro-batch, if known.
    """

    work: Work
    machines: Machines
    origin: str
    layers: Mapping[int, Work]
    micro_batch: int | None


def _given(args: argparse.Namespace) -> Given:
    """Returns what the arguments describe.

    Raises:
        ValueError: no config, profile or forward time is given, or the profile lacks a method.
        ALConfigError: the config is invalid.
    """
    given = {
        "forward": args.forward_ms and args.forward_ms / 1000,
        "backward": args.backward_ms and args.backward_ms / 1000,
        "step": args.step_ms and args.step_ms / 1000,
        "rho": args.rho,
        "message_bytes": args.activation_mb and args.activation_mb * 1e6,
        "target_bytes": args.target_mb and args.target_mb * 1e6,
        "parameter_bytes": args.parameters and 4 * args.parameters,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if args.measure and not args.config:
        raise ValueError("--measure goes with --config")
    if args.config:
        config = read_file(args.config)
        network = PlannedNetwork.of(config)
        device = Device(args.tflops * 1e12, args.memory_gbyte * 1e9)

        def cost(network: PlannedNetwork) -> Work:
            return replace(network.measured() if args.measure else network.work(device), **given)

        work = cost(network)
        how = "timed on this machine" if args.measure else f"counted, at {device.says}"
        origin = f"{args.config}: {how}; F = {1000 * work.forward:.4g} ms, B = {1000 * work.backward:.4g} ms."
        layers = {k: cost(each) for k, each in _in_layers(config, args.layers)}
        return Given(work, network.machines, origin, layers, network.micro_batch)
    values = {**(work_of_profile(args.profile) if args.profile else {}), **given}
    if "forward" not in values:
        raise ValueError("no times: give --config, --forward-ms, or --profile with a file of run/profile.py")
    work = Work(**{"backward": 2 * values["forward"], **values})
    origin = f"Times {f'from {args.profile}' if args.profile else 'as given'}."
    return Given(work, Machines(), origin, dict.fromkeys(args.layers, work), None)


def _in_layers(config: dict[str, Any], layers: Sequence[int]) -> Iterator[tuple[int, PlannedNetwork]]:
    """Yields the network in K layers, for each K that it has blocks for."""
    for k in layers:
        with contextlib.suppress(ALConfigError):
            network = PlannedNetwork.of(config, layers=k)
            if len(network.al) == k:
                yield k, network


def _caveats(work: Work, stages: Sequence[int]) -> list[str]:
    if not work.layers or max(stages) <= len(work.layers):
        return []
    return [
        f"The network has {len(work.layers)} AL layers: for more stages than that, each is taken to be an equal part "
        "of it, at the same rho. More layers have more bridges, and raise rho."
    ]


def _advice(found: Sequence[Prediction], work: Work, machines: Machines, wishes: Wishes) -> list[str]:
    even = {p: break_even(work, stages=p, machines=machines) for p in dict.fromkeys(each.stages for each in found)}
    return [advice(own, work, even=even[own[0].stages], wishes=wishes) for own in cases(found)]


def _write_page(
    path: Path, command: str, notes: Sequence[str], sentences: Sequence[str], found: Sequence[Prediction]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    legend = "Predicted, not measured; (f) by formula, at the least."
    advised = "\n".join(f"* {sentence}" for sentence in sentences)
    path.write_text(f"{' '.join(notes)} {legend}\n\n{markdown(found)}\n{advised}\n\n`{command}`\n")


if __name__ == "__main__":
    main()
