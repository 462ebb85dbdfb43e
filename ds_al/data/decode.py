"""Compressed images to pixels, once: what was decoded is kept beside the tables of ``datasets``."""

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


def pixels(table: datasets.Dataset, column: str, *, size: int | None, folder: Path) -> Tensor:
    """All images of a table.

    Args:
        table: with a column of images, or of their compressed bytes.
        column: that column.
        size: height and width to scale to; by default all images must be alike.
        folder: where decoded images are kept, and found again.

    Returns:
        ``(N, C, H, W)`` ``uint8``. C is 1 where the first image is grey, otherwise 3.

    Raises:
        ALDataError: something is no image, or images differ in size and none is given.
    """
    path = folder / f"{key_of('pixels', table, column, size)}.npy"
    if not path.is_file():
        _write(path, _decode(table, column, size))
    return torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).contiguous()


def _decode(table: datasets.Dataset, column: str, size: int | None) -> np.ndarray:
    """``(N, H, W, C)``, as image files hold them."""
    decoded: np.ndarray | None = None
    for row, image in enumerate(_images(table, column)):
        if decoded is None:
            mode = "L" if image.mode in ("1", "L", "I;16", "LA") else "RGB"
        image = image.convert(mode)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        array = np.asarray(image).reshape(image.height, image.width, -1)
        if decoded is None:
            decoded = np.empty((len(table), *array.shape), dtype=np.uint8)
        if array.shape != decoded.shape[1:]:
            (height, width), (first_height, first_width) = array.shape[:2], decoded.shape[1:3]
            raise ALDataError(
                f"image {row} has {height} x {width} pixels, the first one {first_height} x {first_width}: set "
                "experiment.data.image_size to scale all of them to one size"
            )
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
            if data is None:  # the table names a file
                yield Image.open(value["path"])
            else:
                yield Image.open(io.BytesIO(data))
        except Exception as error:
            raise ALDataError(
                f"column {column!r} holds no image in row {row} ({type(error).__name__}): expected the bytes of a PNG, "
                "JPEG or another format that Pillow reads; choose another column by experiment.data.image_column"
            ) from error


def _write(path: Path, array: np.ndarray) -> None:
    """All or nothing: another rank may look for the file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
