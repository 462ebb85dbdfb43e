"""Recipes: named settings that work well together, used where a config leaves them out.

``"experiment": {"recipe": "ours", ...}`` sets the model's ``al_options`` and the ``"optimizer"``; values of the config
have precedence. ``ours`` was chosen by validation accuracy for each kind of network, ``many_classes`` for 100 classes;
docs/accuracy.md explains their parts and reports the runs that judge them. A Transformer of more than four blocks has a
lower rate: at that of four, layers of several blocks stay at chance. A ``bp_*`` method uses the optimizer and the
objective's ``label_smoothing``, so that the twin has the same settings.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ds_al.config.base import BLOCK
from ds_al.config.methods import BACKPROP_METHODS
from ds_al.errors import ALConfigError
from ds_al.models.presets import PRESETS

# Muon steps convolutions and inner linear layers; classifiers, codes, norms and embeddings by AdamW.
_MUON: dict[str, Any] = {"type": "MuonAdamW", "params": {"lr": 0.05, "adamw_lr": 0.01}}
_DECODED: dict[str, Any] = {"name": "decoded", "own_decoder": "frozen", "label_smoothing": 0.1}
_VISION: dict[str, Any] = {
    "bridge": "mimic", "bridge_pool_first": True, "bridge_pool": "average", "bridge_residual": False,
    "code": "linear", "objective": _DECODED,
}  # fmt: skip
_WIDE: dict[str, Any] = {**_VISION, "bridge_width": 1.0, "bridge_depth": 2, "bridge_muon": False}
_MANY: dict[str, Any] = {**_WIDE, "bridge_width": 0.75, "objective": {"name": "greedy", "label_smoothing": 0.1}}

_PUBLISHED_TEXT: dict[str, Any] = {"bridge": "linear", "code": "tanh", "scores": "tanh", "objective": {"name": "mse"}}
_BLOCKS: dict[str, Any] = {"bridge": "block", "bridge_stride": 4, "objective": {"name": "contrast", "temperature": 0.1}}


def _adamw(lr: float) -> dict[str, Any]:
    return {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.01, "torch_adam": True}}


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {
        "vgg": {"optimizer": _MUON, "al_options": _WIDE},
        "resnet": {"optimizer": _MUON, "al_options": {**_VISION, "bridge_width": 0.5}},
        "mlp": {"optimizer": _MUON, "al_options": {"objective": _DECODED}},
        "transformer": {"optimizer": _adamw(0.03), "deep_optimizer": _adamw(0.01), "al_options": _PUBLISHED_TEXT},
        "lstm": {"optimizer": _adamw(0.01), "al_options": _BLOCKS},
    },
    "many_classes": {"vgg": {"optimizer": _MUON, "al_options": _MANY}},
}
"""``optimizer`` and ``al_options`` by name of the recipe and of the model.

``deep_optimizer``, if there is one, is for more than :data:`FEW_BLOCKS` blocks.
"""
FEW_BLOCKS = 4
"""The largest number of blocks that the rates of ``optimizer`` were chosen for."""


def with_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the config with the settings of its recipe, if it names one.

    Options of an objective are added only where the config names the recipe's objective, or none.

    Raises:
        ALConfigError: the recipe is unknown, or has no settings for this model.
    """
    full: dict[str, Any] = copy.deepcopy(dict(config))
    experiment = full.get("experiment")
    name = experiment.get("recipe") if isinstance(experiment, dict) else None
    if not isinstance(experiment, dict) or name is None:
        return full
    if name not in RECIPES:
        raise ALConfigError(f'"experiment.recipe": got {name!r}: expected one of {", ".join(RECIPES)}')
    model = experiment.setdefault("model", {})
    if model.get("name") not in RECIPES[name]:
        raise ALConfigError(
            f'"experiment.recipe": {name!r} is for {", ".join(RECIPES[name])}: got model {model.get("name")!r}'
        )
    recipe = copy.deepcopy(RECIPES[name][model["name"]])
    if full.get("optimizer") is None:
        deep = recipe.get("deep_optimizer", recipe["optimizer"])
        full["optimizer"] = deep if _blocks(model) > FEW_BLOCKS else recipe["optimizer"]
    own = model.get("al_options", {})
    smoothing = recipe["al_options"]["objective"].get("label_smoothing")
    backprop = str(full.get(BLOCK, {}).get("method", "")) in BACKPROP_METHODS
    if smoothing is not None and backprop and experiment.get("label_smoothing") is None:
        experiment["label_smoothing"] = smoothing
    model["al_options"] = {**recipe["al_options"], **own}
    model["al_options"]["objective"] = _objective(own.get("objective", {}), recipe["al_options"]["objective"])
    return full


def _blocks(model: Mapping[str, Any]) -> int:
    """Returns the number of blocks that a config gives a model; 0 if it gives none, or no number."""
    options = model.get("options")
    options = options if isinstance(options, Mapping) else {}
    preset = PRESETS.get(str(model.get("name")), {}).get(str(options.get("preset")), {})
    blocks = {**preset, **options}.get("num_blocks")
    return blocks if isinstance(blocks, int) else 0


def _objective(own: str | Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    own = {"name": own} if isinstance(own, str) else dict(own) if isinstance(own, Mapping) else {"name": own}
    return {**recipe, **own} if own.get("name", recipe["name"]) == recipe["name"] else own
