"""AL layers of causal language models: the token-wise bridge of each layer and the target side of its objective.

objective     b of layers before the last    g                            h
next_token    private blocks, norm, D -> K   not used                     K -> V in each, the model's head in the last
readout       the same, K = D                not used                     D -> V in the first and the last, none between
token_codes   the same                       embedding V -> K, then       maps of codes K -> K
                                             maps of codes K -> K

The last b is the model's final norm, followed by a linear map onto codes with ``token_codes``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.convert.bridges import TokenBridge
from ds_al.convert.head import CodeHead, Head
from ds_al.convert.private_blocks import PrivateBlocks
from ds_al.errors import ALConfigError
from ds_al.models.output import Output
from ds_al.models.text_bridges import whole
from ds_al.objectives import NextToken, Objective, Readout, TokenCodes, resolve
from ds_al.spec import ALLayerSpec, Part
from ds_al.tensors import first

NAMES = {"greedy": "next_token", None: "next_token"}
"""Aliases of objectives, for language models."""


def language_objective(objective: str | Mapping[str, Any] | None) -> str | Mapping[str, Any]:
    """Returns the objective of a language model, with aliases resolved.

    Raises:
        ALConfigError: the objective assigns codes to samples, not to tokens.
    """
    options = dict(objective) if isinstance(objective, Mapping) else {"name": objective}
    options["name"] = NAMES.get(options.get("name"), options.get("name"))
    if not isinstance(options["name"], str) or not resolve(options).per_token:
        raise ALConfigError(
            f"got objective={options['name']!r} for a causal language model: expected 'next_token', 'readout' or "
            "'token_codes'; others give a code to a sample, not to a token"
        )
    return options


def language_layers(
    f: Sequence[Part],
    head: Head,
    *,
    vocabulary: int,
    objective: str | Mapping[str, Any],
    code_width: int | None,
    private: Sequence[Part | None],
    bridges: Sequence[Part | None] | None,
    embedding: Tensor | None,
) -> list[ALLayerSpec]:
    """Builds the specs of the AL layers.

    Args:
        f: one part per layer, in order.
        head: head of the model.
        vocabulary: V.
        objective: result of :func:`language_objective`.
        code_width: K; by default 64 with ``next_token``, and D with the others, which then start from the model's own
            output embedding.
        private: private blocks of each layer's bridge, ``None`` for none.
        bridges: b of each layer, ``None`` to build it here. The input of a given bridge is the hidden states alone.
        embedding: the input embedding ``(V, D)``, if the model ties it to its head.

    Raises:
        ALConfigError: the length of ``bridges`` is wrong, or K does not fit the objective.
    """
    kind = resolve(objective)
    if bridges is not None and len(bridges) != len(f):
        raise ALConfigError(
            f"got {len(bridges)} bridges for {len(f)} AL layers: expected one for each, None by default"
        )
    width = code_width or (64 if type(kind) is NextToken else head.width)
    if isinstance(kind, Readout) and width != head.width:
        raise ALConfigError(
            f"got code_width={width} for the objective readout: leave it out, since the readout of the first layer "
            f"reads vectors of the model's width, {head.width}"
        )
    layers = []
    for i, each in enumerate(f):
        last = i == len(f) - 1
        side = _side(kind, i, last=last, head=head, width=width, vocabulary=vocabulary, embedding=embedding)
        own = bridges[i] if bridges is not None else None
        if own is not None:
            b: dict[str, Any] = {"b": own, "reduce": first}
        elif last and isinstance(kind, TokenCodes):
            b = {"b": LayerSpec(CodesHead, head.body, head.width, width, bias=head.bias), "reduce": whole}
        elif last:
            b = {"b": head.body, "reduce": whole}
        else:
            b = {"b": LayerSpec(TokenReader, private[i], head.width, width), "reduce": whole}
        layers.append(ALLayerSpec(f=each, objective=_of_last(objective) if last else objective, **b, **side))
    return layers


def _of_last(objective: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """The objective of the last layer, whose h is the model's own head: by default it learns from all tokens, over
    all of V."""
    if isinstance(objective, str) or objective.get("last_layer"):
        return objective
    return {**objective, **{name: 1.0 for name in ("token_share", "vocabulary_share") if name in objective}}


def _side(
    kind: Objective, i: int, *, last: bool, head: Head, width: int, vocabulary: int, embedding: Tensor | None
) -> dict[str, Part]:
    """Returns g and h of one layer."""
    if isinstance(kind, TokenCodes):
        g: Part = LayerSpec(CodeStep, width)
        if i == 0 and width == head.width:
            assert isinstance(head.scores, nn.Linear)
            g = partial(_embedding_of, head.scores)
        elif i == 0:
            g = LayerSpec(TokenEmbedding, vocabulary, width)
        return {"g": g, "h": LayerSpec(CodeStep, width)}
    if last:
        h = head.scores
    elif not isinstance(kind, Readout):
        h = LayerSpec(Output, width, vocabulary)
    elif i:
        h = LayerSpec(nn.Identity)
    else:
        h = partial(copy.deepcopy, head.scores) if embedding is None else tied_readout(embedding)
    return {"g": LayerSpec(nn.Identity), "h": h}


class TokenReader(nn.Module):
    """The bridge of a layer before the last: ``(hidden (B, T, D), .., mask) -> (B, T, K)``.

    Args:
        blocks: builds the private blocks, or ``None``.
        width: D.
        code_width: K.
    """

    def __init__(self, blocks: PrivateBlocks | None, width: int, code_width: int) -> None:
        super().__init__()
        self.blocks = nn.Identity() if blocks is None else blocks()
        self.code = TokenBridge(width, code_width)

    def forward(self, s: tuple[Tensor, ...]) -> Tensor:
        """Uses all tokens."""
        return self.code(self.blocks(s)[0])


class CodesHead(CodeHead):
    """The last bridge of ``token_codes``. If K = D it starts as the identity, so that the scores are the model's
    own."""

    def __init__(self, body: Part, width: int, code_width: int, *, bias: bool) -> None:
        super().__init__(body, width, code_width, code="linear", bias=bias)
        if width == code_width:
            nn.init.eye_(self.code.weight)
            if self.code.bias is not None:
                nn.init.zeros_(self.code.bias)


class TokenEmbedding(nn.Embedding):
    """Codes of tokens, with the small initial weights of language models' embeddings: ``(M,) -> (M, K)``."""

    def __init__(self, vocabulary: int, code_width: int) -> None:
        super().__init__(vocabulary, code_width)
        nn.init.normal_(self.weight, std=0.02)


class CodeStep(nn.Module):
    """Maps the codes of one layer to those of the next, or back: ``(M, K) -> (M, K)``; initially the identity."""

    def __init__(self, code_width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(code_width, code_width), nn.Linear(code_width, code_width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Computes ``codes + outer(tanh(inner(codes)))``."""
        return codes + self.outer(torch.tanh(self.inner(codes)))


def tied_readout(embedding: Tensor) -> nn.Linear:
    """Builds a linear layer ``D -> V`` whose weight is the input embedding itself."""
    with torch.device("meta"):
        linear = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
    linear.weight = embedding if isinstance(embedding, nn.Parameter) else nn.Parameter(embedding)
    return linear


def _embedding_of(scores: nn.Linear) -> nn.Embedding:
    """Builds an embedding of codes, initialized with a copy of the rows of the model's output embedding."""
    embedding = nn.Embedding(scores.out_features, scores.in_features, device="meta")
    embedding.weight = nn.Parameter(scores.weight.detach().clone())
    return embedding
