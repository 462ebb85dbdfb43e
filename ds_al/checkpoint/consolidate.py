"""``python -m ds_al consolidate CHECKPOINT OUT`` writes the weights of all layers into one safetensors file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ds_al.errors import ALCheckpointError


def consolidate(checkpoint: str | Path, out: str | Path, *, tag: str | None = None, backprop: bool = False) -> int:
    """Writes the weights of a checkpoint, saved on any number of stages, as one safetensors file.

    Names are those of an :class:`~ds_al.module.ALPipelineModule` on one stage, ``"<layer>.f.<name>"``, as its
    ``load_state_dict`` expects them. No process group and no GPU is needed.

    Args:
        checkpoint: folder of checkpoints, of which the latest is used, or of one checkpoint.
        out: file to write.
        tag: tag of the checkpoint; by default the latest.
        backprop: whether to write the chain of all f alone, named as in a plain ``PipelineModule``,
            ``"<layer>.<name>"``. The head of a twin is not included.

    Returns:
        The number of tensors.

    Raises:
        ALCheckpointError: no checkpoint was found, or a file is missing, truncated or altered.
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
    """Adds the command ``consolidate`` to ``python -m ds_al``."""
    command = commands.add_parser("consolidate", help="write the weights of a checkpoint as one safetensors file")
    command.add_argument("checkpoint", help="folder of checkpoints, of which the latest is used, or of one checkpoint")
    command.add_argument("out", help="file to write, such as weights.safetensors")
    command.add_argument("--tag", help="tag of the checkpoint; by default the latest")
    command.add_argument(
        "--backprop", action="store_true", help="write the chain of all f alone, as in the backprop twin"
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
