"""Optimizers by their name in a config: builds ``"MuonAdamW"``, and enables torch's fused implementations."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from ds_al import host
from ds_al.config.associated_learning import ALConfig
from ds_al.config.base import BLOCK, validate
from ds_al.config.methods import AL_METHODS
from ds_al.config.optimizers import MuonAdamWConfig, OptimizerConfig, check_options
from ds_al.errors import ALConfigError
from ds_al.optim import muon
from ds_al.optim.local import Factory
from ds_al.parallel.agreement import is_first_here
from ds_al.system import extensions

MUON_ADAMW = "MuonAdamW"
_FORMS = {"fused", "foreach", "capturable", "differentiable"}
"""Options that select an implementation of torch's optimizers."""
_FUSABLE = ("adam", "adamw", "SGD")
"""Names in DeepSpeed's config of torch's optimizers that have a fused step on CPU and GPU since torch 2.4."""

_REFUSED = {
    "LBFGS": "which evaluates the loss anew in each step, while a stage steps once per gradient: use another",
    "SparseAdam": "which takes sparse gradients alone: layers have others, too. Use another",
    "Muon": 'which takes matrices alone: use "MuonAdamW", which steps all others by AdamW',
    "muon": 'whose groups are those of DeepSpeed\'s ZeRO: use "MuonAdamW"',
}
"""Optimizers of DeepSpeed and torch that cannot train AL layers, and why."""


class NamedOptimizers(PipelineEngine):
    """DeepSpeed's pipeline engine, whose config may also name the optimizers of ds_al; base of both engines.

    Private names of DeepSpeed that it overrides or uses (runtime/engine.py, 0.19.0 and 0.19.8): ``_config``,
    ``_configure_basic_optimizer``, ``_is_supported_optimizer``.
    """

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return is_ours(optimizer_name) or super()._is_supported_optimizer(optimizer_name)

    def _configure_basic_optimizer(self, model_parameters: Any) -> torch.optim.Optimizer:
        return from_config(
            self._config,
            model_parameters,
            module=self.module,
            device=self.device,
            by_deepspeed=super()._configure_basic_optimizer,
        )


def is_ours(name: Any) -> bool:
    """Whether ds_al, not DeepSpeed, builds the optimizer of this name."""
    return isinstance(name, str) and name.lower() == MUON_ADAMW.lower()


def from_config(
    config: Any, groups: Any, *, module: nn.Module, device: torch.device, by_deepspeed: Factory
) -> torch.optim.Optimizer:
    """Builds the optimizer that a ``DeepSpeedConfig`` names, for either engine.

    DeepSpeed builds the LR schedule for it, and saves and loads it, as with an optimizer of its own.

    Args:
        groups: parameters or parameter groups.
        module: the trained module.
        device: device of the stage, for errors.
        by_deepspeed: DeepSpeed's own method, for all names but ours.

    Raises:
        ALConfigError: the optimizer cannot be built with these options, or on this device.
    """
    name, given = config.optimizer_name, config.optimizer_params
    plain = not (config.zero_enabled or config.float16_config.enabled or config.bfloat16_config.enabled)
    if not is_ours(name):
        params = _fused(name, dict(given or {}), module, plain=plain)
        try:
            compiled = extensions.of_optimizer(name, params)
            with (
                host.optimizer_block(config, type=name, params=params),
                extensions.compiling(compiled, tell=is_first_here()),
            ):
                return by_deepspeed(groups)
        except ALConfigError:
            raise
        except Exception as error:  # a kernel missing on this device, a missing package, an invalid option
            raise ALConfigError(
                f'"optimizer.type": {name!r} cannot be made on {device.type} with '
                f"{given!r}: {type(error).__name__}: {error}. Correct its params, or use one of torch.optim, such "
                'as "AdamW" with "torch_adam": true'
            ) from error
    if not plain:
        raise ALConfigError(
            '"optimizer.type": got "MuonAdamW" with ZeRO or mixed precision, where DeepSpeed joins parameters into '
            'vectors, and Muon needs matrices: train in fp32 at "zero_optimization" stage 0, or use "AdamW"'
        )
    muon.tag_embeddings(module)
    options = validate(MuonAdamWConfig, given or {}, where="optimizer.params")
    return muon.MuonAdamW(groups, **options.model_dump())


def _fused(name: str, params: dict[str, Any], module: nn.Module, *, plain: bool) -> dict[str, Any]:
    """Adds ``"fused": true`` unless the config selects an implementation or torch has no fused one.

    The fused step treats each tensor separately, so no weight depends on which others a stage holds.
    """
    is_torch = name in _FUSABLE and (name == "SGD" or params.get("torch_adam", False))
    if params.keys() & _FORMS or not plain or not is_torch or not _can_fuse(module):
        return params
    return {**params, "fused": True}


def _can_fuse(module: nn.Module) -> bool:
    sparse = any(getattr(part, "sparse", False) is True for part in module.modules())
    return not sparse and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in module.parameters())


def without_engine(optimizer: OptimizerConfig, module: nn.Module) -> Factory:
    """Returns a factory like an engine's, for timing; torch's AdamW replaces optimizers that only DeepSpeed has."""
    name, params = optimizer.type, optimizer.params
    options = {key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode")}
    if is_ours(name):
        muon.tag_embeddings(module)
        return lambda groups: muon.MuonAdamW(groups, **validate(MuonAdamWConfig, options, where="params").model_dump())
    own = {kind.lower(): kind for kind in ("Adam", "AdamW", "Adagrad")}.get(name.lower(), name)
    maker = getattr(torch.optim, own, None)
    if maker is None:
        own, maker, options = "AdamW", torch.optim.AdamW, {}
    if own == "Adam" and params.get("adam_w_mode", True):
        maker = torch.optim.AdamW  # as DeepSpeed does
    if own in ("Adam", "AdamW", "SGD") and not options.keys() & _FORMS and _can_fuse(module):
        options["fused"] = True
    return lambda groups: maker(groups, **options)


def check(config: Mapping[str, Any], al: ALConfig) -> None:
    """Checks optimizer names, and the options of our own optimizers. Every rank calls it, even with nothing to train.

    Raises:
        ALConfigError: a name (with an AL engine) or an option is unknown (the nearest is named) or out of range, or the
            optimizer cannot train AL layers.
    """
    blocks: dict[str, Any] = {"optimizer": config["optimizer"]} if "optimizer" in config else {}
    if al.autoencoder_optimizer is not None:
        blocks[f"{BLOCK}.autoencoder_optimizer"] = al.autoencoder_optimizer.model_dump()
    for where, block in blocks.items():
        _check_block(block, where=where, strict=al.method in AL_METHODS)
        if is_ours(block.get("type")):
            validate(MuonAdamWConfig, block.get("params", {}), where=f"{where}.params")
        elif al.method in AL_METHODS:
            _check_name(block.get("type"), where=where)


def _check_block(block: Any, *, where: str, strict: bool) -> None:
    """Raises :class:`~ds_al.errors.ALConfigError` unless a block is an object with a name and valid options."""
    if not isinstance(block, Mapping):
        raise ALConfigError(
            f'"{where}": got {block!r}, expected an object such as {{"type": "AdamW", "params": {{"lr": 1e-3}}}}'
        )
    params = block.get("params", {})
    if not isinstance(params, Mapping):
        raise ALConfigError(f'"{where}.params": got {params!r}, expected an object {{...}}')
    check_options(params, where=f'"{where}.params.{{}}"')
    off = {"legacy_fusion"} if not block.get("legacy_fusion") else set()
    if strict and (unknown := sorted(block.keys() - {"type", "params"} - off)):
        raise ALConfigError(f'"{where}.{unknown[0]}" is not a key of this block: its keys are "type" and "params"')


def _check_name(name: Any, *, where: str) -> None:
    """Raises :class:`~ds_al.errors.ALConfigError` if no engine can train with an optimizer of that name."""
    of_torch = [
        each
        for each, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    ]
    if isinstance(name, str) and name in _REFUSED:
        raise ALConfigError(f'"{where}.type": got {name!r}, {_REFUSED[name]}')
    if not isinstance(name, str) or (name not in of_torch and name.lower() not in host.OPTIMIZER_NAMES):
        near = difflib.get_close_matches(str(name), [*of_torch, MUON_ADAMW, "Lamb", "Lion"], n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "use one of torch.optim, of DeepSpeed, or MuonAdamW"
        raise ALConfigError(f'"{where}.type": got {name!r}, which neither DeepSpeed nor torch.optim has: {hint}')
