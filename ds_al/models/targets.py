"""Target side of all models: g and h of each AL layer, and the set of codes.

The last module of g and b maps a code ``(B, K)`` onto one of four sets:

    tanh        cube [-1, 1]^K                    published for text
    sigmoid     cube [0, 1]^K                     published for vision; saturates with many classes
    layer_norm  sphere of radius sqrt(K), mean 0  mean squared error equals a cosine distance there
    linear      all of R^K                        g may scale codes freely
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
"""Last module of g and b, by name: ``width K -> module``."""


def default_code_width(num_classes: int) -> int:
    """Returns the default K: about V, at least 64, a multiple of 64. Narrow codes represent many classes poorly."""
    return 64 * max(1, -(-num_classes // 64))


def code_end(code: str, width: int) -> nn.Module:
    """Builds the last module of g and b.

    Raises:
        ALConfigError: the name is not in :data:`CODES`.
    """
    if code not in CODES:
        raise ALConfigError(f"got code={code!r}: expected one of {sorted(CODES)}")
    return CODES[code](width)


class CodeMap(nn.Sequential):
    """Linear layer and end of code: ``(B, K_{i-1}) -> (B, K_i)`` as g, and the reverse as h."""

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
    """Returns ``g``, ``h``, ``autoencoder_loss`` and ``objective`` of each layer, as keyword arguments of
    ``ALLayerSpec``.

    Args:
        num_layers: N.
        num_classes: V, the width of the labels that are the input of the first g.
        code_width: K, the same in every layer.
        code: a key of :data:`CODES`.
        cross_entropy: uses cross-entropy as the autoencoder loss of the first layer, as published for text; otherwise,
            and in later layers, the loss is the mean squared error.
        scores: last module of the first h with cross-entropy. ``"tanh"`` is published for text and bounds scores to
            [-1, 1].
        objective: name, or ``{"name": ..., option: value}``, see :mod:`ds_al.objectives`. ``greedy`` has no target
            side: h is each layer's classifier.
    Raises:
        ALConfigError: ``code``, ``scores`` or the objective is unknown.
    """
    if scores not in ("linear", "tanh"):
        raise ALConfigError(f"got scores={scores!r}: expected 'linear' or 'tanh'")
    code_end(code, code_width)  # raises here, not on the stage that builds
    if resolve(objective).trains_decoder:
        classifier = LayerSpec(Output, code_width, num_classes)
        return [{"g": LayerSpec(nn.Identity), "h": classifier, "objective": objective} for _ in range(num_layers)]
    widths = [num_classes] + [code_width] * num_layers
    side = []
    for i in range(num_layers):
        by_cross_entropy = cross_entropy and i == 0
        # Published for vision: h ends with a sigmoid, too. Scores of a cross-entropy must be unbounded.
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
