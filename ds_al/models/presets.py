"""Size presets of the models: ``paper``, the published experiments, ``small``, which trains on two cores, and ``deep``,
eight blocks of that size, so that they can be grouped into 1, 2, 4 and 8 AL layers.

A preset is a set of options of both forms of a model; options given explicitly override it. It contains neither the
properties of the data (shape of images, number of classes, vocabulary) nor K: every preset has one AL layer per block
(one per stage for a ResNet) unless ``num_layers`` is given.

Source of ``paper``: Wu, Lin, Chen & Chen, ICLR 2022, images of 32x32, and texts with a vocabulary of 30,000.
"""

from __future__ import annotations

from typing import Any

from ds_al.errors import ALConfigError
from ds_al.models import mlp, resnet, vgg

_PUBLISHED_VISION: dict[str, Any] = {
    "bridge": "published",
    "bridge_hidden": 1000,
    "code": "sigmoid",
    "code_width": 700,
    "objective": "mse",
}
_PUBLISHED_TEXT: dict[str, Any] = {
    "num_blocks": 4,
    "bridge": "linear",
    "code": "tanh",
    "code_width": 128,
    "scores": "tanh",
    "objective": "mse",
}

_SMALL_TRANSFORMER: dict[str, Any] = {
    "num_blocks": 4,
    "width": 64,
    "heads": 4,
    "feed_forward": 128,
    "dropout": 0.1,
    "attention_dropout": 0.0,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "vgg": {
        "paper": {
            **_PUBLISHED_VISION,
            "blocks": vgg.PUBLISHED,
            "early_pool": False,
            "head": "published",
            "head_hidden": 2500,
        },
        "small": {"blocks": vgg.SMALL},
        "deep": {"blocks": vgg.DEEP},
    },
    "resnet": {
        "paper": {**_PUBLISHED_VISION, "widths": resnet.PUBLISHED, "blocks_per_stage": 2, "norm": "batch"},
        "small": {"widths": resnet.SMALL, "blocks_per_stage": 2},
        "deep": {"widths": resnet.SMALL, "blocks_per_stage": 2, "num_layers": 8},
    },
    "lstm": {
        "paper": {**_PUBLISHED_TEXT, "embedding_width": 300, "width": 256, "dropout": 0.0},
        "small": {"num_blocks": 4, "embedding_width": 64, "width": 64, "dropout": 0.1},
    },
    "transformer": {
        "paper": {**_PUBLISHED_TEXT, "width": 300, "heads": 6, "feed_forward": 256, "dropout": 0.3},
        "small": _SMALL_TRANSFORMER,
        "deep": {**_SMALL_TRANSFORMER, "num_blocks": 8},
    },
    "mlp": {"small": {"widths": mlp.SMALL}},
}
"""Options by model name and preset name."""


def preset_options(name: str, preset: str) -> dict[str, Any]:
    """Returns a copy of the options of a preset.

    Raises:
        ALConfigError: the model has no such preset.
    """
    presets = PRESETS.get(name, {})
    if preset not in presets:
        raise ALConfigError(f"got preset={preset!r} for {name!r}: expected one of {sorted(presets)}")
    return dict(presets[preset])
