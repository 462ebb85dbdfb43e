"""Objectives of language models from their formulas, in a plain loop: the oracle of the pipeline's exactness."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.layer import ALLayer, seed_layer
from ds_al.tensors import stop_gradient


def train(
    name: str,
    layers: list[ALLayer],
    batches: list[tuple[Any, Tensor]],
    *,
    vocabulary: int,
    base_seed: int,
    lr: float,
    refresh_every: int = 20,
    codes: str = "both",
    negatives: int = 0,
    token_share: float = 1.0,
    vocabulary_share: float = 1.0,
    last_layer: bool = False,
) -> None:
    """Trains ``layers`` in place by AdamW, a step per micro-batch."""
    optimizers = [torch.optim.AdamW(layer.train().parameters(), lr=lr, fused=True) for layer in layers]
    readout: Any = None
    for step, (x, labels) in enumerate(batches):
        if step % refresh_every == 0:
            readout = copy.deepcopy(layers[0].h).requires_grad_(False)
        following = labels[:, 1:].flatten()
        s, ids, weights, rows = x, Tensor(), Tensor(), Tensor()
        for index, layer in enumerate(layers):
            seed_layer(base_seed, layer=index, step=step, part=0)
            s_out = layer.f(s)
            if name == "token_codes":
                if index == 0:
                    ids, weights = candidates(following, count=labels.numel() + negatives, vocabulary=vocabulary)
                rows_out = layer.g(rows if index else ids)
            seed_layer(base_seed, layer=index, step=step, part=1)
            bridge = layer.b(layer.reduce(s_out))
            if name == "token_codes":
                known = rows_out.detach() if codes == "autoencoder" else rows_out
                losses = [loss_of(bridge[:, :-1].flatten(0, 1) @ known.t() + weights, places_of(ids, following))]
                if codes != "associated" and index:
                    losses.append(F.mse_loss(layer.h(rows_out), rows))
                elif codes != "associated":
                    losses.append(F.cross_entropy(layer.h(rows_out) @ rows_out.t(), torch.arange(len(ids))))
                rows = rows_out.detach()
            else:
                h = readout if name == "readout" and 0 < index < len(layers) - 1 else layer.h
                codes_, tokens = bridge[:, :-1].flatten(0, 1), following
                last = index == len(layers) - 1 and not last_layer
                if not last and token_share < 1:
                    drawn = torch.randperm(len(following))[: math.ceil(token_share * len(following))]
                    codes_, tokens = codes_[drawn], following[drawn]
                if not last and vocabulary_share < 1:
                    count = max(math.ceil(vocabulary_share * vocabulary), len(tokens))
                    ids, weights = candidates(tokens, count=count, vocabulary=vocabulary)
                    bias = None if h.bias is None else h.bias[ids]
                    scores = F.linear(codes_, h.weight[ids], bias) + weights
                    losses = [loss_of(scores, places_of(ids, tokens))]
                elif not last and token_share < 1:
                    losses = [loss_of(h(codes_), tokens)]
                else:
                    losses = [loss_of(h(bridge)[:, :-1].flatten(0, 1), following)]
            torch.autograd.backward(losses)
            optimizers[index].step()
            optimizers[index].zero_grad()
            s = stop_gradient(s_out)


def loss_of(scores: Tensor, classes: Tensor) -> Tensor:
    """Mean over the tokens that are to be learned."""
    return F.cross_entropy(scores, classes, reduction="sum") / torch.tensor(max(1, int((classes != -100).sum())))


def places_of(ids: Tensor, following: Tensor) -> Tensor:
    """Where each token is among the candidates."""
    return torch.tensor([(ids == token).nonzero().item() if token >= 0 else -100 for token in following])


def candidates(following: Tensor, *, count: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens to learn, once each, and others in a random order; with the logarithm of what each stands for."""
    own = {int(token) for token in following if token >= 0}
    draw = torch.rand(vocabulary)
    others = sorted((token for token in range(vocabulary) if token not in own), key=lambda token: -float(draw[token]))
    drawn = others[: min(vocabulary, count) - len(own)]
    ids = sorted([*own, *drawn])
    stand_for = torch.log(torch.tensor(len(others)) / torch.tensor(max(1, len(drawn))))
    return torch.tensor(ids), torch.stack([torch.tensor(0.0) if token in own else stand_for for token in ids])
