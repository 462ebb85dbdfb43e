"""Loading of a model of ``transformers`` by name or folder: without code from elsewhere, in bounded time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime import utils as ds_utils
from torch import nn

from ds_al.convert import adapters
from ds_al.convert.architectures import CLASSIFY, GENERATE, LOOK
from ds_al.errors import ALConfigError
from ds_al.system.generators import Generators

AUTO_CLASSES = {
    CLASSIFY: "AutoModelForSequenceClassification",
    GENERATE: "AutoModelForCausalLM",
    LOOK: "AutoModelForImageClassification",
}
"""The auto class that loads a model for a task."""

_REFUSED = {
    "trust_remote_code": "code of a folder or hub is not run; its classes are those of transformers",
    "device_map": "each rank keeps the weights of its own layers on its own device",
    "quantization_config": "quantized weights cannot be trained",
    "load_in_8bit": "quantized weights cannot be trained",
    "load_in_4bit": "quantized weights cannot be trained",
    "output_loading_info": "missing weights raise an error",
}
"""Options of ``from_pretrained`` of ``transformers`` that are not passed on, and why."""


def load(
    model: str | Path | nn.Module, *, task: str, base_seed: int = 1234, model_options: Mapping[str, Any] | None = None
) -> Any:
    """Loads the model or returns the given one; a new head has the same initial weights on every rank.

    Raises:
        ALConfigError: the task or an option is not known here, the model is not found or cannot be read, or weights of
            its trunk are missing.
    """
    if task not in AUTO_CLASSES:
        raise ALConfigError(f"got task={task!r}: expected one of {', '.join(AUTO_CLASSES)}")
    if isinstance(model, nn.Module):
        if model_options:
            raise ALConfigError("got model_options with a model: they are for a name or folder; set its config instead")
        return adapters.plain(model)
    if not isinstance(model, (str, Path)):
        raise ALConfigError(
            f"got a model of {type(model).__name__}: expected a model of transformers, a name or a folder"
        )
    options = dict(model_options or {})
    for name in options.keys() & _REFUSED.keys():
        if options.pop(name) not in (None, False):
            raise ALConfigError(f"got model_options with {name}: leave it out; {_REFUSED[name]}")
    with Generators().aside():
        ds_utils.set_random_seed(base_seed)
        loaded, found = _read(model, task, {"dtype": torch.float32, **options})
    trunk = f"{loaded.base_model_prefix}."
    missing = sorted(name for name in found["missing_keys"] if name.startswith(trunk) and ".pooler." not in name)
    if missing:
        raise ALConfigError(
            f"got the model {str(model)!r} without {len(missing)} weights, {missing[0]} among them: expected those of "
            f"a {type(loaded).__name__}; only the head may be new"
        )
    return loaded


def _read(model: str | Path, task: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import transformers  # lazy: its model classes take seconds to import

    auto = getattr(transformers, AUTO_CLASSES[task])
    fixed = {"trust_remote_code": False, "output_loading_info": True}
    folder = Path(model).expanduser()
    if folder.is_dir():
        try:
            return auto.from_pretrained(folder, **{**options, **fixed, "local_files_only": True})
        except Exception as error:  # of several libraries
            raise ALConfigError(
                f"got the folder {str(model)!r}: expected a model for {task!r}, as save_pretrained writes it "
                f"({_first_line(error)})"
            ) from error
    from ds_al.data.hub import reachable, without_retries

    online = reachable()
    try:
        with without_retries(online):
            return auto.from_pretrained(str(model), **{"local_files_only": not online, **options, **fixed})
    except Exception as error:
        raise ALConfigError(
            f"got the model {str(model)!r}: it is neither a folder, nor cached, nor could it be downloaded "
            f"({_first_line(error) if online else 'no connection'})"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
