"""``bp_async``: the accuracy of an asynchronous pipeline with two versions of the weights, PipeDream-2BW.

::

    W(t + 1) = W(t) - step of the gradient at W(t - 1)      W(-1) = W(0)

The update is the same for any number of stages, so one process emulates it exactly: it computes the gradients of a
batch at the weights before the latest step, and applies them to the latest weights. Its seconds are not those of the
pipeline, whose time is known by a formula (:mod:`ds_al.planner`). Source: Narayanan et al., "Memory-efficient
pipeline-parallel DNN training", ICML 2021, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from deepspeed.runtime.pipe.schedule import OptimizerStep
from torch import Tensor

from ds_al.baseline.engine import BackpropPipelineEngine
from ds_al.trace import joint_call

METHOD = "bp_async"
_STATE = "weights_before_the_latest_step"


class DelayedEngine(BackpropPipelineEngine):
    """Trains a ``PipelineModule`` of one stage with gradients that are one step late.

    Between batches the module holds the latest weights: these are evaluated and saved.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._latest: list[Tensor] = []
        self._previous: list[Tensor] = []  # empty before the first step: W(-1) = W(0)

    def _start_batch(self) -> None:
        self._latest = self._weights()
        self._set_weights(self._previous)

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        self._set_weights(self._latest)
        self._previous = self._latest
        super()._exec_optimizer_step(lr_kwargs)

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.module.parameters()]

    @torch.no_grad()
    def _set_weights(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.module.parameters(), values, strict=False):
            parameter.copy_(value)

    @joint_call
    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: Any = None, **options: Any) -> bool:
        """Calls DeepSpeed's ``save_checkpoint``; the weights of the next gradients are saved, too."""
        state = {**(client_state or {}), _STATE: self._previous}
        return super().save_checkpoint(save_dir, tag=tag, client_state=state, **options)

    @joint_call
    def load_checkpoint(self, *args: Any, **options: Any) -> Any:
        """Calls DeepSpeed's ``load_checkpoint``; without saved weights of that kind the delay begins anew."""
        path, state = super().load_checkpoint(*args, **options)
        self._previous = [value.to(self.device) for value in (state or {}).pop(_STATE, [])]
        return path, state

    _INSTRUCTION_MAP: ClassVar[dict[Any, Callable[..., None]]] = {
        **BackpropPipelineEngine._INSTRUCTION_MAP,
        OptimizerStep: _exec_optimizer_step,
    }
