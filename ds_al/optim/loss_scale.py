"""Loss scale per AL layer, with skipped steps on overflow.

float16 ends at 65,504 and rounds small numbers to 0, so the losses of a layer are multiplied by its scale before
backward, and its gradients divided by it before the step. DeepSpeed's ``DynamicLossScaler`` updates the scale. A layer
checks its own gradients alone, without other layers or stages. Data parallel replicas of a stage reach the same
decision, since they check the same averaged gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from torch import Tensor

from ds_al.config.precision import FP16Config, Precision
from ds_al.errors import ALLayerError
from ds_al.optim.skip import LayerSkip


class LayerScale(LayerSkip):
    """Loss scale of one layer.

    Args:
        layer: index of the layer, for errors.
        precision: precision of the layer, not float32. With bfloat16 the scale is always 1, and only overflow is
            checked.
    """

    def __init__(self, layer: int, precision: Precision) -> None:
        super().__init__(layer)
        block = precision.block
        dynamic, static, arguments = False, 1.0, None
        if isinstance(block, FP16Config):
            dynamic, static = block.loss_scale == 0, block.loss_scale
            arguments = {
                "init_scale": 2.0**block.initial_scale_power,
                "scale_window": block.loss_scale_window,
                "min_scale": block.min_loss_scale,
                "delayed_shift": block.hysteresis,
                "consecutive_hysteresis": block.consecutive_hysteresis,
                "raise_error_at_min_scale": False,  # DeepSpeed's error names no layer
            }
        self._scaler = CreateLossScaler(precision.dtype, static, dynamic, arguments)
        self._minimum = float(arguments["min_scale"]) if arguments and dynamic else 0.0

    @property
    def value(self) -> float:
        """Factor of the losses until the next step."""
        return float(self._scaler.cur_scale)

    def admits(self, gradients: Sequence[Tensor], *, agree: Callable[[bool], bool] | None = None) -> bool:
        """Divides a layer's gradients in place by the scale, and updates the scale.

        Args:
            agree: returns whether the gradients of all stages of the layer are finite, where it spans several.

        Returns:
            Whether all gradients are finite, so that the layer can step.

        Raises:
            ALLayerError: gradients overflow, and the scale was already at its minimum.
        """
        before = self.value
        if before != 1.0 and gradients:
            torch._foreach_mul_(list(gradients), 1.0 / before)
        finite = not gradients or bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all())
        if agree is not None:
            finite = agree(finite)
        at_end = before <= self._minimum and self._scaler.cur_hysteresis == 1
        self._scaler.update_scale(not finite)
        if finite:
            return True
        self.skipped += 1
        if at_end:
            raise ALLayerError(
                f"AL layer {self.layer}: its gradients overflow float16 at the smallest loss scale, {before:g}: lower "
                'the learning rate, enable "bf16" instead of "fp16", or train in fp32'
            )
        return False

    def state(self) -> dict[str, Any]:
        """Returns the state for :meth:`restore`, as numbers."""
        moving = {name: value for name, value in vars(self._scaler).items() if name in _MOVING}
        return moving | super().state()

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a state returned by :meth:`state`."""
        vars(self._scaler).update({name: value for name, value in state.items() if name in _MOVING})
        super().restore(state)


_MOVING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
