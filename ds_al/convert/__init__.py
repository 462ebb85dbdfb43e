"""Conversion of existing models to AL networks, and export of AL networks as plain models.

    layers         a layer list of DeepSpeed's ``PipelineModule``: ``ds_al.from_layers``
    hugging_face   a model of ``transformers``: ``ds_al.from_pretrained``
    batches        batches of a collator of ``transformers``
    new_parts      parts that the model has not, and how they start
    export         weights that ``transformers`` loads, or a program: ``ds_al.export``

Both importers end in :func:`ds_al.convert.assemble.al_layers`: the blocks become f, the head and the bridges chosen by
the activation of each group become b, and g and h are new. The user guide is ``docs/from_your_model.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def batch_fn(batch: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    """Converts a batch of a ``transformers`` collator to ``(x, labels)``, for ``engine.set_batch_fn``.

    x is ``pixel_values``, or those of ``input_ids``, ``attention_mask`` and ``token_type_ids`` that the batch contains.
    Keys whose value is ``None`` are left out.

    Example:
        >>> batch = {"input_ids": torch.ones(4, 7).long(), "attention_mask": torch.ones(4, 7), "labels": torch.zeros(4)}
        >>> (ids, mask), labels = ds_al.convert.batch_fn(batch)
        >>> ids.shape, labels.shape
        (torch.Size([4, 7]), torch.Size([4]))

    Raises:
        ALDataError: the batch has another key, no labels or no input, or a mask that is not one of 0 and 1 ``(B, T)``.
    """
    from ds_al.convert.batches import converted  # lazy: imports torch

    return converted(batch)


def parameter_groups(network: nn.Module, *, lr: float, new_lr: float) -> list[dict[str, Any]]:
    """Returns the trained weights as two groups, for ``ds_al.initialize(model_parameters=...)``.

    New parts start from random numbers and usually need a higher learning rate than what is pretrained.

    Args:
        network: result of :func:`ds_al.from_pretrained`.
        lr: learning rate of the model's own weights.
        new_lr: learning rate of bridges, codes and the classifier.
    """
    from ds_al.convert.new_parts import groups  # lazy: imports torch

    return groups(network, lr=lr, new_lr=new_lr)
