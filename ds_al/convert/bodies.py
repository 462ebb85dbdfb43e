"""Bodies of ``transformers`` heads, the part before the linear layer: ``s -> (B, D)``, built from the model's own
modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_al.models.sequence import masked_mean
from ds_al.tensors import Activation


class PooledBody(nn.Module):
    """Body that reads one vector ``(B, D)`` per sample.

    Attributes:
        mean: whether that is the mean over the tokens; otherwise it is the token that the model's own head reads.
    """

    mean = False

    def forward(self, s: Activation) -> Tensor:
        """Pools the tokens and applies the modules of the head."""
        return self.head(self.average(s) if self.mean else self.token(s))

    def token(self, s: Activation) -> Tensor:
        """Returns the token that the model's own head reads: the first one."""
        return s[0][:, 0]

    def average(self, s: Activation) -> Tensor:
        """Returns the mean over the tokens without padding."""
        return masked_mean(s)

    def head(self, pooled: Tensor) -> Tensor:
        """Applies the modules of the head between pooling and its linear layer of scores."""
        raise NotImplementedError


class BertBody(PooledBody):
    """Body of BERT: pooler and dropout."""

    def __init__(self, pooler: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.pooler, self.dropout = pooler, dropout

    def head(self, pooled: Tensor) -> Tensor:
        """Applies the pooler, which reads the first of its tokens, to one token."""
        return self.dropout(self.pooler(pooled.unsqueeze(1)))


class DenseBody(PooledBody):
    """Body of RoBERTa and DistilBERT: a dense layer and its activation.

    Args:
        dense: the linear layer.
        activation: activation function after it.
        before: dropout before it.
        after: dropout after the activation function.
    """

    def __init__(self, dense: nn.Module, activation: nn.Module, *, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.dense, self.activation, self.after = before, dense, activation, after

    def head(self, pooled: Tensor) -> Tensor:
        """Applies the dense layer between two dropouts."""
        return self.after(self.activation(self.dense(self.before(pooled))))


class LastTokenBody(PooledBody):
    """Body of decoders for classification: the final norm on the last token of ``(hidden, last (B,), mask)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def token(self, s: Activation) -> Tensor:
        """Returns the last token."""
        hidden, last, _ = s
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]

    def head(self, pooled: Tensor) -> Tensor:
        """Applies the final norm."""
        return self.norm(pooled)


class ClassTokenBody(PooledBody):
    """Body of ViT: the final norm on the first of the tokens ``(B, T, D)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def token(self, s: Activation) -> Tensor:
        """Returns the class token."""
        assert isinstance(s, Tensor)
        return s[:, 0]

    def average(self, s: Activation) -> Tensor:
        """Returns the mean over the patches, without the class token, as BEiT does."""
        assert isinstance(s, Tensor)
        return s[:, 1:].mean(dim=1)

    def head(self, pooled: Tensor) -> Tensor:
        """Applies the final norm."""
        return self.norm(pooled)


class EveryTokenBody(nn.Module):
    """Body of causal language models: the final norm, ``(B, T, D)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, s: tuple[Tensor, ...]) -> Tensor:
        """Uses all tokens."""
        return self.norm(s[0])
