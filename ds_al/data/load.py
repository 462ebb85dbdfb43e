"""Loads the data set that a config describes, cut into three parts that make micro-batches."""

from __future__ import annotations

from ds_al.data.config import OF_STORED, DataConfig, refuse, refuse_other_kind
from ds_al.data.splits import Splits
from ds_al.data.vision import VISION_DATASETS, load_vision


def load_data(config: DataConfig, *, seed: int) -> Splits:
    """Loads the data set that an ``"experiment.data"`` block describes.

    Args:
        config: that block.
        seed: selects the training samples that become the validation part, where the set has none.

    Raises:
        ALConfigError: a key is set that does not apply to this set.
        ALDataError: the set cannot be found, or does not match the block.
    """
    if config.path is None and config.name in VISION_DATASETS:
        refuse(config, OF_STORED, reason="comes with the package")
        refuse_other_kind(config, "image")
        return load_vision(config.name, validation_fraction=config.validation_fraction, seed=seed)
    from ds_al.data.stored import load_stored  # `datasets` takes a second to import

    return load_stored(config, seed=seed)
