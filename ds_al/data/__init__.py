"""Data sets, and loaders with an order that depends only on the data, the batch size and the seed."""

from ds_al.data.augment import AUGMENTATIONS, colour_jitter, crop_and_flip, published
from ds_al.data.images import Images
from ds_al.data.load import load_data
from ds_al.data.loader import OrderedBatches, ShuffledLoader, ordered_batches
from ds_al.data.splits import Part, Splits
from ds_al.data.tokens import Tokens
from ds_al.data.vision import VISION_DATASETS, load_vision
from ds_al.data.words import Words

__all__ = [
    "AUGMENTATIONS",
    "VISION_DATASETS",
    "Images",
    "OrderedBatches",
    "Part",
    "ShuffledLoader",
    "Splits",
    "Tokens",
    "Words",
    "colour_jitter",
    "crop_and_flip",
    "load_data",
    "load_vision",
    "ordered_batches",
    "published",
]
