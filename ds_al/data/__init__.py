"""Data sets, and loaders whose order depends on nothing but the data, the batch size and the seed."""

from ds_al.data.augment import crop_and_flip
from ds_al.data.loader import OrderedBatches, ShuffledLoader, ordered_batches
from ds_al.data.vision import VISION_DATASETS, Splits, load_vision

__all__ = [
    "VISION_DATASETS",
    "OrderedBatches",
    "ShuffledLoader",
    "Splits",
    "crop_and_flip",
    "load_vision",
    "ordered_batches",
]
