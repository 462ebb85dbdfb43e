"""Mixed precision config: DeepSpeed's blocks ``"bf16"`` and ``"fp16"``; :mod:`ds_al.optim.masters` implements them."""

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
        description="Whether a layer whose gradients contain NaN or infinity skips its step. This synchronizes with "
        "the device at each step, which nothing else does.",
    )
    immediate_grad_update: bool = Field(
        default=False,
        description="Accepted without effect: each gradient is always added to its float32 sum immediately.",
    )


class FP16Config(StrictModel):
    """DeepSpeed's ``"fp16"`` block."""

    enabled: bool = Field(
        default=False, description="f, b, g, h compute in float16, with float32 masters and a loss scale per AL layer."
    )
    loss_scale: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Loss scale of every layer; 0 is a dynamic scale per layer."
    )
    initial_scale_power: int = Field(
        default=16, ge=0, le=60, description="A dynamic loss scale starts at 2 to this power."
    )
    loss_scale_window: int = Field(
        default=1000, ge=1, description="Number of steps without overflow after which the scale doubles."
    )
    hysteresis: int = Field(default=2, ge=1, description="Number of overflows after which the scale is halved.")
    consecutive_hysteresis: bool = Field(
        default=False, description="Whether a step without overflow resets the count of overflows."
    )
    min_loss_scale: int = Field(
        default=1, ge=1, description="Minimum of the loss scale; an overflow at this scale is an error."
    )
    auto_cast: bool = Field(
        default=False, description="Accepted without effect: the first stage always casts floating-point inputs."
    )


@dataclass(frozen=True)
class Precision:
    """Precision in which layers compute."""

    dtype: torch.dtype = torch.float32
    block: BF16Config | FP16Config | None = None
    """The enabled block of DeepSpeed's config; ``None`` for float32."""

    @property
    def is_low(self) -> bool:
        """Whether layers compute below float32, with float32 masters."""
        return self.block is not None

    @property
    def checks_overflow(self) -> bool:
        """Whether a layer drops a step whose gradients overflow."""
        return self.is_low and (not isinstance(self.block, BF16Config) or self.block.check_grad_overflow)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Precision:
        """Reads the precision of a DeepSpeed config.

        Raises:
            ALConfigError: both blocks are enabled, or a key is unknown, not honoured or out of range.
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
        """Checks that DeepSpeed's accelerator supports this precision.

        Raises:
            ALConfigError: the accelerator does not support it.
        """
        from deepspeed.accelerator import get_accelerator  # late: reading a config needs no DeepSpeed

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
    """Returns the validated block, without unsupported keys that are off."""
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
