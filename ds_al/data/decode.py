"""Decoding of compressed images to pixels, done once and cached."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ds_al.data import cache
from ds_al.errors import ALDataError

GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow modes without colour."""

Image.init()
FORMATS = tuple(
    str(name)
    for name in (
        "PNG",
        "JPEG",
        "JPEG2000",
        "GIF",
        "BMP",
        "DIB",
        "TIFF",
        "WEBP",
        "AVIF",
        "PPM",
        "TGA",
        "ICO",
        "PCX",
        "SGI",
    )
    if name in Image.OPEN
)
"""Formats that are read: of those that Pillow decodes by itself. It has others decoded by programs, such as EPS."""


def pixels(
    table: datasets.Dataset, column: str, *, size: int | None, folder: Path, place: Callable[[int], str]
) -> Tensor:
    """Decodes all images of a table.

    An image is turned as its EXIF data say, transparency is left out, and of several frames the first is taken.

    Args:
        table: table with a column of images, or of their compressed bytes.
        column: name of that column.
        size: height and width to scale to; by default all images must have the same size.
        folder: cache of decoded images.
        place: where a row is, for errors.

    Returns:
        ``(N, C, H, W)`` ``uint8``. C is 1 if all images are grey, otherwise 3.

    Raises:
        ALDataError: an entry is not an image, or has no range of values that is known, or images differ in size and
            ``size`` is not given, or all together do not fit in memory.
    """
    key = cache.key_of("pixels", table, column, size)
    return torch.from_numpy(cache.kept(folder, key, lambda: {"pixels": _decode(table, column, size, place)})["pixels"])


def _decode(table: datasets.Dataset, column: str, size: int | None, place: Callable[[int], str]) -> np.ndarray:
    """Decodes to ``(N, C, H, W)``."""
    decoded: np.ndarray | None = None
    for row, image in enumerate(_images(table, column, place)):
        grey = image.mode == "L" and (decoded is None or decoded.shape[1] == 1)
        image = image if grey else image.convert("RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        array = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        if decoded is None:
            decoded = _empty((len(table), *array.shape))
        if array.shape[1:] != decoded.shape[2:]:
            (height, width), (first_height, first_width) = array.shape[1:], decoded.shape[2:]
            raise ALDataError(
                f"the image in {place(row)} has {height} x {width} pixels, the first one {first_height} x "
                f"{first_width}: set experiment.data.image_size to scale all of them to one size"
            )
        if len(array) > decoded.shape[1]:  # the first colour image after grey ones
            decoded = decoded.repeat(3, axis=1)
        decoded[row] = array
    if decoded is None:
        raise ALDataError("got a part without images: expected at least one")
    return decoded


def _images(table: datasets.Dataset, column: str, place: Callable[[int], str]) -> Iterator[Image.Image]:
    """Yields the images, of mode ``L`` or ``RGB``."""
    table = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    for row, entry in enumerate(table):
        value: Any = entry[column]
        try:
            image = _open(value)
        except Exception as error:
            raise ALDataError(
                f"column {column!r} holds no image in {place(row)} ({type(error).__name__}: {error}): expected the "
                f"bytes of a whole image that Pillow decodes by itself, {', '.join(FORMATS)}; mend the row or leave it "
                "out, or choose another column by experiment.data.image_column"
            ) from error
        yield image


def _open(value: Any) -> Image.Image:
    """Decodes one entry: bytes, or as ``datasets`` stores images, with their bytes or the path of a file."""
    data = value["bytes"] if isinstance(value, dict) else value
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(value["path"] if data is None else io.BytesIO(data), formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)  # reads all of it
            return _eight_bits(image) if image.mode in GREY else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts a grey image to 8 bits; those of more bits keep their range, 16 bits or floats from 0 to 1.

    Raises:
        ValueError: the values are in no such range.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("L")
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"floats from {low} to {high}: expected 0 to 1")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if image.mode == "I" and (low < 0 or high > 65535 or 0 < high < 256):
        raise ValueError(f"32-bit integers from {low} to {high}: expected 16 bits, 0 to 65535, or save it with 8 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty(shape, dtype=np.uint8)
    except MemoryError as error:
        raise ALDataError(
            f"{shape[0]} images of {shape[2]} x {shape[3]} pixels do not fit in memory: set experiment.data.image_size "
            "to scale them"
        ) from error
