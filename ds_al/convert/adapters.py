"""Low-rank adapters (LoRA) of ``peft`` inside a model: trained as they are, merged into the weights for an export, and
also written as an adapter of their own.

A model has adapters after ``peft.get_peft_model(model, LoraConfig(...))`` or ``model.add_adapter(LoraConfig(...))``.
``peft`` is not needed by ds_al: a process that has not imported it has no adapters.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ds_al.errors import ALCheckpointError, ALConfigError

_REFUSED = ("modules_to_save", "use_dora", "trainable_token_indices", "target_parameters", "lora_bias")
"""Options of ``LoraConfig`` that are more than a product of two matrices beside a linear layer or an embedding."""


def plain(model: Any) -> Any:
    """Returns the model inside a ``PeftModel``, whose layers hold the adapters; any other model itself.

    Raises:
        ALConfigError: the adapter is not LoRA, or trains copies of whole modules.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    _check_configs(model.peft_config)
    return model.get_base_model()


def check(model: Any, *, scores: str) -> None:
    """Checks the adapters of a model.

    Raises:
        ALConfigError: an adapter is not plain LoRA, there are several, they are merged or disabled, or one is at the
            linear layer ``scores``, which takes part in the objective.
    """
    _check_configs(getattr(model, "peft_config", None) or {})
    for path, layer in ((path, layer) for path, layer in model.named_modules() if is_adapter(layer)):
        if path == scores:
            raise ALConfigError(
                f"got a model with an adapter at {path}: expected adapters in its blocks; leave it out of "
                "target_modules, and train it by requires_grad"
            )
        if layer.merged or layer.disable_adapters:
            raise ALConfigError(
                f"got a model whose adapter at {path} is {'merged' if layer.merged else 'disabled'}: expected one that "
                "trains; use merge_and_unload() to train the weights themselves"
            )


def _check_configs(configs: Mapping[str, Any]) -> None:
    if len(configs) > 1:
        raise ALConfigError(f"got a model with the adapters {', '.join(configs)}: expected one; delete the others")
    for config in configs.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        options = [name for name in _REFUSED if getattr(config, name, None)]
        if kind != "LORA" or options:
            raise ALConfigError(
                f"got a model with an adapter of the kind {kind}{''.join(f', {name}' for name in options)}: expected "
                "LoraConfig without them. Heads are trained where requires_grad is true; leave task_type out, which "
                "adds modules_to_save"
            )


def described(model: Any) -> dict[str, Any] | None:
    """Returns the description of a model's adapter as JSON, or ``None`` without an adapter.

    It contains the adapter's name and config, and ``alone``: whether all of the model's own weights are frozen.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        options = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        alone = not any(weight.requires_grad for path, weight in model.named_parameters() if ".lora_" not in path)
        return {"name": name, "config": options, "alone": alone}
    return None


def added(model: nn.Module, adapter: Mapping[str, Any]) -> None:
    """Adds a new adapter of a description to a model, in place.

    Raises:
        ALCheckpointError: ``peft`` is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ALCheckpointError("its model has an adapter, which needs peft: pip install peft") from None
    peft.inject_adapter_in_model(peft.PeftConfig.from_peft_type(**adapter["config"]), model, adapter["name"])


def is_adapter(module: nn.Module) -> bool:
    """Returns whether a module is a layer of ``peft`` around one of the model's own."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def base(module: nn.Module) -> nn.Module:
    """Returns the model's own layer inside an adapter, any other module itself."""
    return module.get_base_layer() if is_adapter(module) else module  # type: ignore[operator]


def merge(module: nn.Module) -> None:
    """Adds the product of each adapter to the weights of its layer, in place."""
    for layer in (layer for layer in module.modules() if is_adapter(layer)):
        layer.merge(safe_merge=True)  # type: ignore[operator]


def own(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of merged layers by their names in a model without adapters."""
    return {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}


def write(folder: Path, weights: Mapping[str, Tensor], adapter: Mapping[str, Any], *, head: str) -> None:
    """Writes an adapter for ``peft.PeftModel.from_pretrained(model, folder)``, with the classifier.

    Args:
        weights: weights by their names in the model, those of the adapter and of the classifier among them.
        adapter: its description.
        head: path of the classifier.
    """
    name = re.compile(rf"\.{re.escape(adapter['name'])}(?=\.|$)")
    own = {key: value for key, value in weights.items() if ".lora_" in key or key.startswith(f"{head}.")}
    tensors = {f"base_model.model.{name.sub('', key, count=1)}": value.contiguous() for key, value in own.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = {**adapter["config"], "modules_to_save": [head], "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors")
