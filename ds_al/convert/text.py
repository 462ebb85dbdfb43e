"""Embeddings and blocks of ``transformers`` text models, called as the model calls them.

``s`` is ``(hidden (B, T, D), mask (B, T))``, or ``(hidden, last (B,), mask)`` for classifiers on the last token. The
mask is boolean, true at a token; each group of blocks computes its attention mask from it with the functions of
``transformers``, so a message carries one bit per token instead of one per pair of tokens.

``x`` is ``ids (B, T)``, ``(ids, mask)`` or ``(ids, mask, token types)``. Without a mask, all tokens are valid except
the model's padding token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.errors import ALConfigError, ALLayerError
from ds_al.tensors import Activation


class TextInput(nn.Module):
    """Embeds token ids as the model does.

    Args:
        embed: ``(ids, token types or None) -> hidden (B, T, D)``.
        pad: id of the padding token, if the model has one.
        last: whether to return the index of the last token ``(B,)``, computed as in ``transformers``.
    """

    def __init__(self, embed: nn.Module, *, pad: int | None, last: bool) -> None:
        super().__init__()
        self.embed = embed
        self.pad = pad
        self.last = last

    def forward(self, x: Activation) -> tuple[Tensor, ...]:
        """Returns ``(hidden, mask)`` or ``(hidden, last, mask)``."""
        ids, *more = x if isinstance(x, tuple) else (x,)
        valid = torch.ones_like(ids, dtype=torch.bool) if self.pad is None else ids.ne(self.pad)
        hidden = self.embed(ids, more[1] if len(more) > 1 else None)
        mask = more[0].bool() if more else valid
        if not self.last:
            return hidden, mask
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (places * valid).argmax(dim=1) if self.pad is not None else torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return hidden, last, mask


class TypedEmbeddings(nn.Module):
    """Embeddings of BERT and RoBERTa."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        """Embeds words, token types and positions."""
        return self.embeddings(input_ids=ids, token_type_ids=types)


class PlainEmbeddings(nn.Module):
    """Embeddings of DistilBERT and of decoders with rotary positions: ids alone."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        """Embeds ids; raises on token types, which these models do not have."""
        if types is not None:
            raise ALLayerError("got (ids, mask, token types): this model has no token types; give (ids, mask)")
        return self.embeddings(ids)


class GPT2Embeddings(nn.Module):
    """Embeddings of GPT-2: words, positions, and token types, which share the word embedding."""

    def __init__(self, words: nn.Module, positions: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.words, self.positions, self.dropout = words, positions, dropout

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        """Returns the sum of the embeddings."""
        hidden = self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).unsqueeze(0))
        return self.dropout(hidden if types is None else hidden + self.words(types))


class TextBlocks(nn.Module):
    """A sequence of Transformer blocks: ``(hidden, .., mask)`` to the same.

    Args:
        blocks: the model's own blocks.
        masks: attention mask of each block, a name in :func:`attention_masks`.
        config: config of the model.
        rotary: maps ``(hidden, position ids)`` to ``(cos, sin)``, if the blocks need them.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], masks: Sequence[str], *, config: Any, rotary: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.masks = list(masks)
        self.config = config
        self.rotary = rotary

    def forward(self, s: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Updates the hidden states; all other tensors are returned unchanged."""
        hidden, *between, mask = s
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        made = {name: attention_masks()[name](self.config, hidden, mask, positions) for name in set(self.masks)}
        extra: dict[str, Any] = {}
        if self.rotary is not None:
            extra = {"position_ids": positions, "position_embeddings": self.rotary(hidden, position_ids=positions)}
        for block, name in zip(self.blocks, self.masks, strict=True):
            hidden = block(hidden, attention_mask=made[name], **extra)
        return (hidden, *between, mask)


def attention_masks() -> dict[str, Callable[[Any, Tensor, Tensor | None, Tensor | None], Any]]:
    """Returns, by name, the functions that compute attention masks from ``(config, hidden, mask, position ids)``.

    Raises:
        ALConfigError: the installed ``transformers`` has different mask functions.
    """
    try:
        from transformers import masking_utils as masks

        full, causal, sliding = (
            masks.create_bidirectional_mask,
            masks.create_causal_mask,
            masks.create_sliding_window_causal_mask,
        )
    except (ImportError, AttributeError):
        import transformers

        raise ALConfigError(
            f"transformers {transformers.__version__} is too old to be converted: install transformers>=5.24"
        ) from None

    def common(config: Any, hidden: Tensor, mask: Tensor | None) -> dict[str, Any]:
        return {"config": config, "inputs_embeds": hidden, "attention_mask": mask}

    return {
        "bidirectional": lambda config, hidden, mask, at: full(**common(config, hidden, mask)),
        "full_attention": lambda config, hidden, mask, at: causal(
            **common(config, hidden, mask), cache=None, position_ids=at
        ),
        "sliding_attention": lambda config, hidden, mask, at: sliding(
            **common(config, hidden, mask), cache=None, position_ids=at
        ),
    }
