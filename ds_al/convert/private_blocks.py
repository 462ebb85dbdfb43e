"""New blocks of a model's own kind, which a bridge has for itself: they serve its exit alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ds_al.convert.text import TextBlocks


class PrivateBlocks:
    """Makes new blocks with the weights that the model's own start from; under the seed of whoever calls it.

    Args:
        count: H.
        model: of ``transformers``.
        block: one of its blocks, of whose class the new ones are.
        at: its place, for models whose blocks differ by their place.
        mask: its attention, a name of :func:`~ds_al.convert.text.attention_masks`.
        rotary: see :class:`~ds_al.convert.text.TextBlocks`.
    """

    def __init__(
        self, count: int, *, model: Any, block: nn.Module, at: int, mask: str, rotary: nn.Module | None
    ) -> None:
        self.count, self.at, self.mask, self.rotary = count, at, mask, rotary
        self.model_class, self.block_class = type(model), type(block)
        self.config = copy.deepcopy(model.config)

    def __call__(self) -> TextBlocks:
        """``(hidden, .., mask)`` to the same."""
        with torch.device("meta"):
            skeleton = self.model_class(self.config)  # knows how weights start
        blocks = [self.block_class(self.config, layer_idx=self.at) for _ in range(self.count)]
        made = TextBlocks(blocks, [self.mask] * self.count, config=self.config, rotary=copy.deepcopy(self.rotary))
        made.apply(skeleton._init_weights)
        return made
