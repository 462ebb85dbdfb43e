"""Pre-norm Transformer encoder that classifies token sequences: an embedding layer, then encoder layers.

Each is one AL layer with ``s = (hidden (B, T, D), mask (B, T))``, unless ``num_layers`` groups neighbours; the bridge
uses the masked mean, optionally after a small encoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.models.grouping import Layers, block_groups, chain_specs
from ds_al.models.output import Output
from ds_al.models.sequence import Embedding, SequenceBridge, masked_mean
from ds_al.models.targets import default_code_width, target_side
from ds_al.models.text_bridges import BlockBridge, BridgeKind, check_bridge, whole
from ds_al.models.word_vectors import WordVectors
from ds_al.models.word_vectors import word_vectors as find_vectors
from ds_al.spec import ALLayerSpec
from ds_al.tensors import Activation


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a preceding layer norm and a residual connection.

    Args:
        width: D.
        heads: number of attention heads; must divide D.
        feed_forward: width of the feed-forward's hidden layer.
        dropout: dropout of both branches and of the feed-forward's hidden layer.
        attention_dropout: dropout of attention weights. At 0 a CPU uses fused attention, which is much faster.
    """

    def __init__(self, width: int, *, heads: int, feed_forward: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=attention_dropout, batch_first=True)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, feed_forward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feed_forward, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, s: Activation) -> tuple[Tensor, Tensor]:
        """Maps ``(hidden (B, T, D), mask (B, T))`` to the same shapes."""
        hidden, mask = s
        # A sequence of padding alone attends to all of its positions: a softmax over no position would be NaN.
        ignored = ~mask & mask.any(dim=1, keepdim=True)
        query = self.norm_attention(hidden)
        attended, _ = self.attention(query, query, query, key_padding_mask=ignored, need_weights=False)
        hidden = hidden + self.dropout(attended)
        hidden = hidden + self.dropout(self.feed_forward(self.norm_feed_forward(hidden)))
        return hidden, mask


class MeanHead(nn.Module):
    """Classification head ``(B, V)``: layer norm and a linear layer on the masked mean."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = Output(width, num_classes)

    def forward(self, s: Activation) -> Tensor:
        """Maps ``(hidden (B, T, D), mask (B, T))`` to ``(B, V)``."""
        return self.scores(self.norm(masked_mean(s)))


def transformer_al(
    *,
    vocab_size: int,
    num_classes: int,
    width: int = 64,
    num_blocks: int = 4,
    num_layers: Layers | None = None,
    heads: int = 4,
    feed_forward: int = 128,
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    max_length: int | None = None,
    padding_id: int = 0,
    word_vectors: str | Path | None = None,
    vocabulary: Sequence[str] | str | Path | None = None,
    bridge: BridgeKind = "linear",
    bridge_width: float = 0.5,
    bridge_stride: int = 2,
    code_width: int | None = None,
    code: str = "tanh",
    scores: Literal["linear", "tanh"] = "linear",
    objective: str | Mapping[str, Any] = "mse",
) -> list[ALLayerSpec]:
    """Builds the layer specs of an AL Transformer. x is ``ids (B, T)`` or ``(ids, mask)``.

    Args:
        vocab_size: number of tokens.
        num_classes: V.
        width: D.
        num_blocks: one embedding plus ``num_blocks - 1`` encoder layers.
        num_layers: number of AL layers, by default one per block; fewer layers group neighbouring blocks evenly. Or the
            number of blocks of each layer.
        heads, feed_forward, dropout, attention_dropout: see :class:`EncoderLayer`; ``attention_dropout`` defaults to
            ``dropout``.
        max_length: maximum sequence length; if given, learned positions are added.
        padding_id: id of the padding token, used if no mask is given.
        word_vectors, vocabulary: initial embeddings from a local file, see :mod:`ds_al.models.word_vectors`.
        bridge: ``"linear"`` on the masked mean, or ``"block"``, an encoder layer before it: see
            :mod:`ds_al.models.text_bridges`.
        bridge_width: width of such a block, as a share of ``width`` and ``feed_forward``; rounded to whole heads.
        bridge_stride: number of tokens per position of such a block.
        code_width: K; by default see :func:`~ds_al.models.targets.default_code_width`.
        code: set of codes, see :mod:`ds_al.models.targets`.
        scores: last module before the label scores; ``"tanh"`` as published.
        objective: objective that trains f and b, see :mod:`ds_al.objectives`.
    Raises:
        ALConfigError: a size or an option is out of range, or word vectors do not fit.
    """
    vectors = find_vectors(word_vectors, vocabulary, vocab_size=vocab_size, width=width)
    encoder = _encoder(heads, dropout=dropout, attention_dropout=attention_dropout)
    blocks = _block_specs(vocab_size, width, num_blocks, feed_forward, encoder, max_length, padding_id, vectors)
    code_width = code_width or default_code_width(num_classes)
    groups = block_groups(num_blocks, num_layers)
    check_bridge(bridge, width=bridge_width, stride=bridge_stride)
    side = target_side(
        len(groups), num_classes=num_classes, code_width=code_width, code=code, scores=scores, objective=objective
    )
    linear = LayerSpec(SequenceBridge, width, code_width=code_width, code=code)
    narrow = heads * max(1, round(width * bridge_width / heads))
    small = LayerSpec(EncoderLayer, narrow, feed_forward=max(1, round(feed_forward * bridge_width)), **encoder)
    block = LayerSpec(BlockBridge, width, narrow, small, narrow, stride=bridge_stride, code_width=code_width, code=code)
    layers = []
    for i, f in enumerate(chain_specs(blocks, groups)):
        if bridge == "block" and i < len(groups) - 1:
            layers.append(ALLayerSpec(f=f, b=block, reduce=whole, **side[i]))
        else:
            layers.append(ALLayerSpec(f=f, b=linear, reduce=masked_mean, **side[i]))
    return layers


def transformer_twin(
    *,
    vocab_size: int,
    num_classes: int,
    width: int = 64,
    num_blocks: int = 4,
    num_layers: Layers | None = None,
    heads: int = 4,
    feed_forward: int = 128,
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    max_length: int | None = None,
    padding_id: int = 0,
    word_vectors: str | Path | None = None,
    vocabulary: Sequence[str] | str | Path | None = None,
) -> list[LayerSpec]:
    """Builds the layer specs of the backprop twin: the same f, then :class:`MeanHead`.

    Args:
        vocab_size, num_classes, width, num_blocks, num_layers, heads, feed_forward, dropout, attention_dropout,
            max_length, padding_id, word_vectors, vocabulary: as in :func:`transformer_al`.

    Raises:
        ALConfigError: as :func:`transformer_al`.
    """
    vectors = find_vectors(word_vectors, vocabulary, vocab_size=vocab_size, width=width)
    encoder = _encoder(heads, dropout=dropout, attention_dropout=attention_dropout)
    blocks = _block_specs(vocab_size, width, num_blocks, feed_forward, encoder, max_length, padding_id, vectors)
    f = chain_specs(blocks, block_groups(num_blocks, num_layers))
    return [*f, LayerSpec(MeanHead, width, num_classes)]


def _block_specs(
    vocab_size: int,
    width: int,
    num_blocks: int,
    feed_forward: int,
    encoder: dict[str, Any],
    max_length: int | None,
    padding_id: int,
    vectors: WordVectors | None,
) -> list[LayerSpec]:
    if num_blocks < 1:
        raise ALConfigError(f"got num_blocks={num_blocks}: expected 1 or more, of which the first embeds")
    if width % encoder["heads"]:
        raise ALConfigError(f"got width={width} and heads={encoder['heads']}: expected a width that the heads divide")
    embedding = LayerSpec(
        Embedding,
        vocab_size,
        width,
        padding_id=padding_id,
        max_length=max_length,
        dropout=encoder["dropout"],
        vectors=vectors,
    )
    layer = LayerSpec(EncoderLayer, width, feed_forward=feed_forward, **encoder)
    return [embedding] + [layer] * (num_blocks - 1)


def _encoder(heads: int, *, dropout: float, attention_dropout: float | None) -> dict[str, Any]:
    attention = dropout if attention_dropout is None else attention_dropout
    return {"heads": heads, "dropout": dropout, "attention_dropout": attention}
