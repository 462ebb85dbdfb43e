"""Folding of the path from the last activation to the scores into the linear layer of the network's own head.

    greedy, next_token   the head is the model's own: no folding needed
    readout              the same
    token_codes          scores are products with the codes of all tokens: one matrix
    mse, decoded         code . body, then h_N .. h_1, all linear: one matrix, exact up to float rounding
    contrast, decode     the same
    contrast, nearest    cosines: scores are divided by the norm of the code, which is not linear. The predicted label
                         is that of a linear layer, which ``same="labels"`` selects

A network does not fold if its codes end with tanh, sigmoid or layer norm, or if its last bridge is user-defined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.convert.head import CodeHead
from ds_al.layer import ALLayer
from ds_al.objectives import Contrast, TokenCodes

Same = Literal["scores", "labels"]


@dataclass(frozen=True)
class Folded:
    """A linear layer that replaces a classifier: ``weight (V, D)``, ``bias (V,)`` or ``None``."""

    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def fold(layers: Sequence[ALLayer], *, num_classes: int, same: Same) -> Folded | str:
    """Returns the classifier with the scores of the full inference path, or the reason why there is none.

    Args:
        layers: all AL layers.
        num_classes: V.
        same: ``"labels"`` requires the same predicted label only.
    """
    last = layers[-1]
    objective = last.objective
    if objective.trains_decoder:
        linear = last.h
        return _folded([linear]) if isinstance(linear, nn.Linear) else f"its head is a {type(linear).__name__}"
    if not isinstance(last.b, CodeHead):
        return f"its last bridge is a {type(last.b).__name__}, not the model's head"
    if not isinstance(last.b.end, nn.Identity):
        return f"its codes end on {type(last.b.end).__name__}"
    if isinstance(objective, TokenCodes):
        codes = nn.Linear(last.b.code.out_features, num_classes, bias=False)
        codes.weight = nn.Parameter(_table(layers, num_classes))
        return _folded([last.b.code, codes])
    if isinstance(objective, Contrast) and objective.has_code_table:
        if same == "scores":
            return "its scores are cosines, which no linear layer gives"
        table = _table(layers, num_classes)
        nearest = nn.Linear(table.shape[1], num_classes, bias=False)
        nearest.weight = nn.Parameter(F.normalize(table, dim=1) / objective.log_temperature.exp())
        return _folded([last.b.code, nearest])
    chain: list[nn.Linear] = [last.b.code]
    for layer in reversed(layers):
        for part in _leaves(layer.h):
            if isinstance(part, nn.Linear):
                chain.append(part)
            elif not isinstance(part, nn.Identity):
                return f"a decoder has a {type(part).__name__}"
    return _folded(chain)


def _table(layers: Sequence[ALLayer], num_classes: int) -> Tensor:
    """Returns the codes of all classes at the last layer."""
    table = layers[-1].objective.all_classes(num_classes, device=next(layers[0].g.parameters()).device)
    for layer in layers:
        table = layer.g(table)
    return table


def _folded(chain: Sequence[nn.Linear]) -> Folded:
    """Multiplies the layers ``(D -> .. -> V)`` in double precision."""
    dtype = chain[0].weight.dtype
    weight = torch.eye(chain[0].in_features, dtype=torch.float64, device=chain[0].weight.device)
    bias = weight.new_zeros(chain[0].in_features)
    for linear in chain:
        weight = linear.weight.double() @ weight
        bias = linear.weight.double() @ bias + (0 if linear.bias is None else linear.bias.double())
    has_bias = any(linear.bias is not None for linear in chain)
    return Folded(weight.to(dtype), bias.to(dtype) if has_bias else None)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for child in children:
        yield from _leaves(child)
