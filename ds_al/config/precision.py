"""Layers that compute in bfloat16 or float16, with float32 masters: DeepSpeed's blocks ``"bf16"`` and ``"fp16"``.

    master (fp32) -- rounded --> weight (bf16) --> f, b, g, h --> losses in fp32
      ^                                                             |
      '-- optimizer <-- gradient, summed up in fp32 <-- gradient (bf16)

Every trained weight has a master of its own shape, which the optimizer steps instead of it. DeepSpeed's
``BF16_Optimizer`` is not used: it joins the weights of a group to one vector over data parallel ranks, where Muon finds
no matrices and a checkpoint no layer, and it agrees on a norm with all stages. Here nothing leaves the layer.

Masters begin as the weights were made, before they are rounded, so a network starts from the weights that it has in
float32. Buffers are cast, too, as DeepSpeed does; labels, losses, norms and reports stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from ds_al.config.base import StrictModel, validate
from ds_al.errors import ALConfigError


class BF16Config(StrictModel):
    """DeepSpeed's ``"bf16"`` block."""

    enabled: bool = Field(default=False, description="f, b, g, h compute in bfloat16, with float32 masters.")
    check_grad_overflow: bool = Field(
        default=True,
        description="A layer whose gradients contain NaN or infinity skips its step. The check waits for the device "
        "at each step, which nothing else does.",
    )
    immediate_grad_update: bool = Field(
        default=False, description="Accepted, without effect: float32 sums always add a gradient at once."
    )


class FP16Config(StrictModel):
    """DeepSpeed's ``"fp16"`` block."""

    enabled: bool = Field(
        default=False, description="f, b, g, h compute in float16, with float32 masters and a loss scale per AL layer."
    )
    loss_scale: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Loss scale of every layer; 0 selects a dynamic scale per layer.",
    )
    initial_scale_power: int = Field(
        default=16, ge=0, le=60, description="The dynamic scale starts at 2 to this power."
    )
    loss_scale_window: int = Field(
        default=1000, ge=1, description="Steps without overflow after which the scale doubles."
    )
    hysteresis: int = Field(default=2, ge=1, description="Number of overflows after which the scale is halved.")
    consecutive_hysteresis: bool = Field(
        default=False, description="Whether a step without overflow resets the count of overflows."
    )
    min_loss_scale: int = Field(
        default=1, ge=1, description="Lower bound of the scale; an overflow at this scale is an error."
    )
    auto_cast: bool = Field(
        default=False, description="Accepted, without effect: the first stage always casts floating-point inputs."
    )


@dataclass(frozen=True)
class Precision:
    """What layers compute in."""

    dtype: torch.dtype = torch.float32
    block: BF16Config | FP16Config | None = None
    """The DeepSpeed block that says so; ``None`` for float32."""

    @property
    def is_low(self) -> bool:
        """Whether there are masters."""
        return self.block is not None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Precision:
        """What a DeepSpeed config asks for.

        Raises:
            ALConfigError: both blocks are on, or a key of one is unknown, not honoured or out of range.
        """
        name = "bfloat16" if "bfloat16" in config and "bf16" not in config else "bf16"  # DeepSpeed's older name
        bf16 = _block(BF16Config, config.get(name), where=name)
        fp16 = _block(FP16Config, config.get("fp16"), where="fp16")
        if bf16.enabled and fp16.enabled:
            raise ALConfigError(f'"{name}" and "fp16" are both enabled: set "enabled": false in one of them')
        if bf16.enabled:
            return cls(torch.bfloat16, bf16)
        return cls(torch.float16, fp16) if fp16.enabled else cls()

    def check_device(self) -> None:
        """Asks DeepSpeed's accelerator.

        Raises:
            ALConfigError: it does not compute in this precision.
        """
        from deepspeed.accelerator import get_accelerator  # late: who only reads a config needs no DeepSpeed

        accelerator = get_accelerator()
        supported = {torch.bfloat16: accelerator.is_bf16_supported, torch.float16: accelerator.is_fp16_supported}
        if self.is_low and not supported[self.dtype]():
            name = "bf16" if self.dtype is torch.bfloat16 else "fp16"
            other = "bf16" if name == "fp16" and accelerator.is_bf16_supported() else None
            raise ALConfigError(
                f'"{name}": DeepSpeed\'s accelerator {accelerator.device_name()!r} does not compute in it: '
                + (f'enable "{other}", or train in fp32' if other else "train in fp32: remove the block")
            )


FULL = Precision()
"""float32."""


def _block(model: type[StrictModel], block: Any, *, where: str) -> Any:
    """The validated block, without the keys that are off."""
    if isinstance(block, Mapping):
        for key in sorted(set(block) - set(model.model_fields)):
            if key in _REFUSED and not block[key]:
                continue
            if key in _REFUSED:
                raise ALConfigError(f'"{where}.{key}": got {block[key]!r}. {_REFUSED[key]}: remove it')
        block = {key: value for key, value in block.items() if key not in _REFUSED}
    return validate(model, {} if block is None else block, where=where)


_FP32_STATE = "Masters and optimizer state are float32, or small steps would be rounded away"
_REFUSED = {
    "bf16_master_weights_and_grads": _FP32_STATE,
    "bf16_optimizer_states": _FP32_STATE,
    "fp16_master_weights_and_grads": _FP32_STATE,
}
