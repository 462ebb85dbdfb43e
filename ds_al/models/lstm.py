"""A bidirectional LSTM that classifies token sequences: an embedding layer, then LSTM layers.

Each is one AL layer. The embedding gives ``s = (hidden (B, T, D), mask (B, T))`` and its bridge reads the
masked mean; an LSTM layer gives ``s = (hidden (B, T, 2 D), h (B, 2, D), c (B, 2, D), mask (B, T))``, its
bridge reads ``h`` of both directions, and the next layer starts from ``(h, c)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ds_al.errors import ALConfigError
from ds_al.layer import Activation
from ds_al.models.sequence import Embedding, SequenceBridge, final_state, masked_mean
from ds_al.models.targets import target_side
from ds_al.spec import ALLayerSpec


class LSTMLayer(nn.Module):
    """One bidirectional LSTM that starts from its predecessor's final state and hands on its own.

    Padding must stand at the end of a sequence. It is read by neither direction.

    Args:
        in_features: width of the hidden states that come in.
        width: D, of each direction.
        dropout: of the hidden states that go out.
    """

    def __init__(self, in_features: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(in_features, width, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, s: Activation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(hidden, mask)`` or ``(hidden, h, c, mask)`` to ``(hidden (B, T, 2 D), h, c, mask)``."""
        hidden, *state, mask = s
        lengths = mask.sum(dim=1).clamp(min=1).cpu()  # an LSTM needs one step; that of a pad, embedded as 0
        packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        # torch wants states as (2, B, D); between layers the batch comes first, as everywhere.
        start = tuple(part.transpose(0, 1).contiguous() for part in state) or None
        packed, (h, c) = self.lstm(packed, start)
        hidden, _ = pad_packed_sequence(packed, batch_first=True, total_length=mask.shape[1])
        h, c = (part.transpose(0, 1).contiguous() for part in (h, c))
        return self.dropout(hidden).contiguous(), h, c, mask


class LSTMClassifier(nn.Module):
    """The twin's last layer: its f, and scores ``(B, V)`` of the final state.

    One module, since a stage that received ``(hidden, h, c)`` to read ``h`` alone would have no gradient to
    return for the others, which DeepSpeed's pipeline asks for.
    """

    def __init__(self, in_features: int, width: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.f = LSTMLayer(in_features, width, dropout=dropout)
        self.scores = nn.Linear(width, num_classes)

    def forward(self, s: Activation) -> Tensor:
        """``(hidden, mask)`` or ``(hidden, h, c, mask)`` to ``(B, V)``."""
        return self.scores(final_state(self.f(s)))


def lstm_al(
    *,
    vocab_size: int,
    num_classes: int,
    embedding_width: int = 64,
    width: int = 64,
    num_layers: int = 4,
    dropout: float = 0.1,
    padding_id: int = 0,
    code_width: int = 64,
    code: str = "tanh",
    objective: str | Mapping[str, Any] = "mse",
) -> list[ALLayerSpec]:
    """Specs of an LSTM that learns by association. x is ``ids (B, T)`` or ``(ids, mask)``, padded at the end.

    Published: embedding width 300, width 256, 4 layers, dropout 0, code width 128.

    Args:
        vocab_size: number of tokens.
        num_classes: V.
        embedding_width: of a token.
        width: D, of each direction.
        num_layers: N: the embedding and N - 1 LSTMs.
        dropout: of the embeddings and of each LSTM's hidden states.
        padding_id: this token is padding, where no mask is given.
        code_width: K.
        code: where codes live, see :mod:`ds_al.models.targets`.
        objective: what trains f and b, see :mod:`ds_al.objectives`.
    """
    f = _forward_specs(vocab_size, embedding_width, width, num_layers, dropout, padding_id)
    side = target_side(num_layers, num_classes=num_classes, code_width=code_width, code=code, objective=objective)
    return [
        ALLayerSpec(
            f=f[i],
            b=LayerSpec(SequenceBridge, width if i else embedding_width, code_width=code_width, code=code),
            reduce=final_state if i else masked_mean,
            **side[i],
        )
        for i in range(num_layers)
    ]


def lstm_twin(
    *,
    vocab_size: int,
    num_classes: int,
    embedding_width: int = 64,
    width: int = 64,
    num_layers: int = 4,
    dropout: float = 0.1,
    padding_id: int = 0,
) -> list[LayerSpec]:
    """Specs of the backprop twin: the very same f, the last of them within :class:`LSTMClassifier`.

    Raises:
        ALConfigError: ``num_layers`` is less than 2, so there is no LSTM.
    """
    if num_layers < 2:
        raise ALConfigError(f"got num_layers={num_layers}: expected 2 or more, an embedding and an LSTM")
    f = _forward_specs(vocab_size, embedding_width, width, num_layers, dropout, padding_id)
    in_features = embedding_width if num_layers == 2 else 2 * width
    return [*f[:-1], LayerSpec(LSTMClassifier, in_features, width, num_classes, dropout=dropout)]


def _forward_specs(
    vocab_size: int, embedding_width: int, width: int, num_layers: int, dropout: float, padding_id: int
) -> list[LayerSpec]:
    if num_layers < 1:
        raise ALConfigError(f"got num_layers={num_layers}: expected 1 or more, of which the first embeds")
    inputs = [embedding_width] + [2 * width] * (num_layers - 2)
    return [
        LayerSpec(Embedding, vocab_size, embedding_width, padding_id=padding_id, dropout=dropout),
        *(LayerSpec(LSTMLayer, inputs[i], width, dropout=dropout) for i in range(num_layers - 1)),
    ]
