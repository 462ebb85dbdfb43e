"""Bidirectional LSTM classifier of token sequences: an embedding layer, then LSTM layers.

Each is one AL layer, unless ``num_layers`` groups neighbours. The embedding returns
``s = (hidden (B, T, D), mask (B, T))``, and its bridge uses the masked mean; an LSTM layer returns
``s = (hidden (B, T, 2 D), h (B, 2, D), c (B, 2, D), mask (B, T))``, its bridge uses ``h`` of both directions, and the
next layer starts from ``(h, c)``. Alternatively a bridge is a small LSTM over the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ds_al.errors import ALConfigError
from ds_al.models.grouping import Layers, block_groups, chain_specs
from ds_al.models.output import Output
from ds_al.models.recurrence import States, bidirectional_lstm
from ds_al.models.sequence import Embedding, SequenceBridge, final_state, masked_mean
from ds_al.models.targets import default_code_width, target_side
from ds_al.models.text_bridges import BlockBridge, BridgeKind, check_bridge, whole
from ds_al.models.word_vectors import WordVectors
from ds_al.models.word_vectors import word_vectors as find_vectors
from ds_al.spec import ALLayerSpec
from ds_al.tensors import Activation


class LSTMLayer(nn.Module):
    """One bidirectional LSTM, which starts from its predecessor's final state and returns its own.

    Padding must be at the end of a sequence. Neither direction reads it.

    Args:
        in_features: width of the input hidden states.
        width: D, of each direction.
        dropout: dropout of the output hidden states.
    """

    def __init__(self, in_features: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_features, width, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, s: Activation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps ``(hidden, mask)`` or ``(hidden, h, c, mask)`` to ``(hidden (B, T, 2 D), h, c, mask)``."""
        hidden, *state, mask = s
        lengths = mask.sum(dim=1).clamp(min=1)  # an LSTM needs at least one step, here a pad embedded as 0
        start = _swapped(*state) if state else None
        lstm = _packed if hidden.is_cuda else bidirectional_lstm  # on CPUs torch's LSTM is slower
        hidden, states = lstm(self.lstm, hidden, lengths, start)
        h, c = _swapped(*states)
        return self.dropout(hidden).contiguous(), h, c, mask


def _swapped(h: Tensor, c: Tensor) -> States:
    """Converts states between torch's ``(2, B, D)`` and the inter-layer ``(B, 2, D)``, in either direction."""
    return h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()


def _packed(lstm: nn.LSTM, x: Tensor, lengths: Tensor, start: States | None) -> tuple[Tensor, States]:
    """Computes :func:`~ds_al.models.recurrence.bidirectional_lstm` with torch's own LSTM."""
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    packed, states = lstm(packed, start)
    return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0], states


class LSTMClassifier(nn.Module):
    """The twin's last layer: its f, and scores ``(B, V)`` of the final state, i.e. the state after the last valid step.

    Both are one module because a stage that received ``(hidden, h, c)`` and used ``h`` alone would have no gradient to
    return for the others, which DeepSpeed's pipeline requires.

    Args:
        f: returns ``(hidden, h (B, 2, D), c, mask)``.
        width: D.
        num_classes: V.
    """

    def __init__(self, f: LayerSpec, width: int, num_classes: int) -> None:
        super().__init__()
        self.f = f.build()
        self.scores = Output(width, num_classes)

    def forward(self, s: Activation) -> Tensor:
        """Maps ``(hidden, mask)`` or ``(hidden, h, c, mask)`` to ``(B, V)``."""
        return self.scores(final_state(self.f(s)))


def lstm_al(
    *,
    vocab_size: int,
    num_classes: int,
    embedding_width: int = 64,
    width: int = 64,
    num_blocks: int = 4,
    num_layers: Layers | None = None,
    dropout: float = 0.1,
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
    """Builds the layer specs of an AL LSTM. x is ``ids (B, T)`` or ``(ids, mask)``, padded at the end.

    Args:
        vocab_size: number of tokens.
        num_classes: V.
        embedding_width: width of a token embedding.
        width: D, of each direction.
        num_blocks: one embedding plus ``num_blocks - 1`` LSTMs.
        num_layers: number of AL layers, by default one per block; fewer layers group neighbouring blocks evenly. Or the
            number of blocks of each layer. Within a group, the state passes from one LSTM to the next as it does
            between groups.
        dropout: dropout of the embeddings and of each LSTM's hidden states.
        padding_id: id of the padding token, used if no mask is given.
        word_vectors, vocabulary: initial embeddings from a local file, see :mod:`ds_al.models.word_vectors`.
        bridge: ``"linear"`` on the final state, or ``"block"``, a bidirectional LSTM over the hidden states: see
            :mod:`ds_al.models.text_bridges`.
        bridge_width: width of such a block, as a share of ``width``.
        bridge_stride: number of tokens per step of such a block.
        code_width: K; by default see :func:`~ds_al.models.targets.default_code_width`.
        code: set of codes, see :mod:`ds_al.models.targets`.
        scores: last module before the label scores; ``"tanh"`` as published.
        objective: objective that trains f and b, see :mod:`ds_al.objectives`.
    Raises:
        ALConfigError: a size or an option is out of range, or word vectors do not fit.
    """
    vectors = find_vectors(word_vectors, vocabulary, vocab_size=vocab_size, width=embedding_width)
    blocks = _block_specs(vocab_size, embedding_width, width, num_blocks, dropout, padding_id, vectors)
    code_width = code_width or default_code_width(num_classes)
    groups = block_groups(num_blocks, num_layers)
    check_bridge(bridge, width=bridge_width, stride=bridge_stride)
    side = target_side(
        len(groups), num_classes=num_classes, code_width=code_width, code=code, scores=scores, objective=objective
    )
    narrow = max(1, round(width * bridge_width))
    small = LayerSpec(LSTMLayer, narrow, narrow, dropout=dropout)
    layers = []
    for i, f in enumerate(chain_specs(blocks, groups)):
        embeds = groups[i].stop == 1  # no LSTM yet
        if bridge == "block" and i < len(groups) - 1:
            features = embedding_width if embeds else 2 * width
            b = LayerSpec(
                BlockBridge, features, narrow, small, 2 * narrow, stride=bridge_stride, code_width=code_width, code=code
            )
            layers.append(ALLayerSpec(f=f, b=b, reduce=whole, **side[i]))
        else:
            b = LayerSpec(SequenceBridge, embedding_width if embeds else width, code_width=code_width, code=code)
            layers.append(ALLayerSpec(f=f, b=b, reduce=masked_mean if embeds else final_state, **side[i]))
    return layers


def lstm_twin(
    *,
    vocab_size: int,
    num_classes: int,
    embedding_width: int = 64,
    width: int = 64,
    num_blocks: int = 4,
    num_layers: Layers | None = None,
    dropout: float = 0.1,
    padding_id: int = 0,
    word_vectors: str | Path | None = None,
    vocabulary: Sequence[str] | str | Path | None = None,
) -> list[LayerSpec]:
    """Builds the layer specs of the backprop twin: the same f, the last one inside :class:`LSTMClassifier`.

    Args:
        vocab_size, num_classes, embedding_width, width, num_blocks, num_layers, dropout, padding_id, word_vectors,
            vocabulary: as in :func:`lstm_al`.

    Raises:
        ALConfigError: as :func:`lstm_al`, or ``num_blocks`` is less than 2, so there is no LSTM.
    """
    if num_blocks < 2:
        raise ALConfigError(f"got num_blocks={num_blocks}: expected 2 or more, an embedding and an LSTM")
    vectors = find_vectors(word_vectors, vocabulary, vocab_size=vocab_size, width=embedding_width)
    blocks = _block_specs(vocab_size, embedding_width, width, num_blocks, dropout, padding_id, vectors)
    f = chain_specs(blocks, block_groups(num_blocks, num_layers))
    return [*f[:-1], LayerSpec(LSTMClassifier, f[-1], width, num_classes)]


def _block_specs(
    vocab_size: int,
    embedding_width: int,
    width: int,
    num_blocks: int,
    dropout: float,
    padding_id: int,
    vectors: WordVectors | None,
) -> list[LayerSpec]:
    if num_blocks < 1:
        raise ALConfigError(f"got num_blocks={num_blocks}: expected 1 or more, of which the first embeds")
    inputs = [embedding_width] + [2 * width] * (num_blocks - 2)
    return [
        LayerSpec(Embedding, vocab_size, embedding_width, padding_id=padding_id, dropout=dropout, vectors=vectors),
        *(LayerSpec(LSTMLayer, inputs[i], width, dropout=dropout) for i in range(num_blocks - 1)),
    ]
