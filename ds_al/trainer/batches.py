"""Collation of data set rows to the input of an engine, ``(x, labels)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ds_al.convert import batch_fn as of_transformers
from ds_al.data.loader import OrderedBatches
from ds_al.errors import ALDataError
from ds_al.tensors import Activation

LABELS = ("labels", "label", "label_ids")
COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", *LABELS)
"""Columns that a converted model or its collator accepts."""


class Batches:
    """Collates rows to micro-batches.

    Args:
        collator: maps rows to a mapping of tensors, or to ``(x, labels)``.
        batch_fn: maps such a mapping to ``(x, labels)``; by default :func:`ds_al.convert.batch_fn`.
        used_alone: whether to remove columns that no supported model accepts.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        *,
        batch_fn: Callable[[Any], Any] | None,
        used_alone: bool,
    ) -> None:
        self.collator, self.batch_fn, self.used_alone = collator, batch_fn, used_alone

    def collate(self, rows: list[Any]) -> Any:
        """Returns ``(x, labels)``; ``labels`` is ``None`` if the rows have none."""
        batch = self.collator(rows)
        if self.batch_fn is not None:
            return self.batch_fn(batch)
        if not isinstance(batch, Mapping):
            return batch
        if not {"input_ids", "pixel_values"} & batch.keys():
            raise ALDataError(
                f"got a batch of {', '.join(batch)}: expected input_ids or pixel_values. Rename columns, or give "
                "batch_fn=, which makes (x, labels) of a batch"
            )
        labelled: dict[str, Any] = {**batch, "labels": batch.get("labels")}
        return of_transformers(labelled)

    def used(self, dataset: Any) -> Any:
        """Returns the data set without unused columns."""
        names = getattr(dataset, "column_names", None)
        if not self.used_alone or self.batch_fn is not None or not isinstance(names, list):
            return dataset
        unused = [name for name in names if name not in COLUMNS]
        return dataset.remove_columns(unused) if unused and len(unused) < len(names) else dataset

    def in_order(self, dataset: Any, *, batch_size: int) -> OrderedBatches:
        """Returns the batches of one pass over a data set, for evaluation."""
        return OrderedBatches(self.used(dataset), batch_size=batch_size, collate_fn=self.collate)

    def has_labels(self, dataset: Any) -> bool:
        """Returns whether the first row has labels."""
        return next(iter(self.in_order(dataset, batch_size=1)))[1] is not None


class Inputs:
    """Iterates over the ``x`` of batches, for prediction."""

    def __init__(self, batches: OrderedBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Activation]:
        return (x for x, _ in self._batches)


def joined(parts: Sequence[Tensor]) -> np.ndarray:
    """Concatenates batches to one array; texts of different lengths are padded with -100, as in transformers."""
    from transformers.trainer_pt_utils import nested_concat, nested_numpify

    whole: Any = parts[0]
    for part in parts[1:]:
        whole = nested_concat(whole, part, padding_index=-100)
    return nested_numpify(whole)
