"""Private blocks of bridges: new blocks of the model's own kind, used by one exit alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ds_al.convert.text import TextBlocks


class PrivateBlocks:
    """Builds new blocks with the model's own weight initialization, under the current random seed.

    Args:
        count: number of blocks.
        model: a model of ``transformers``.
        block: one of its blocks, which determines the class of the new ones.
        at: index of that block, for models whose blocks depend on their index.
        mask: its attention mask, a name in :func:`~ds_al.convert.text.attention_masks`.
        rotary: see :class:`~ds_al.convert.text.TextBlocks`.
    """

    def __init__(
        self, count: int, *, model: Any, block: nn.Module, at: int, mask: str, rotary: nn.Module | None
    ) -> None:
        self.count, self.at, self.mask, self.rotary = count, at, mask, rotary
        self.model_class, self.block_class = type(model), type(block)
        self.config = copy.deepcopy(model.config)

    def __call__(self) -> TextBlocks:
        """Builds the blocks: ``(hidden, .., mask)`` to the same."""
        with torch.device("meta"):
            skeleton = self.model_class(self.config)  # has the weight initialization
        blocks = [self.block_class(self.config, layer_idx=self.at) for _ in range(self.count)]
        made = TextBlocks(blocks, [self.mask] * self.count, config=self.config, rotary=copy.deepcopy(self.rotary))
        made.apply(skeleton._init_weights)
        return made
