"""Shared modules of sequence models: embeddings, padding masks, and sequence pooling for bridges.

An activation of a sequence model is a tuple of tensors, hidden states first and the mask last:

    transformer   (hidden (B, T, D), mask (B, T))
    lstm          (hidden (B, T, 2 D), h (B, 2, D), c (B, 2, D), mask (B, T))

The mask is boolean, true at a token, and is sent with the hidden states, so padding changes no result. Booleans carry
no gradient, so the backprop twin can send them between DeepSpeed's stages, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_al.models.output import Output
from ds_al.models.targets import code_end
from ds_al.models.word_vectors import WordVectors
from ds_al.tensors import Activation


class Embedding(nn.Module):
    """Token embeddings with dropout; also computes the mask. Maps ``ids (B, T)`` to ``((B, T, D), mask (B, T))``.

    Args:
        vocab_size: number of tokens.
        width: D.
        padding_id: id of the padding token, used unless the input is ``(ids, mask)``.
        max_length: maximum sequence length; if given, learned positions are added.
        dropout: dropout of the embeddings.
        vectors: pretrained word vectors for initialization.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        padding_id: int,
        max_length: int | None = None,
        dropout: float = 0.0,
        vectors: WordVectors | None = None,
    ) -> None:
        super().__init__()
        self.padding_id = padding_id
        self.tokens = nn.Embedding(vocab_size, width, padding_idx=padding_id)
        if vectors is not None:
            vectors.fill(self.tokens.weight, padding_id=padding_id)
        self.positions = None if max_length is None else nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Activation) -> tuple[Tensor, Tensor]:
        """Embeds ``ids`` or ``(ids, mask)``."""
        ids, mask = (x, x != self.padding_id) if isinstance(x, Tensor) else (x[0], x[-1].bool())
        hidden = self.tokens(ids)
        if self.positions is not None:
            hidden = hidden + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.dropout(hidden), mask


class SequenceBridge(nn.Sequential):
    """Linear layer and end of code: ``(B, D) -> (B, K)``."""

    def __init__(self, width: int, *, code_width: int, code: str) -> None:
        super().__init__(Output(width, code_width), code_end(code, code_width))


def masked_mean(s: Activation) -> Tensor:
    """Returns the mean over the tokens of ``(hidden (B, T, D), ..., mask (B, T))``: ``(B, D)``; 0 if there is no
    token."""
    hidden, mask = s[0], s[-1].unsqueeze(2)
    return hidden.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def final_state(s: Activation) -> Tensor:
    """Returns the sum of the final states of both directions of an LSTM: ``(B, D)``."""
    return s[1].sum(dim=1)
