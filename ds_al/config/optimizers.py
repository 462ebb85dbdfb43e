"""Types of optimizer blocks in a config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ds_al.config.base import StrictModel


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
        default=(0.9, 0.999), description="Decays of AdamW's two running means."
    )
    adamw_eps: float = Field(default=1e-8, ge=0, description="Added to AdamW's denominator.")
    adamw_weight_decay: float = Field(
        default=0.01, ge=0, description="Weight decay of the parameters that AdamW steps; as `weight_decay`."
    )
