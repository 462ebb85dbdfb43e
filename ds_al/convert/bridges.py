"""Choice of a bridge by the shape of an activation, for networks of which only shapes are known.

    (B, C, H, W)                     a narrow copy of the later layers, mean, linear  (:mod:`ds_al.models.bridges`)
    (hidden (B, T, D), .., mask)     the masked mean over tokens, linear              (:mod:`ds_al.models.sequence`)
    (B, T, D)                        the mean over tokens, linear
    (B, D)                           linear

The shape of a tuple is that of its first tensor; a tuple has a mask if its last tensor is boolean ``(B, T)``.
For causal language models the bridge maps each token: layer norm, linear, ``(B, T, D) -> (B, T, K)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.models.bridges import BridgeOptions, CopiedStage, MimicBridge
from ds_al.models.sequence import SequenceBridge, masked_mean
from ds_al.tensors import Activation, first


def bridge(
    s: Activation, later: Sequence[Activation], *, code_width: int, code: str, per_token: bool
) -> dict[str, Any]:
    """Returns ``b`` and ``reduce`` of one layer, as keyword arguments of ``ALLayerSpec``.

    Args:
        s: an activation with the shape of the layer's output, on any device including meta.
        later: the same for each later layer.
        code_width: K.
        code: set of codes, see :mod:`ds_al.models.targets`.
        per_token: whether every token has scores.

    Raises:
        ALConfigError: there is no bridge for this shape.
    """
    hidden = first(s)
    if per_token and hidden.ndim == 3:
        return {"b": LayerSpec(TokenBridge, hidden.shape[2], code_width), "reduce": first}
    if hidden.ndim == 4:
        stages = _stages(hidden, [first(each) for each in later])
        b = LayerSpec(
            MimicBridge, hidden.shape[1], stages, options=BridgeOptions(), code_width=code_width, code=code
        )  # fmt: skip
        return {"b": b, "reduce": first}
    reduce: Callable[[Activation], Activation]
    if hidden.ndim == 3:
        reduce = masked_mean if has_mask(s) else token_mean
    elif hidden.ndim == 2:
        reduce = first
    else:
        raise ALConfigError(
            f"a layer returns {tuple(hidden.shape)}: bridges are known for (B, C, H, W), (B, T, D) and (B, D). Give "
            "bridges=[...], one LayerSpec or module per AL layer that makes a code (B, K) of it"
        )
    return {"b": LayerSpec(SequenceBridge, hidden.shape[-1], code_width=code_width, code=code), "reduce": reduce}


class TokenBridge(nn.Sequential):
    """Token-wise bridge: ``(B, T, D) -> (B, T, K)``."""

    def __init__(self, width: int, code_width: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, code_width))


def token_mean(s: Activation) -> Tensor:
    """Returns the mean over the tokens of ``(B, T, D)``: ``(B, D)``."""
    return first(s).mean(dim=1)


def has_mask(s: Activation) -> bool:
    """Returns whether the last tensor of an activation is a mask over the tokens of the first."""
    return isinstance(s, tuple) and s[-1].dtype == torch.bool and s[-1].shape == s[0].shape[:2]


def _stages(here: Tensor, later: Sequence[Tensor]) -> list[CopiedStage]:
    """Returns the stages that a mimic bridge copies: the following layers up to the first whose output is not a map."""
    stages = []
    for there in later:
        if there.ndim != 4:
            break
        halvings = math.log2(max(1, here.shape[2]) / max(1, there.shape[2]))
        stages.append(CopiedStage(there.shape[1], max(0, round(halvings))))
        here = there
    return stages
