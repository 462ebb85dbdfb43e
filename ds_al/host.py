"""Private names of DeepSpeed that ds_al uses outside of its engines and modules, each with the release it was read in.

What the engines and the module override is in their own files: :mod:`ds_al.training`, :mod:`ds_al.module` and
:mod:`ds_al.baseline.engine`. ``make test-matrix`` runs tests with both ends of the range of releases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from deepspeed import ops
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ds_al.errors import ALConfigError
from ds_al.system.extensions import SHARED_MEMORY

OPTIMIZER_NAMES: frozenset[str] = frozenset(DEEPSPEED_OPTIMIZERS)
"""Names, in lower case, of the optimizers that DeepSpeed has itself (runtime/config.py, 0.19.8)."""
SCHEDULES: dict[str, type] = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
"""DeepSpeed's LR schedules by name (runtime/lr_schedules.py, 0.19.0 and 0.19.8)."""


@contextmanager
def without_shared_memory() -> Iterator[None]:
    """Lets DeepSpeed join ranks inside without buffers in shared memory, for which it would wait for all of them."""
    name, known = SHARED_MEMORY, ops.__compatible_ops__
    before, known[name] = known.get(name), False
    try:
        yield
    finally:
        known[name] = before


_SAVES = (
    "engine.module.state_dict() has the weights of this stage; save_checkpoint() and python -m ds_al consolidate, all"
)
INSTEAD = {
    "set_train_micro_batch_size": 'set "train_micro_batch_size_per_gpu" in the config',
    "module_state_dict": _SAVES,
    "save_16bit_model": _SAVES,
    "save_fp16_model": _SAVES,
    "load_module_state_dict": "use engine.module.load_state_dict(), or ds_al.load_weights() for a file of all weights",
    "offload_states": "a stage holds its own states alone",
    "reload_states": "a stage holds its own states alone",
}
"""What to use instead of methods of DeepSpeed's engine that would fail, or change nothing, in one of ds_al
(runtime/engine.py, 0.19.0 and 0.19.8)."""


def refused(call: str, instead: str) -> Callable[..., NoReturn]:
    """Returns a method that raises :class:`~ds_al.errors.ALConfigError`, see :data:`INSTEAD`."""

    def method(*_: Any, **__: Any) -> NoReturn:
        raise ALConfigError(f"{call}() is not available: {instead}")

    method.__name__ = call
    return method


# ---- modules (runtime/pipe/module.py, 0.19.0 and 0.19.8) ---------------------------------------------


def grid(module: PipelineModule) -> Any:
    """DeepSpeed's ``PipelineParallelGrid`` of a module."""
    return module._grid


def layer_range(module: PipelineModule) -> range:
    """Indices of the layers that this rank holds."""
    return range(module._local_start, module._local_stop)


def num_layers(module: PipelineModule) -> int:
    """Number of layers of the whole network."""
    return module._num_layers


# ---- configs (runtime/config.py, 0.19.0 and 0.19.8) --------------------------------------------------


def set_precision(config: Any, *, dtype: torch.dtype, zero_stage: int) -> None:
    """Lets a ``DeepSpeedConfig`` report the precision and the ZeRO stage that ds_al implements by layer.

    DeepSpeed's constructor must not know of them, or it would build optimizers of its own. Afterwards
    ``engine.bfloat16_enabled()``, ``fp16_enabled()`` and ``zero_optimization_stage()`` answer from this config.
    """
    config.bfloat16_config.enabled = dtype is torch.bfloat16
    config.float16_config.enabled = dtype is torch.float16
    config.zero_optimization_stage = zero_stage
    config.zero_enabled = zero_stage > 0


@contextmanager
def optimizer_block(config: Any, *, type: str, params: Mapping[str, Any]) -> Iterator[None]:
    """Lets a ``DeepSpeedConfig`` name another optimizer inside the context.

    DeepSpeed compares the names of its own optimizers in lower case, and takes those of torch as they are.
    """
    before = config.optimizer_name, config.optimizer_params
    config.optimizer_name = type.lower() if type.lower() in OPTIMIZER_NAMES else type
    config.optimizer_params = dict(params)
    try:
        yield
    finally:
        config.optimizer_name, config.optimizer_params = before


def configure_python_gc(engine: Any) -> None:
    """What ``deepspeed.initialize`` does last (__init__.py, 0.19.8); releases before 0.19.5 lack it."""
    if hasattr(engine, "_configure_python_gc"):
        engine._configure_python_gc()
