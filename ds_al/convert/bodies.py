"""Bodies of ``transformers`` heads, the part before the linear layer: ``s -> (B, D)``, built from the model's own
modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PooledBody(nn.Module):
    """Body of BERT: pooler and dropout."""

    def __init__(self, pooler: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.pooler, self.dropout = pooler, dropout

    def forward(self, s: tuple[Tensor, ...]) -> Tensor:
        """Uses the first token."""
        return self.dropout(self.pooler(s[0]))


class DenseBody(nn.Module):
    """Body of RoBERTa and DistilBERT: a dense layer and its activation on the first token.

    Args:
        dense: the linear layer.
        activation: activation function after it.
        before: dropout before it.
        after: dropout after the activation function.
    """

    def __init__(self, dense: nn.Module, activation: nn.Module, *, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.dense, self.activation, self.after = before, dense, activation, after

    def forward(self, s: tuple[Tensor, ...]) -> Tensor:
        """Uses the first token."""
        return self.after(self.activation(self.dense(self.before(s[0][:, 0]))))


class LastTokenBody(nn.Module):
    """Body of decoders for classification: the final norm on the last token of ``(hidden, last (B,), mask)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, s: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Uses the last token."""
        hidden, last, _ = s
        return self.norm(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])


class EveryTokenBody(nn.Module):
    """Body of causal language models: the final norm, ``(B, T, D)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, s: tuple[Tensor, ...]) -> Tensor:
        """Uses all tokens."""
        return self.norm(s[0])


class ClassTokenBody(nn.Module):
    """Body of ViT: the final norm on the first of the tokens ``(B, T, D)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, s: Tensor) -> Tensor:
        """Uses the class token."""
        return self.norm(s[:, 0])
