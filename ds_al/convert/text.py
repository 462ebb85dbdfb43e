"""Embeddings and blocks of ``transformers`` text models, called as the model calls them.

``s`` is ``(hidden (B, T, D), mask (B, T))``, or ``(hidden, last (B,), mask)`` for classifiers on the last token. The
mask is boolean, true at a token; each group of blocks computes its attention mask from it with the functions of
``transformers``, so a message carries one bit per token instead of one per pair of tokens.

``x`` is ``ids (B, T)``, ``(ids, mask)`` or ``(ids, mask, token types)``. Without a mask, all tokens are valid except
the model's padding token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.convert.tokens import check_form, check_values
from ds_al.errors import ALConfigError, ALDataError
from ds_al.tensors import Activation


class TextInput(nn.Module):
    """Embeds token ids as the model does.

    Args:
        embed: an :class:`Embeddings`.
        config: config of the model, whose padding token marks padding where there is no mask.
        last: whether to return the index of the last token ``(B,)``, computed as in ``transformers``.
    """

    def __init__(self, embed: Embeddings, *, config: Any, last: bool) -> None:
        super().__init__()
        self.embed = embed
        self.pad, self.ends = config.pad_token_id, _ends(config)
        self.last = last

    def forward(self, x: Activation) -> tuple[Tensor, ...]:
        """Returns ``(hidden, mask)`` or ``(hidden, last, mask)``.

        Raises:
            ALDataError: x is no ``ids``, ``(ids, mask)`` or ``(ids, mask, token types)`` that the model can embed.
        """
        ids, mask, types = _split(x)
        check_form(ids, mask, types, longest=self.embed.longest)
        if not _traced():
            self.check_network_input(x)
        hidden = self.embed(ids, types)
        valid = self._valid(ids) if mask is None else mask.bool()
        return (hidden, self._last(ids, mask), valid) if self.last else (hidden, valid)

    def check_network_input(self, x: Activation) -> None:
        """Checks the values of x on the CPU, where that waits for nothing; the engine calls it before it moves x.

        Raises:
            ALDataError: see :func:`~ds_al.convert.tokens.check_values`.
        """
        ids, mask, types = _split(x)
        if ids.device.type == "cpu":
            check_values(ids, mask, types, vocabulary=self.embed.vocabulary, kinds=self.embed.kinds)

    def _valid(self, ids: Tensor) -> Tensor:
        """Returns the mask of ids alone. A padding token that also ends texts does not tell padding from text."""
        if self.pad is None or self.pad in self.ends:
            return torch.ones_like(ids, dtype=torch.bool)
        return ids.ne(self.pad)

    def _last(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the index of the last token: by the padding token, and by the mask in models that have none."""
        if self.pad is not None:
            tokens = ids.ne(self.pad)
        elif mask is not None:
            tokens = mask.bool()
        elif len(ids) == 1:
            tokens = torch.ones_like(ids, dtype=torch.bool)
        else:
            raise ALDataError(
                f"got {len(ids)} texts of ids alone for a model without a padding token, so where they end is not "
                "known: give (ids, mask), or set model.config.pad_token_id before from_pretrained"
            )
        return (torch.arange(ids.shape[1], device=ids.device) * tokens).argmax(dim=1)


def _split(x: Activation) -> tuple[Tensor, Tensor | None, Tensor | None]:
    parts = x if isinstance(x, tuple) else (x,)
    if not 1 <= len(parts) <= 3:
        raise ALDataError(f"got x of {len(parts)} tensors: expected ids, (ids, mask) or (ids, mask, token types)")
    ids, mask, types = (*parts, None, None, None)[:3]
    assert ids is not None
    return ids, mask, types


def _ends(config: Any) -> list[int]:
    """Returns the ids of the tokens that end a text."""
    ends = getattr(config, "eos_token_id", None)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Embeddings(nn.Module):
    """Embeddings of a model: ``(ids (B, T), token types (B, T) or None) -> hidden (B, T, D)``.

    Attributes:
        vocabulary: number of token ids.
        kinds: number of token types; 0 if there are none.
        longest: number of positions, or ``None`` if any length can be embedded.
    """

    vocabulary: int
    kinds: int = 0
    longest: int | None = None


class TypedEmbeddings(Embeddings):
    """Embeddings of BERT and RoBERTa; those of RoBERTa start at the position after the padding token's id."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.vocabulary = len(embeddings.word_embeddings.weight)
        self.kinds = len(embeddings.token_type_embeddings.weight)
        positions = embeddings.position_embeddings
        first = 0 if positions.padding_idx is None else positions.padding_idx + 1
        self.longest = len(positions.weight) - first

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        """Embeds words, token types and positions."""
        return self.embeddings(input_ids=ids, token_type_ids=types)


class PlainEmbeddings(Embeddings):
    """Embeddings of DistilBERT and of decoders with rotary positions: ids alone."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.vocabulary = len(getattr(embeddings, "word_embeddings", embeddings).weight)
        if hasattr(embeddings, "position_embeddings"):
            self.longest = len(embeddings.position_embeddings.weight)

    def forward(self, ids: Tensor, types: Tensor | None) -> Tensor:
        """Embeds ids; raises on token types, which these models do not have."""
        if types is not None:
            raise ALDataError("got (ids, mask, token types): this model has no token types; give (ids, mask)")
        return self.embeddings(ids)


class GPT2Embeddings(Embeddings):
    """Embeddings of GPT-2: words, positions, and token types, which share the word embedding."""

    def __init__(self, words: nn.Embedding, positions: nn.Embedding, dropout: nn.Module) -> None:
        super().__init__()
        self.words, self.positions, self.dropout = words, positions, dropout
        self.vocabulary = self.kinds = len(words.weight)
        self.longest = len(positions.weight)

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

    @property
    def num_blocks(self) -> int:
        """Number of blocks, between which stages may cut."""
        return len(self.blocks)

    def part(self, run: range) -> TextBlocks:
        """Returns a run of the blocks, with the names that they have here."""
        part = copy.copy(self)
        part._modules = {**self._modules, "blocks": run_of_list(self.blocks, run)}
        part.masks = self.masks[run.start : run.stop]
        return part

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


def run_of_list(modules: nn.ModuleList, run: range) -> nn.ModuleList:
    """Returns a run of the modules of a list, under the names that they have in it."""
    part = copy.copy(modules)
    part._modules = dict(list(modules._modules.items())[run.start : run.stop])
    return part


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
