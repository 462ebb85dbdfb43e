"""Data of a run: facts that every stage knows, keyword arguments of the model, loaders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ds_al.data import AUGMENTATIONS, ShuffledLoader, Splits, load_data, ordered_batches
from ds_al.data.config import DataConfig
from ds_al.data.loader import SizedDataset
from ds_al.data.splits import Kind
from ds_al.errors import ALConfigError, ALDataError
from ds_al.models import AL_MODELS, TWINS
from ds_al.parallel import meetings
from ds_al.parallel.agreement import agreed
from ds_al.system import plain
from ds_al.tensors import Activation


@plain.record
@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Facts of a data set that every stage knows; fields of the same names as in :class:`~ds_al.data.Splits`.

    ``sizes`` has the number of samples of each part.
    """

    kind: Kind
    classes: list[str]
    shape: tuple[int, ...]
    vocab_size: int | None
    padding_id: int | None
    varying: bool
    sizes: dict[str, int]

    @classmethod
    def of(cls, splits: Splits) -> DataFacts:
        """Reads the facts of a loaded data set.

        Raises:
            ALDataError: a part is empty.
        """
        sizes = {part: len(getattr(splits, part)) for part in ("train", "validation", "test")}
        if empty := [part for part, size in sizes.items() if not size]:
            raise ALDataError(
                f"the {empty[0]} part is empty, of {sizes}: expected at least one sample in each"
                + ("; raise experiment.data.validation_fraction" if empty[0] == "validation" else "")
            )
        names = ("kind", "classes", "shape", "vocab_size", "padding_id", "varying")
        shared: dict[str, Any] = {name: getattr(splits, name) for name in names}
        return cls(**shared, sizes=sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Type of x; of its token ids where it is text."""
        return torch.float32 if self.kind == "image" else torch.int64

    def example(self, samples: int) -> Activation:
        """Makes a micro-batch x to time layers with; texts have their greatest length."""
        if self.kind == "image":
            return torch.zeros(samples, *self.shape)
        ids = torch.ones(samples, self.shape[0], dtype=torch.int64)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def options(self, model: str) -> dict[str, Any]:
        """Selects the keyword arguments of a model that follow from the data, of those that either form accepts.

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
            return offered  # building the model raises an error that lists the known names
        taken = _taken(AL_MODELS[model]) | (_taken(TWINS[model]) if model in TWINS else set())
        if needed not in taken and {"in_shape", "vocab_size"} & taken:
            fitting = sorted(name for name, maker in AL_MODELS.items() if needed in _taken(maker))
            what = "text" if self.kind == "text" else "images"
            raise ALConfigError(
                f"model {model!r} does not read {what}, which the data holds: expected one of {fitting}"
            )
        return {key: value for key, value in offered.items() if key in taken}


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Data of a run: its facts on every process, its samples (``splits``) where they are read."""

    config: DataConfig
    seed: int
    splits: Splits | None
    facts: DataFacts

    @classmethod
    def load(cls, config: DataConfig, *, seed: int, read: bool) -> RunData:
        """Loads the data set where ``read`` is true, and receives its facts from rank 0; every rank must call it.

        Raises:
            ALConfigError: on all ranks: a key is set that does not concern this data set, or ranks read different data.
            ALDataError: the data set cannot be found, is not what the block says, or has an empty part.
        """

        def loaded() -> tuple[Splits, DataFacts] | None:
            if not read:
                return None
            splits = load_data(config, seed=seed)
            return splits, DataFacts.of(splits)

        here = agreed("the data", loaded, facts=lambda found: {} if found is None else asdict(found[1]), bounded=False)
        facts = meetings.broadcast(None if here is None else here[1], source=0)
        return cls(config=config, seed=seed, splits=here and here[0], facts=facts)

    def training_loader(self, *, batch_size: int, share: tuple[int, int]) -> ShuffledLoader | None:
        """Makes the loader of training micro-batches, the same ones for AL and its twin, where data is read.

        Args:
            batch_size: samples per micro-batch.
            share: ``(r, R)`` for replica r of R (:class:`~ds_al.data.ShuffledLoader`).
        """
        if self.splits is None:
            return None
        return ShuffledLoader(
            cast(SizedDataset, self.splits.train),
            batch_size=batch_size,
            seed=self.seed,
            augment=AUGMENTATIONS[self.config.augment],
            lengths=self.splits.lengths,
            share=share,
            prefetch=self.config.prefetch,
        )

    def evaluation_batches(self, part: str) -> Iterable[Any]:
        """Makes one pass over a part, in its own order; placeholders on a process that reads no data."""
        if self.splits is None:
            return [(None, None)] * -(-self.facts.sizes[part] // self.config.eval_batch_size)
        return ordered_batches(getattr(self.splits, part), batch_size=self.config.eval_batch_size)

    def save_vocabulary(self, path: Path) -> None:
        """Writes the vocabulary that was built from the training part, where there is one."""
        if self.splits is not None and self.splits.save_vocabulary is not None:
            self.splits.save_vocabulary(path)


def _taken(maker: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(maker).parameters)
