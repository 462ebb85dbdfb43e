"""Associated learning on DeepSpeed's pipeline: local objectives, stages that never wait for later ones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_al.system import VERSION

if TYPE_CHECKING:
    from ds_al.checkpoint.weights import load_weights
    from ds_al.convert.export import export
    from ds_al.convert.hugging_face import from_pretrained
    from ds_al.convert.layers import from_layers
    from ds_al.engine import ALPipelineEngine
    from ds_al.entry import initialize
    from ds_al.errors import (
        ALCheckpointError,
        ALConfigError,
        ALDataError,
        ALError,
        ALLayerError,
        ALRecoveryError,
        ALReportError,
        ALTransportError,
        ALVersionError,
    )
    from ds_al.layer import ALLayer, predict
    from ds_al.module import ALPipelineModule
    from ds_al.spec import ALLayerSpec
    from ds_al.trace import StageStats
    from ds_al.trainer.arguments import ALTrainingArguments
    from ds_al.trainer.trainer import ALTrainer

__version__ = VERSION

__all__ = [
    "ALCheckpointError",
    "ALConfigError",
    "ALDataError",
    "ALError",
    "ALLayer",
    "ALLayerError",
    "ALLayerSpec",
    "ALPipelineEngine",
    "ALPipelineModule",
    "ALRecoveryError",
    "ALReportError",
    "ALTrainer",
    "ALTrainingArguments",
    "ALTransportError",
    "ALVersionError",
    "StageStats",
    "export",
    "from_layers",
    "from_pretrained",
    "initialize",
    "load_weights",
    "predict",
]

_HOMES = {
    "ALPipelineEngine": "engine",
    "ALPipelineModule": "module",
    "ALLayer": "layer",
    "ALLayerSpec": "spec",
    "ALTrainer": "trainer.trainer",
    "ALTrainingArguments": "trainer.arguments",
    "StageStats": "trace",
    "export": "convert.export",
    "from_layers": "convert.layers",
    "from_pretrained": "convert.hugging_face",
    "initialize": "entry",
    "load_weights": "checkpoint.weights",
    "predict": "layer",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``import ds_al`` is quick and cannot fail."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        importlib.import_module(f"{__name__}.system.versions").check_deepspeed()
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
