"""Image data sets as normalised tensors, cut into train, validation and test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ds_al.errors import ALDataError

Images = tuple[Tensor, Tensor]
"""Images ``(N, C, H, W)`` of ``uint8`` and labels ``(N,)`` of ``int64``."""


@dataclass(frozen=True)
class Splits:
    """A data set, cut in three. Each part yields ``(x, y)``: float32 ``(C, H, W)`` and a class number."""

    train: Dataset
    """What a model trains on."""
    validation: Dataset
    """Cut from the training images: what settings are chosen by."""
    test: Dataset
    """The published test images, all of them: what is reported."""
    classes: list[str]
    """Names of the classes, by number."""
    shape: tuple[int, ...]
    """``(C, H, W)`` of an image."""


def load_vision(name: str, *, validation_fraction: float = 0.1, seed: int = 0) -> Splits:
    """Loads an image data set.

    Pixels are scaled per channel to mean 0 and standard deviation 1 of the training part.

    Args:
        name: a key of :data:`VISION_DATASETS`.
        validation_fraction: share of the training images that becomes the validation part, 0 included.
        seed: decides which images those are.

    Raises:
        ALDataError: the name is unknown, or the fraction leaves no training image.
    """
    if name not in VISION_DATASETS:
        raise ALDataError(f"got data set {name!r}: expected one of {sorted(VISION_DATASETS)}")
    (x, y), (x_test, y_test), classes = VISION_DATASETS[name]()
    held_out = round(len(x) * validation_fraction)
    if not 0 <= held_out < len(x):
        raise ALDataError(
            f"got validation_fraction={validation_fraction}: expected 0 <= fraction < 1, so that some of the "
            f"{len(x)} training images of {name!r} remain to train on"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:held_out].sort().values, order[held_out:].sort().values
    scale = _standardise(x[kept])
    return Splits(
        train=TensorDataset(scale(x[kept]), y[kept]),
        validation=TensorDataset(scale(x[held]), y[held]),
        test=TensorDataset(scale(x_test), y_test),
        classes=classes,
        shape=tuple(x.shape[1:]),
    )


def _standardise(x_train: Tensor) -> Callable[[Tensor], Tensor]:
    std, mean = torch.std_mean(x_train.float(), dim=(0, 2, 3), keepdim=True)
    return lambda x: (x.float() - mean) / std


def _fashion_mnist_small() -> tuple[Images, Images, list[str]]:
    """10,000 training and 2,000 test images ``(1, 28, 28)`` of Fashion-MNIST; MIT, Zalando SE."""
    folder = resources.files("ds_al.data")
    with (folder / "fashion-mnist-small.npz").open("rb") as file, np.load(file) as arrays:
        train, test = (
            (torch.from_numpy(arrays[f"x_{part}"])[:, None], torch.from_numpy(arrays[f"y_{part}"]))
            for part in ("train", "test")
        )
    return train, test, json.loads((folder / "fashion-mnist-small.classes.json").read_text())


VISION_DATASETS: dict[str, Callable[[], tuple[Images, Images, list[str]]]] = {
    "fashion-mnist-small": _fashion_mnist_small,
}
"""Known data sets: ``() -> (training images, test images, class names)``."""
