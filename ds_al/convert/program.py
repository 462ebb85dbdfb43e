"""The inference path as one module, and its export as a program that runs without ds_al."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.tensors import Activation

Format = Literal["torch.export", "torchscript", "onnx"]
FILES: dict[str, str] = {"torch.export": "inference.pt2", "torchscript": "inference.ts", "onnx": "inference.onnx"}
"""File name of each format."""


class InferencePath(nn.Module):
    """``x -> f_1 .. f_m``, then the scores of that exit: ``(B, V)``.

    Args:
        layers: all AL layers.
        num_classes: V.
        exit: m; by default the last layer.
        average: number of exits, m the last of them, whose mean probability is taken; the scores are its log.
    """

    def __init__(
        self, layers: Sequence[ALLayer], *, num_classes: int, exit: int | None = None, average: int = 1
    ) -> None:
        super().__init__()
        self.path = tuple(layers[: len(layers) if exit is None else exit])
        self.layers = nn.ModuleList(self.path)
        self.first_exit = len(self.path) - average
        if self.path[-1].objective.has_code_table:
            table = self.path[-1].objective.all_classes(num_classes, device=next(self.parameters()).device)
            for number, layer in enumerate(self.path):
                with torch.no_grad():
                    table = layer.g(table)
                if number >= self.first_exit:
                    self.register_buffer(f"table_{number}", table)

    def forward(self, *x: Tensor) -> Tensor:
        """Accepts the tensors of ``x`` as separate arguments."""
        s: Any = x if len(x) > 1 else x[0]
        exits = []
        for number, layer in enumerate(self.path):
            s = layer.f(s)
            if number >= self.first_exit:
                table = getattr(self, f"table_{number}", None)
                earlier = [each.h for each in self.path[:number]]
                exits.append(layer.objective.scores(layer, s, earlier=earlier, table=table))
        if len(exits) == 1:
            return exits[0]
        return torch.stack([scores.softmax(dim=-1) for scores in exits]).mean(dim=0).log()


@torch.no_grad()
def write(path: InferencePath, example: Activation, folder: Path, *, format: Format) -> Path:
    """Writes a program for any batch size and, if the model can be traced so, any text length.

    Raises:
        ALConfigError: the format is unknown, or needs a package that is not installed.
    """
    check_format(format)
    parts = tuple(part.cpu() for part in (example if isinstance(example, tuple) else (example,)))
    path = path.cpu().eval()
    file = folder / FILES[format]
    folder.mkdir(parents=True, exist_ok=True)
    if format == "torchscript":
        torch.jit.save(torch.jit.trace(path, parts, check_trace=False), str(file))
        return file
    if format == "onnx":
        torch.onnx.export(path, parts, str(file), dynamo=True, dynamic_shapes=(_dynamic(parts),), external_data=False)
        return file
    torch.export.save(_exported(path, parts), str(file))
    return file


def check_format(format: str | None) -> None:
    """Checks a format before anything is written.

    Raises:
        ALConfigError: the format is unknown, or needs a package that is not installed.
    """
    if format is not None and format not in FILES:
        raise ALConfigError(f"got program={format!r}: expected one of {', '.join(FILES)}")
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise ALConfigError(f'program="onnx" needs {" and ".join(missing)}: pip install {" ".join(missing)}')


def _exported(path: nn.Module, parts: tuple[Tensor, ...]) -> Any:
    return torch.export.export(path, parts, dynamic_shapes=(_dynamic(parts),), strict=False)


def _dynamic(parts: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """Marks the first dimension as dynamic, and the second one of token ids."""
    batch, length = torch.export.Dim.AUTO, torch.export.Dim.AUTO
    return tuple({0: batch} if part.is_floating_point() or part.ndim < 2 else {0: batch, 1: length} for part in parts)
