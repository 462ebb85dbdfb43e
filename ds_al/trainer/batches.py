"""Collation of data set rows to the input of an engine, ``(x, labels)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate
from transformers import default_data_collator

from ds_al.convert import batches as of_transformers
from ds_al.data.loader import OrderedBatches
from ds_al.errors import ALConfigError, ALDataError
from ds_al.tensors import Activation

COLUMNS = {*of_transformers.INPUTS, *of_transformers.REFUSED, "labels"}
"""Columns that models of transformers have a meaning for; others are left out, as in ``Trainer``."""


def check_datasets(train: Any, evaluated: Any) -> None:
    """Checks that data sets have a length and rows by index, and are not empty; that of an evaluation may be several.

    Raises:
        ALConfigError: one is a stream, a loader or, to train, several data sets.
        ALDataError: one is empty.
    """
    several = evaluated if isinstance(evaluated, Mapping) else {"": evaluated}
    named = {"train_dataset": train, **{f"eval_dataset {key}".strip(): part for key, part in several.items()}}
    for name, data in named.items():
        if data is None:
            continue
        if isinstance(data, Mapping):
            raise ALConfigError(f"got {name} of {', '.join(map(str, data))}: expected one data set; give one of them")
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise ALConfigError(
                f"got {name} of {type(data).__name__}: expected a data set with a length and rows by index, such as "
                "datasets.Dataset. Train on a stream by engine.train_batch(iterator), in a loop of your own"
            )
        if not len(data):
            raise ALDataError(f"got {name} without rows: expected 1 or more")


class Batches:
    """Collates rows to micro-batches.

    Args:
        collator: maps rows to a mapping of tensors, or to ``(x, labels)``. ``None`` is transformers' default for rows
            that are mappings or objects, and torch's for rows ``(x, label)``.
        batch_fn: maps such a mapping to ``(x, labels)``; by default :func:`ds_al.convert.batch_fn`.
        used_alone: whether to remove columns that no model has a meaning for.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any] | None,
        *,
        batch_fn: Callable[[Any], Any] | None,
        used_alone: bool,
    ) -> None:
        self.collator, self.batch_fn, self.used_alone = collator, batch_fn, used_alone

    def collate(self, rows: list[Any]) -> Any:
        """Returns ``(x, labels)``; ``labels`` is ``None`` if the rows have none.

        Raises:
            ALDataError: the collator fails, or its batch is not understood.
        """
        pairs = self.collator is None and isinstance(rows[0], (tuple, list))
        collator = self.collator or (default_collate if pairs else default_data_collator)
        try:
            batch = collator([self._used_keys(row) for row in rows])
        except Exception as error:
            raise ALDataError(
                f"{getattr(collator, '__name__', type(collator).__name__)} makes no batch of {len(rows)} rows of "
                f"{type(rows[0]).__name__} ({type(error).__name__}: {error}): give ALTrainer a data_collator, or a "
                "tokenizer as processing_class, which pads texts of different lengths"
            ) from error
        if self.batch_fn is not None:
            return self.batch_fn(batch)
        if not isinstance(batch, Mapping):
            return batch
        return of_transformers.inputs(batch), batch.get("labels")

    def _used_keys(self, row: Any) -> Any:
        if not self.used_alone or self.batch_fn is not None or not isinstance(row, Mapping):
            return row
        return {key: value for key, value in row.items() if key in COLUMNS}

    def used(self, dataset: Any) -> Any:
        """Returns the data set without unused columns, so that they are not read."""
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
