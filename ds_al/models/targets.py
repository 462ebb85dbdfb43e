"""The target side of a network, alike for every model: g and h of each AL layer, and where codes live.

A code ``(B, K)`` ends on one of four sets, by the module that g and b end with:

    tanh        cube [-1, 1]^K                    published for text
    sigmoid     cube [0, 1]^K                     published for vision; saturates with many classes
    layer_norm  sphere of radius sqrt(K), mean 0  mean squared error is a cosine distance there
    linear      all of R^K                        g is free to scale codes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.errors import ALConfigError
from ds_al.models.output import Output
from ds_al.objectives import resolve

CODES: dict[str, Callable[[int], nn.Module]] = {
    "tanh": lambda width: nn.Tanh(),
    "sigmoid": lambda width: nn.Sigmoid(),
    "layer_norm": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "linear": lambda width: nn.Identity(),
}
"""What g and b end with, by name: ``width K -> module``."""


def default_code_width(num_classes: int) -> int:
    """K where none is given: about V, at least 64, a multiple of 64. Narrower tables hold many classes badly."""
    return 64 * max(1, -(-num_classes // 64))


def code_end(code: str, width: int) -> nn.Module:
    """Builds the module that g and b end with.

    Raises:
        ALConfigError: the name is not in :data:`CODES`.
    """
    if code not in CODES:
        raise ALConfigError(f"got code={code!r}: expected one of {sorted(CODES)}")
    return CODES[code](width)


class CodeMap(nn.Sequential):
    """Linear, then onto the set of codes: ``(B, K_{i-1}) -> (B, K_i)`` as g, and the other way as h."""

    def __init__(self, width_in: int, width_out: int, *, code: str) -> None:
        super().__init__(Output(width_in, width_out), code_end(code, width_out))


def target_side(
    num_layers: int,
    *,
    num_classes: int,
    code_width: int,
    code: str,
    cross_entropy: bool = True,
    scores: Literal["linear", "tanh"] = "linear",
    objective: str | Mapping[str, Any] = "mse",
) -> list[dict[str, Any]]:
    """``g``, ``h``, ``autoencoder_loss`` and ``objective`` of each layer, as keyword arguments of ``ALLayerSpec``.

    Args:
        num_layers: N.
        num_classes: V, the width of the labels that enter the first g.
        code_width: K, the same in every layer.
        code: a key of :data:`CODES`.
        cross_entropy: reads labels in the first layer by cross-entropy, as published for text; otherwise, and
            in later layers, by mean squared error.
        scores: what the first h ends with where labels are read by cross-entropy. ``"tanh"`` is published for text,
            and keeps scores within [-1, 1].
        objective: name, or ``{"name": ..., option: value}``, see :mod:`ds_al.objectives`. ``greedy`` has no target
            side: h is each layer's classifier.

    Raises:
        ALConfigError: ``code``, ``scores`` or the objective is unknown.
    """
    if scores not in ("linear", "tanh"):
        raise ALConfigError(f"got scores={scores!r}: expected 'linear' or 'tanh'")
    code_end(code, code_width)  # an unknown name is refused here, not on the stage that builds
    if resolve(objective).trains_decoder:
        classifier = LayerSpec(Output, code_width, num_classes)
        return [{"g": LayerSpec(nn.Identity), "h": classifier, "objective": objective} for _ in range(num_layers)]
    widths = [num_classes] + [code_width] * num_layers
    side = []
    for i in range(num_layers):
        by_cross_entropy = cross_entropy and i == 0
        # Published for vision: h ends on a sigmoid, too. Scores of a cross-entropy must be free in size.
        back = scores if by_cross_entropy else "sigmoid" if code == "sigmoid" else "linear"
        side.append(
            {
                "g": LayerSpec(CodeMap, widths[i], widths[i + 1], code=code),
                "h": LayerSpec(CodeMap, widths[i + 1], widths[i], code=back),
                "autoencoder_loss": "cross_entropy" if by_cross_entropy else "mse",
                "objective": objective,
            }
        )
    return side
