"""Small data sets as folders of parquet files, and where the larger ones for development lie."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ds_al.data.config import DataConfig

ROOT = Path(__file__).resolve().parents[2]


def shared(name: str) -> Path:
    """A folder of the data for development: below ``DS_AL_DATA``, or else beside the repository."""
    folder = Path(os.environ.get("DS_AL_DATA", ROOT.parent / "shared/data")) / name
    if not folder.exists():
        pytest.skip(f"{name} is not on this machine: set DS_AL_DATA to the folder that holds it")
    return folder


def config(folder: Path, **keys: Any) -> DataConfig:
    """A data block for the parquet files of this folder, with its cache beside them."""
    return DataConfig(**{"name": "own", "path": str(folder), "cache": str(folder / "cache"), **keys})


def write(folder: Path, part: str, **columns: Any) -> Path:
    """Writes one part; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    return folder


def png(pixels: np.ndarray) -> bytes:
    """Encodes ``(H, W)`` or ``(H, W, 3)`` without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def random_images(count: int, *, size: int = 8, seed: int = 0) -> np.ndarray:
    """``(N, H, W, 3)``, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_images(folder: Path, *, train: int = 40, test: int = 10) -> Path:
    """Images of seeds 0 (train) and 1 (test), labels 0 to 3 in turn."""
    for seed, (part, count) in enumerate((("train", train), ("test", test))):
        images = [png(image) for image in random_images(count, seed=seed)]
        write(folder, part, image=images, label=[row % 4 for row in range(count)])
    return folder


def write_texts(folder: Path, *, train: int = 60, test: int = 12, longest: int = 20) -> Path:
    """Texts of 1 to ``longest`` words whose words tell the class, 0 to 2; the test part has words of its own."""
    for part, count in (("train", train), ("test", test)):
        draw = random.Random(part)
        labels = [row % 3 for row in range(count)]
        texts = [
            " ".join(f"{part if draw.random() < 0.1 else 'topic'}{label}{draw.randrange(4)}" for _ in range(length))
            for label, length in ((label, draw.randint(1, longest)) for label in labels)
        ]
        write(folder, part, text=texts, label=labels)
    return folder
