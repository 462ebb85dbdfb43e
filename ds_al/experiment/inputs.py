"""What a run's engine needs of its data: what stages without data must know, options of the model, loaders."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from ds_al.data import AUGMENTATIONS, ShuffledLoader, Splits
from ds_al.data.config import DataConfig
from ds_al.data.loader import SizedDataset
from ds_al.data.splits import Kind
from ds_al.errors import ALConfigError, ALDataError
from ds_al.models import AL_MODELS, TWINS
from ds_al.tensors import Activation

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What every stage knows of the data; see :class:`~ds_al.data.Splits` for the fields of the same names."""

    kind: Kind
    classes: list[str]
    shape: tuple[int, ...]
    vocab_size: int | None
    padding_id: int | None
    varying: bool
    sizes: dict[str, int]
    """Samples of each part."""
    builds_vocabulary: bool
    """The vocabulary was built from the training part, so the run keeps it."""

    @classmethod
    def of(cls, splits: Splits) -> DataFacts:
        """Those of a loaded set.

        Raises:
            ALDataError: a part is empty.
        """
        sizes = {part: len(getattr(splits, part)) for part in PARTS}
        if empty := [part for part, size in sizes.items() if not size]:
            raise ALDataError(
                f"the {empty[0]} part is empty, of {sizes}: expected at least one sample in each"
                + ("; raise experiment.data.validation_fraction" if empty[0] == "validation" else "")
            )
        return cls(
            kind=splits.kind,
            classes=splits.classes,
            shape=splits.shape,
            vocab_size=splits.vocab_size,
            padding_id=splits.padding_id,
            varying=splits.varying,
            sizes=sizes,
            builds_vocabulary=splits.save_vocabulary is not None,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of x, of its ids where it is text."""
        return torch.float32 if self.kind == "image" else torch.int64

    def example(self, samples: int) -> Activation:
        """A micro-batch x to time layers with; texts are of full length."""
        if self.kind == "image":
            return torch.zeros(samples, *self.shape)
        ids = torch.ones(samples, self.shape[0], dtype=torch.int64)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def options(self, model: str) -> dict[str, Any]:
        """Keyword arguments of a model that follow from the data, those that either of its forms takes.

        Raises:
            ALConfigError: the model reads images and the data is text, or the other way round.
        """
        offered: dict[str, Any] = {"num_classes": len(self.classes)}
        if self.kind == "image":
            needed = "in_shape"
            offered |= {"in_shape": self.shape}
        else:
            needed = "vocab_size"
            offered |= {"vocab_size": self.vocab_size, "padding_id": self.padding_id, "max_length": self.shape[0]}
        if model not in AL_MODELS:
            return offered  # building it names those there are
        taken = _taken(AL_MODELS[model]) | (_taken(TWINS[model]) if model in TWINS else set())
        if needed not in taken and {"in_shape", "vocab_size"} & taken:
            fitting = sorted(name for name, maker in AL_MODELS.items() if needed in _taken(maker))
            what = "text" if self.kind == "text" else "images"
            raise ALConfigError(
                f"model {model!r} does not read {what}, which the data holds: expected one of {fitting}"
            )
        return {key: value for key, value in offered.items() if key in taken}


def training_loader(
    splits: Splits, config: DataConfig, *, batch_size: int, seed: int, share: tuple[int, int] = (0, 1)
) -> ShuffledLoader:
    """Micro-batches to train on; the same ones for AL and for its twin. ``share`` is that of a copy of the pipeline."""
    return ShuffledLoader(
        cast(SizedDataset, splits.train),
        batch_size=batch_size,
        seed=seed,
        augment=AUGMENTATIONS[config.augment],
        lengths=splits.lengths,
        share=share,
        prefetch=config.prefetch,
    )


def _taken(maker: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(maker).parameters)
