"""Image data sets bundled with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from ds_al.data.images import Images, statistics
from ds_al.data.splits import Splits, cut
from ds_al.errors import ALDataError

Labelled = tuple[Tensor, Tensor]
"""Images ``(N, C, H, W)`` of ``uint8`` and labels ``(N,)`` of ``int64``."""


def load_vision(name: str, *, validation_fraction: float = 0.1, seed: int = 0) -> Splits:
    """Loads an image data set bundled with the package.

    Pixels are normalised per channel to mean 0 and standard deviation 1 of the training part.

    Args:
        name: a key of :data:`VISION_DATASETS`.
        validation_fraction: share of the training images that are used for validation; may be 0.
        seed: seed of the choice of these images.

    Raises:
        ALDataError: the name is unknown, or the fraction leaves no training image.
    """
    if name not in VISION_DATASETS:
        raise ALDataError(f"got data set {name!r}: expected one of {sorted(VISION_DATASETS)}")
    (pixels, labels), test, classes = VISION_DATASETS[name]()
    kept, held = cut(len(labels), fraction=validation_fraction, seed=seed, name=name)
    scale = statistics(pixels[kept])
    return Splits(
        kind="image",
        train=Images(pixels[kept], labels[kept], statistics=scale),
        validation=Images(pixels[held], labels[held], statistics=scale),
        test=Images(*test, statistics=scale),
        classes=classes,
        shape=tuple(pixels.shape[1:]),
    )


def _fashion_mnist_small() -> tuple[Labelled, Labelled, list[str]]:
    """Loads 10,000 training and 2,000 test images ``(1, 28, 28)`` of Fashion-MNIST; MIT, Zalando SE."""
    folder = resources.files("ds_al.data")
    with (folder / "fashion-mnist-small.npz").open("rb") as file, np.load(file) as arrays:
        train, test = (
            (torch.from_numpy(arrays[f"x_{part}"])[:, None], torch.from_numpy(arrays[f"y_{part}"]))
            for part in ("train", "test")
        )
    return train, test, json.loads((folder / "fashion-mnist-small.classes.json").read_text())


VISION_DATASETS: dict[str, Callable[[], tuple[Labelled, Labelled, list[str]]]] = {
    "fashion-mnist-small": _fashion_mnist_small,
}
"""Bundled data sets: ``() -> (training images, test images, class names)``."""
