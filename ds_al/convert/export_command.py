"""``python -m ds_al export CHECKPOINT OUT``: exports a checkpoint as a plain model of transformers, without ranks."""

from __future__ import annotations

import argparse
import sys
from typing import Any

_PROGRAMS = ("torch.export", "torchscript", "onnx")


def add_command(commands: Any) -> None:
    """Adds ``export`` to ``python -m ds_al``."""
    command = commands.add_parser("export", help="write the plain model of transformers that a checkpoint holds")
    command.add_argument("checkpoint", help="folder of checkpoints, whose latest is taken, or of one checkpoint")
    command.add_argument("out", help="folder to write, for from_pretrained of transformers")
    command.add_argument("--tag", help="of the checkpoint, instead of the latest")
    command.add_argument(
        "--same",
        choices=("scores", "labels"),
        default="scores",
        help="labels: content with a classifier that names the same labels, for the objective contrast",
    )
    command.add_argument("--program", choices=_PROGRAMS, help="also write the inference path as a program")
    command.add_argument(
        "--exit", type=int, help="write the program of an earlier exit: number of layers that x passes"
    )
    command.add_argument(
        "--average", type=int, default=1, help="write the program of the mean of so many exits (default: 1)"
    )
    command.add_argument("--adapter", action="store_true", help="also write the adapter of peft by itself")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ds_al.convert.export import export  # lazy: imports DeepSpeed
    from ds_al.errors import ALError

    try:
        kind = export(
            args.checkpoint, args.out, tag=args.tag, same=args.same, program=args.program, adapter=args.adapter,
            exit=args.exit, average=args.average,
        )  # fmt: skip
    except (ALError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{kind} in {args.out}")
    return 0
