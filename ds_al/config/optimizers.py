"""Types of optimizer blocks in a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from ds_al.config.base import StrictModel
from ds_al.errors import ALConfigError


class OptimizerConfig(StrictModel):
    """An optimizer, in the form of DeepSpeed's own ``"optimizer"`` block."""

    type: str = Field(
        description="Name of an optimizer of DeepSpeed or `torch.optim`, or `MuonAdamW`: Muon on matrices, AdamW on "
        "the rest."
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the optimizer.")


class MuonAdamWConfig(StrictModel):
    """``"params"`` of an optimizer of type ``"MuonAdamW"``; see :class:`ds_al.optim.muon.MuonAdamW`."""

    lr: float = Field(
        default=0.02,
        gt=0,
        allow_inf_nan=False,
        description="Learning rate of Muon. An LR schedule sets this rate; that of AdamW is kept in proportion.",
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Decay of Muon's running mean of gradients.")
    nesterov: bool = Field(default=True, description="Whether Muon uses Nesterov momentum.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Weight decay of matrices: each step multiplies them by `1 - lr * weight_decay`.",
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        default="original",
        description="Factor of Muon's rate by shape of the matrix: `original` is `sqrt(max(1, out / rest))`; "
        "`match_rms_adamw` is `0.2 * sqrt(max(out, rest))`, so that rates and weight decays of AdamW can be reused.",
    )
    ns_steps: int = Field(default=5, ge=1, lt=100, description="Newton-Schulz iterations of Muon.")
    ns_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="Dtype of these iterations; `auto` is bfloat16 on an accelerator and float32 on a CPU, since most "
        "CPUs compute bfloat16 many times slower.",
    )
    adamw_lr: float = Field(
        default=1e-3, ge=0, allow_inf_nan=False, description="Learning rate of AdamW while Muon's rate is `lr`."
    )
    adamw_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), strict=False, description="Decays of AdamW's two running means."
    )
    adamw_eps: float = Field(default=1e-8, ge=0, description="Added to AdamW's denominator.")
    adamw_weight_decay: float = Field(
        default=0.01, ge=0, description="Weight decay of the parameters that AdamW steps; as `weight_decay`."
    )


# ---- options of any optimizer --------------------------------------------------------------------------

_NUMBERS = {
    *("lr", "weight_decay", "eps", "momentum", "dampening", "alpha", "lr_decay", "initial_accumulator_value", "rho"),
    *("lambd", "t0", "momentum_decay", "max_coeff", "min_coeff"),
}
"""Options that are numbers of at least 0, of torch's and DeepSpeed's optimizers."""
_FLAGS = {
    *("amsgrad", "nesterov", "centered", "maximize", "foreach", "fused", "capturable", "differentiable"),
    *("torch_adam", "adam_w_mode", "bias_correction", "decoupled_weight_decay"),
}
"""Options that are true or false."""
AUTO = "which transformers' Trainer alone fills in: give a value, or leave the key out for the default"
"""What is said of ``"auto"``."""


def check_options(options: Mapping[str, Any], *, where: str) -> None:
    """Checks the options of an optimizer or of a parameter group that are known by name; others are the optimizer's.

    torch checks the defaults of its optimizers alone, not the options of a group, and takes ``True`` for 1.

    Args:
        where: name of an option in errors, with ``{}`` for its key.

    Raises:
        ALConfigError: an option is not of its type, or out of range.
    """
    for name, value in options.items():
        expected = None
        if isinstance(value, str) and value == "auto" and name in {*_NUMBERS, *_FLAGS, "betas"}:
            expected = AUTO
        elif name == "eps" and isinstance(value, (tuple, list)):  # Adafactor has two
            continue
        elif name in _NUMBERS and not (_is_number(value) and value >= 0):
            expected = "expected a finite number of at least 0"
        elif name in _FLAGS and not (value is None or isinstance(value, bool)):
            expected = "expected true or false"
        elif name == "betas" and not _are_decays(value):
            expected = "expected two or more numbers of at least 0 and below 1"
        if expected:
            raise ALConfigError(f"{at(where, name)}: got {value!r}, {expected}")


def at(where: str, name: str) -> str:
    """Returns the name of an option in errors; a group's own name may hold braces, too."""
    return where.replace("{}", name)


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):  # torch takes a learning rate that is a tensor
        return value.numel() == 1 and bool(torch.isfinite(value))
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _are_decays(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) < 2:
        return False
    return all(_is_number(each) and 0 <= each < 1 for each in value)
