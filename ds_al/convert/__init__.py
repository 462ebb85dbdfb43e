"""Converts layer lists and models of transformers to AL networks, and trained networks back to plain models.

    layers         a layer list of DeepSpeed's ``PipelineModule``: ``ds_al.from_layers``
    hugging_face   a model of ``transformers``: ``ds_al.from_pretrained``
    export         weights that ``transformers`` loads, or a program: ``ds_al.export``

Both ways in end in :func:`ds_al.convert.assemble.al_layers`: blocks with the activation that leaves each group of
them, and the head, become f and b; g and h are made new. The page for users is ``docs/from_your_model.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def batch_fn(batch: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    """Converts a batch of a ``transformers`` collator to ``(x, labels)``, for ``engine.set_batch_fn``.

    x is ``pixel_values``, or those of ``input_ids``, ``attention_mask`` and ``token_type_ids`` that are there.

    Example:
        >>> batch = {"input_ids": torch.ones(4, 7), "attention_mask": torch.ones(4, 7), "labels": torch.zeros(4)}
        >>> (ids, mask), labels = ds_al.convert.batch_fn(batch)
        >>> ids.shape, labels.shape
        (torch.Size([4, 7]), torch.Size([4]))
    """
    if "pixel_values" in batch:
        return batch["pixel_values"], batch["labels"]
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch]
    return tuple(batch[key] for key in keys), batch["labels"]
