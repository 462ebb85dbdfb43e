"""Associated learning on DeepSpeed's pipeline: local objectives, stages that never wait for later ones."""

from ds_al.engine import ALPipelineEngine
from ds_al.errors import (
    ALCheckpointError,
    ALConfigError,
    ALDataError,
    ALError,
    ALLayerError,
    ALTransportError,
)
from ds_al.initialize import initialize
from ds_al.layer import ALLayer, predict
from ds_al.module import ALPipelineModule
from ds_al.spec import ALLayerSpec
from ds_al.trace import StageStats

__version__ = "0.1.0"

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
    "ALTransportError",
    "StageStats",
    "initialize",
    "predict",
]
