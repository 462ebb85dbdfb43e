"""Rows of a data set to what an engine takes, ``(x, labels)``."""

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
"""Columns that a converted model, or its collator, takes."""


class Batches:
    """Makes micro-batches of rows.

    Args:
        collator: rows to a mapping of tensors, or to ``(x, labels)``.
        batch_fn: such a mapping to ``(x, labels)``; by default :func:`ds_al.convert.batch_fn`.
        used_alone: whether columns that no model here takes are left out.
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
        """``(x, labels)``; ``labels`` is ``None`` where the rows have none."""
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
        """A data set without columns that are not used."""
        names = getattr(dataset, "column_names", None)
        if not self.used_alone or self.batch_fn is not None or not isinstance(names, list):
            return dataset
        unused = [name for name in names if name not in COLUMNS]
        return dataset.remove_columns(unused) if unused and len(unused) < len(names) else dataset

    def in_order(self, dataset: Any, *, batch_size: int) -> OrderedBatches:
        """One pass over a data set, for evaluation."""
        return OrderedBatches(self.used(dataset), batch_size=batch_size, collate_fn=self.collate)

    def has_labels(self, dataset: Any) -> bool:
        """Whether rows have labels, found by the first."""
        return next(iter(self.in_order(dataset, batch_size=1)))[1] is not None


class Inputs:
    """The ``x`` of batches, for prediction."""

    def __init__(self, batches: OrderedBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Activation]:
        return (x for x, _ in self._batches)


def joined(parts: Sequence[Tensor]) -> np.ndarray:
    """Batches as one array; texts of different lengths are padded with -100, as transformers does."""
    from transformers.trainer_pt_utils import nested_concat, nested_numpify

    whole: Any = parts[0]
    for part in parts[1:]:
        whole = nested_concat(whole, part, padding_index=-100)
    return nested_numpify(whole)
