"""A data set as a config describes it, cut in three and ready to make micro-batches of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_al.data.splits import Kind, Splits
from ds_al.data.vision import VISION_DATASETS, load_vision
from ds_al.errors import ALConfigError

if TYPE_CHECKING:
    from ds_al.experiment.config import DataConfig

OF_IMAGES = ("image_column", "image_size", "augment")
"""Config keys that mean nothing for text."""
OF_TEXT = ("text_column", "tokenizer", "vocab_size", "max_length", "padding")
"""Config keys that mean nothing for images."""
OF_STORED = ("image_column", "text_column", "label_column", "image_size", "cache")
"""Config keys that mean nothing for a set that comes with the package."""


def load_data(config: DataConfig, *, seed: int) -> Splits:
    """Loads the data set that an ``"experiment.data"`` block describes.

    Args:
        config: that block.
        seed: decides which training samples become the validation part, where the set has none.

    Raises:
        ALConfigError: a key is set that does not concern this set.
        ALDataError: the set cannot be found, or is not what the block says.
    """
    if config.path is None and config.name in VISION_DATASETS:
        refuse(config, OF_STORED, reason="comes with the package")
        refuse_other_kind(config, "image")
        return load_vision(config.name, validation_fraction=config.validation_fraction, seed=seed)
    from ds_al.data.stored import load_stored  # `datasets` takes a second to import

    return load_stored(config, seed=seed)


def refuse_other_kind(config: DataConfig, kind: Kind) -> None:
    """Refuses keys that mean nothing for this kind of data."""
    if kind == "image":
        refuse(config, OF_TEXT, reason="holds images")
    else:
        refuse(config, OF_IMAGES, reason="holds text")


def refuse(config: DataConfig, keys: tuple[str, ...], *, reason: str) -> None:
    """Refuses these keys where they are set to anything but their defaults.

    Raises:
        ALConfigError: with the reason, which goes on after the set's name.
    """
    for key in keys:
        value = getattr(config, key)
        if value != type(config).model_fields[key].default:
            raise ALConfigError(
                f"got experiment.data.{key}={value!r}, but data set {config.name!r} {reason}: leave {key!r} out"
            )
