"""``load_data``: loads the data set described by a config, as training, validation and test parts."""

from __future__ import annotations

from ds_al.data.config import OF_STORED, DataConfig, refuse, refuse_other_kind
from ds_al.data.splits import Splits
from ds_al.data.vision import VISION_DATASETS, load_vision


def load_data(config: DataConfig, *, seed: int) -> Splits:
    """Loads the data set described by an ``"experiment.data"`` block.

    Args:
        config: that block.
        seed: seed of the choice of validation samples from the training samples, if the data set has no validation
            part.

    Raises:
        ALConfigError: a key does not apply to this data set.
        ALDataError: the data set is not found, or does not match the block.
    """
    if config.path is None and config.name in VISION_DATASETS:
        refuse(config, OF_STORED, reason="comes with the package")
        refuse_other_kind(config, "image")
        return load_vision(config.name, validation_fraction=config.validation_fraction, seed=seed)
    from ds_al.data.stored import load_stored  # lazy: `datasets` takes a second to import

    return load_stored(config, seed=seed)
