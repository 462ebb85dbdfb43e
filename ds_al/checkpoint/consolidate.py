"""``python -m ds_al consolidate CHECKPOINT OUT``: the weights of all layers in one file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ds_al.errors import ALCheckpointError


def consolidate(checkpoint: str | Path, out: str | Path, *, tag: str | None = None, backprop: bool = False) -> int:
    """Writes the weights of a checkpoint, saved by any number of stages, as one safetensors file.

    Names are those of an :class:`~ds_al.module.ALPipelineModule` on one stage, ``"<layer>.f.<name>"``, so that its
    ``load_state_dict`` accepts them. It needs neither a process group nor a GPU.

    Args:
        checkpoint: folder of checkpoints, whose latest is taken, or of one checkpoint.
        out: file to write.
        tag: of the checkpoint, instead of the latest.
        backprop: only the chain of all f, named as in a plain ``PipelineModule``, ``"<layer>.<name>"``. A twin's head
            is no part of it.

    Returns:
        The number of tensors.

    Raises:
        ALCheckpointError: there is no checkpoint, or a file is missing, truncated or altered.
    """
    from safetensors.torch import save_file

    from ds_al.checkpoint.folder import layer_weights, opened

    folder, index = opened(checkpoint, tag)
    weights: dict[str, Any] = {}
    for layer, state in layer_weights(folder, index).items():
        for name, value in state.items():
            if not backprop:
                weights[f"{layer}.{name}"] = value
            elif name.startswith("f."):
                weights[f"{layer}.{name.removeprefix('f.')}"] = value
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    save_file(weights, part, metadata={"format": "pt", "steps": str(index["counters"]["global_steps"])})
    part.replace(out)
    return len(weights)


def add_command(commands: Any) -> None:
    """Adds ``consolidate`` to ``python -m ds_al``."""
    command = commands.add_parser("consolidate", help="write the weights of a checkpoint as one safetensors file")
    command.add_argument("checkpoint", help="folder of checkpoints, whose latest is taken, or of one checkpoint")
    command.add_argument("out", help="file to write, such as weights.safetensors")
    command.add_argument("--tag", help="of the checkpoint, instead of the latest")
    command.add_argument(
        "--backprop", action="store_true", help="the chain of all f alone, as the backprop twin has it"
    )
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        count = consolidate(args.checkpoint, args.out, tag=args.tag, backprop=args.backprop)
    except (ALCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} tensors in {args.out}")
    return 0
