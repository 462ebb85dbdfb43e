"""Assembly of AL layers from blocks and a head: f as given, b chosen by the output of each f, new g and h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al.convert.bridges import bridge
from ds_al.convert.head import CodeHead, Head
from ds_al.errors import ALConfigError
from ds_al.models.targets import default_code_width, target_side
from ds_al.models.text_bridges import whole
from ds_al.objectives import Readout, TokenCodes, resolve
from ds_al.spec import ALLayerSpec, Part
from ds_al.tensors import Activation, first


def al_layers(
    f: Sequence[Part],
    activations: Sequence[Activation],
    head: Head | None,
    *,
    num_classes: int,
    objective: str | Mapping[str, Any],
    code_width: int | None,
    code: str,
    bridges: Sequence[Part | None] | None = None,
) -> list[ALLayerSpec]:
    """Builds the specs of the AL layers of a network.

    The last layer has the network's own head: unchanged, including its linear layer, with ``greedy`` and
    ``next_token``, where h is a classifier; otherwise with a new linear layer onto codes in place of its scores.

    Args:
        f: one part per layer, in order.
        activations: output of each f, see :func:`ds_al.convert.bridges.bridge`.
        head: head of the network; if ``None``, the last bridge is built like all others.
        num_classes: V.
        objective, code_width, code: see :func:`ds_al.models.targets.target_side`; by default K is about V, and 64 for
            language models, whose V is a vocabulary.
        bridges: b of each layer, ``None`` to choose it by the activation. The input of a given bridge is the first
            tensor of a tuple.

    Raises:
        ALConfigError: there is no bridge for the shape of an activation, or the length of ``bridges`` is wrong.
    """
    if bridges is not None and len(bridges) != len(f):
        raise ALConfigError(
            f"got {len(bridges)} bridges for {len(f)} AL layers: expected one for each, None by default"
        )
    kind = resolve(objective)
    if isinstance(kind, (Readout, TokenCodes)):
        raise ALConfigError(
            f"objective {objective!r} needs the embeddings of a language model of transformers: use "
            'ds_al.from_pretrained(model, task="causal-lm"), or "next_token" for a list of layers'
        )
    code_width = code_width or (64 if kind.per_token else default_code_width(num_classes))
    side = target_side(
        len(f), num_classes=num_classes, code_width=code_width, code=code, objective=objective
    )  # fmt: skip
    if head is not None and not head.bias and code != "sigmoid":
        for i, part in enumerate(side):  # decoders that fold into a linear layer without bias
            width = num_classes if i == 0 or kind.trains_decoder else code_width
            part["h"] = LayerSpec(nn.Linear, code_width, width, bias=False)
    layers = []
    for i, (each, s) in enumerate(zip(f, activations, strict=True)):
        own = bridges[i] if bridges is not None else None
        if own is not None:
            layers.append(ALLayerSpec(f=each, b=own, reduce=first, **side[i]))
        elif head is not None and i == len(f) - 1:
            layers.append(ALLayerSpec(f=each, **_last(head, side[i], kind.trains_decoder, code_width, code)))
        else:
            b = bridge(s, activations[i + 1 :], code_width=code_width, code=code, per_token=kind.per_token)
            layers.append(ALLayerSpec(f=each, **b, **side[i]))
    return layers


def _last(head: Head, side: dict[str, Any], trains_decoder: bool, code_width: int, code: str) -> dict[str, Any]:
    if trains_decoder:
        return {**side, "b": head.body, "h": head.scores, "reduce": whole}
    b = LayerSpec(CodeHead, head.body, head.width, code_width, code=code, bias=head.bias)
    return {**side, "b": b, "reduce": whole}
