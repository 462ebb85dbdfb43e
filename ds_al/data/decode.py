"""Decoding of compressed images to pixels, done once and cached next to the tables of ``datasets``."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_al.data.cache import key_of
from ds_al.errors import ALDataError

GREY = ("1", "L", "LA", "I;16")
"""Pillow modes without colour."""


def pixels(table: datasets.Dataset, column: str, *, size: int | None, folder: Path) -> Tensor:
    """Decodes all images of a table.

    Args:
        table: table with a column of images, or of their compressed bytes.
        column: name of that column.
        size: height and width to scale to; by default all images must have the same size.
        folder: cache of decoded images.

    Returns:
        ``(N, C, H, W)`` ``uint8``. C is 1 if all images are grey, otherwise 3.

    Raises:
        ALDataError: an entry is not an image, or images differ in size and ``size`` is not given.
    """
    path = folder / f"{key_of('pixels-nchw', table, column, size)}.npy"
    if not path.is_file():
        _write(path, _decode(table, column, size))
    return torch.from_numpy(np.load(path))


def _decode(table: datasets.Dataset, column: str, size: int | None) -> np.ndarray:
    """Decodes to ``(N, C, H, W)``."""
    decoded: np.ndarray | None = None
    for row, image in enumerate(_images(table, column)):
        grey = image.mode in GREY and (decoded is None or decoded.shape[1] == 1)
        image = image.convert("L" if grey else "RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        array = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        if decoded is None:
            decoded = np.empty((len(table), *array.shape), dtype=np.uint8)
        if array.shape[1:] != decoded.shape[2:]:
            (height, width), (first_height, first_width) = array.shape[1:], decoded.shape[2:]
            raise ALDataError(
                f"image {row} has {height} x {width} pixels, the first one {first_height} x {first_width}: set "
                "experiment.data.image_size to scale all of them to one size"
            )
        if len(array) > decoded.shape[1]:  # the first colour image after grey ones
            decoded = decoded.repeat(3, axis=1)
        decoded[row] = array
    if decoded is None:
        raise ALDataError("got a part without images: expected at least one")
    return decoded


def _images(table: datasets.Dataset, column: str) -> Iterator[Image.Image]:
    table = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    for row, entry in enumerate(table):
        value: Any = entry[column]
        data = value["bytes"] if isinstance(value, dict) else value
        try:
            if data is None:  # the table contains a path
                yield Image.open(value["path"])
            else:
                yield Image.open(io.BytesIO(data))
        except Exception as error:
            raise ALDataError(
                f"column {column!r} holds no image in row {row} ({type(error).__name__}): expected the bytes of a PNG, "
                "JPEG or another format that Pillow reads; choose another column by experiment.data.image_column"
            ) from error


def _write(path: Path, array: np.ndarray) -> None:
    """Writes the file atomically, since another rank may read it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
