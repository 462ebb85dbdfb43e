"""Which engine and which module a ``bp_*`` method needs, and what each of them refuses."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import util
from typing import Any

from deepspeed.pipe import PipelineModule

from ds_al.baseline import data_parallel, delayed, zero_bubble
from ds_al.baseline.engine import BackpropPipelineEngine
from ds_al.errors import ALConfigError
from ds_al.system.versions import release

DUALPIPEV = "bp_dualpipev"
RELEASE = "0.19.8"
"""First release of DeepSpeed that has it."""


def engine_class(method: str) -> type[BackpropPipelineEngine]:
    """Returns the engine of a method."""
    if method in zero_bubble.METHODS:
        return zero_bubble.ZeroBubbleEngine
    if method == delayed.METHOD:
        return delayed.DelayedEngine
    if method == DUALPIPEV:
        from ds_al.baseline.dualpipev import DualPipeVTwinEngine

        return DualPipeVTwinEngine
    return BackpropPipelineEngine


def module_class(method: str) -> type[PipelineModule]:
    """Returns the module of a method's twin.

    Raises:
        ALConfigError: the installed DeepSpeed has no such module.
    """
    if method != DUALPIPEV:
        return PipelineModule
    check_release()
    from ds_al.baseline.dualpipev import DualPipeVTwin

    return DualPipeVTwin


def check(method: str, config: Mapping[str, Any], model: PipelineModule, *, micro_batches: int) -> None:
    """Checks a config and a module.

    Args:
        method: name of the method.
        config: the whole config.
        model: the twin.
        micro_batches: micro-batches per batch, M.

    Raises:
        ALConfigError: the method cannot train this module so.
    """
    if method in (data_parallel.METHOD, delayed.METHOD):
        data_parallel.check_module(model, method)
    if method in (delayed.METHOD, *zero_bubble.METHODS):
        check_full_precision(config, method)
    is_v = hasattr(model, "phase_bounds")
    if is_v and method != DUALPIPEV:
        raise ALConfigError(f"{method} got a {type(model).__name__}: it is for {DUALPIPEV}, give a PipelineModule")
    if method == DUALPIPEV:
        check_release()
        if not is_v:
            raise ALConfigError(
                f"{method} got a {type(model).__name__}: expected DeepSpeed's DualPipeVModule, with two parts of the "
                "network on every stage. Build it with ds_al.baseline.build.module_class, or use bp_zb_h1"
            )
        check_micro_batches(micro_batches, stages=model.num_stages // 2)
        if model.dynamic_shape:
            raise ALConfigError(f"{method} sends shapes once: got dynamic_shape=True, use bp_zb_h1 or bp_1f1b")


def check_trains(model: PipelineModule) -> None:
    """Checks that a stage that is to have an optimizer has a weight for it; back-propagation needs one on each.

    Raises:
        ALConfigError: no weight of this stage requires a gradient.
    """
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ALConfigError(
            f"stage {model.stage_id} of {model.num_stages} has no weight with requires_grad: expected one on each "
            "stage, which has an optimizer of its own. Move the cuts between the stages (partition_method), or let "
            "another weight train"
        )


def check_release() -> None:
    """Checks that DeepSpeed has DualPipeV.

    Raises:
        ALConfigError: it is older.
    """
    if util.find_spec("deepspeed.runtime.pipe.dualpipev") is None:
        raise ALConfigError(
            f"{DUALPIPEV} is DeepSpeed's own, of release {RELEASE} and later: got {release('deepspeed')}. "
            f"pip install 'deepspeed>={RELEASE},<0.20', or use bp_zb_h1"
        )


def check_micro_batches(micro_batches: int, *, stages: int) -> None:
    """Checks that there are at least as many micro-batches as parts of the network.

    Raises:
        ALConfigError: there are fewer.
    """
    if micro_batches < 2 * stages:
        raise ALConfigError(
            f'"gradient_accumulation_steps": got {micro_batches} for {stages} stages of {DUALPIPEV}: expected at least '
            f"{2 * stages}, as many as it has parts of the network, or use bp_zb_h1"
        )


def check_full_precision(config: Mapping[str, Any], method: str) -> None:
    """Checks that DeepSpeed neither casts weights nor keeps gradients and weights elsewhere.

    Raises:
        ALConfigError: a key makes it do so.
    """
    blocks = {key: config.get(key) or {} for key in ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")}
    found = [key for key, block in blocks.items() if block.get("enabled")]
    if (config.get("zero_optimization") or {}).get("stage"):
        found.append("zero_optimization")
    if found:
        raise ALConfigError(
            f'"{found[0]}": {method} trains in float32 without ZeRO, since DeepSpeed keeps weights and gradients '
            "elsewhere there: remove the block, or use bp_1f1b"
        )
