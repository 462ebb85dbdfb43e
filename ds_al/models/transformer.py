"""A pre-norm Transformer encoder that classifies token sequences: an embedding layer, then encoder layers.

Each is one AL layer with ``s = (hidden (B, T, D), mask (B, T))``; the bridge reads the masked mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.layer import Activation
from ds_al.models.sequence import Embedding, SequenceBridge, masked_mean
from ds_al.models.targets import target_side
from ds_al.spec import ALLayerSpec


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each after a layer norm and beside a residual path.

    Args:
        width: D.
        heads: attention heads; must divide D.
        feed_forward: width of the feed-forward's hidden layer.
        dropout: of attention weights, of both branches and of the feed-forward's hidden layer.
    """

    def __init__(self, width: int, *, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feed_forward, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, s: Activation) -> tuple[Tensor, Tensor]:
        """``(hidden (B, T, D), mask (B, T))`` to the same."""
        hidden, mask = s
        # A sequence of padding alone attends to all of it: a softmax over nothing would be NaN.
        ignored = ~mask & mask.any(dim=1, keepdim=True)
        query = self.norm_attention(hidden)
        attended, _ = self.attention(query, query, query, key_padding_mask=ignored, need_weights=False)
        hidden = hidden + self.dropout(attended)
        hidden = hidden + self.dropout(self.feed_forward(self.norm_feed_forward(hidden)))
        return hidden, mask


class MeanHead(nn.Module):
    """Scores of a sequence: layer norm and a linear layer on the masked mean, ``(B, V)``."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, num_classes)

    def forward(self, s: Activation) -> Tensor:
        """``(hidden (B, T, D), mask (B, T))`` to ``(B, V)``."""
        return self.scores(self.norm(masked_mean(s)))


def transformer_al(
    *,
    vocab_size: int,
    num_classes: int,
    width: int = 64,
    num_layers: int = 4,
    heads: int = 4,
    feed_forward: int = 128,
    dropout: float = 0.1,
    max_length: int | None = None,
    padding_id: int = 0,
    code_width: int = 64,
    code: str = "tanh",
    objective: str | Mapping[str, Any] = "mse",
) -> list[ALLayerSpec]:
    """Specs of a Transformer that learns by association. x is ``ids (B, T)`` or ``(ids, mask)``.

    Published: width 300, 4 layers, 6 heads, feed-forward 256, dropout 0.3, no positions, code width 128.

    Args:
        vocab_size: number of tokens.
        num_classes: V.
        width: D.
        num_layers: N: the embedding and N - 1 encoder layers.
        heads, feed_forward, dropout: see :class:`EncoderLayer`.
        max_length: longest sequence; learned positions are added where it is given.
        padding_id: this token is padding, where no mask is given.
        code_width: K.
        code: where codes live, see :mod:`ds_al.models.targets`.
        objective: what trains f and b, see :mod:`ds_al.objectives`.
    """
    f = _forward_specs(vocab_size, width, num_layers, heads, feed_forward, dropout, max_length, padding_id)
    side = target_side(num_layers, num_classes=num_classes, code_width=code_width, code=code, objective=objective)
    b = LayerSpec(SequenceBridge, width, code_width=code_width, code=code)
    return [ALLayerSpec(f=f[i], b=b, reduce=masked_mean, **side[i]) for i in range(num_layers)]


def transformer_twin(
    *,
    vocab_size: int,
    num_classes: int,
    width: int = 64,
    num_layers: int = 4,
    heads: int = 4,
    feed_forward: int = 128,
    dropout: float = 0.1,
    max_length: int | None = None,
    padding_id: int = 0,
) -> list[LayerSpec]:
    """Specs of the backprop twin: the very same f, then :class:`MeanHead`."""
    f = _forward_specs(vocab_size, width, num_layers, heads, feed_forward, dropout, max_length, padding_id)
    return [*f, LayerSpec(MeanHead, width, num_classes)]


def _forward_specs(
    vocab_size: int,
    width: int,
    num_layers: int,
    heads: int,
    feed_forward: int,
    dropout: float,
    max_length: int | None,
    padding_id: int,
) -> list[LayerSpec]:
    if num_layers < 1:
        raise ALConfigError(f"got num_layers={num_layers}: expected 1 or more, of which the first embeds")
    embedding = LayerSpec(Embedding, vocab_size, width, padding_id=padding_id, max_length=max_length, dropout=dropout)
    encoder = LayerSpec(EncoderLayer, width, heads=heads, feed_forward=feed_forward, dropout=dropout)
    return [embedding] + [encoder] * (num_layers - 1)
