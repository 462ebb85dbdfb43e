"""Float32 masters for layers that compute in bfloat16 or float16, as in DeepSpeed's blocks ``"bf16"`` and ``"fp16"``.

    master (fp32) -- rounded --> weight (bf16) --> f, b, g, h --> losses in fp32
      ^                                                             |
      '-- optimizer <-- gradient, summed up in fp32 <-- gradient (bf16)

Every trained weight has a master of its own shape, which the optimizer steps instead. DeepSpeed's ``BF16_Optimizer`` is
not used: it flattens the weights of a group into one vector over data parallel ranks, so that neither Muon's matrices
nor a checkpoint's layers can be recovered, and it computes a norm over all stages. Here masters are local to a layer.

Masters are initialized from the weights before these are rounded, so training starts from the same weights as in
float32. Labels, losses, norms and reports keep their dtype, and so do

    rotary frequencies      buffers named ``inv_freq``, ``full_attention_inv_freq``, ...: rounded, they would turn token
                            4,000 by radians
    constant tables         buffers that are not saved (``persistent=False``), as in ``transformers``; complex buffers
    batch norm              weights and running statistics, which torch computes in float32 for inputs of bfloat16 and
                            float16; its output has their dtype

All other buffers are cast like the weights, since layers add them to or multiply them with activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ds_al.errors import ALConfigError

_MASTER = "ds_al_master"
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def stepped(parameter: nn.Parameter) -> nn.Parameter:
    """Returns the optimized tensor of a weight: its master, or in float32 the weight itself."""
    return getattr(parameter, _MASTER, parameter)


def lower(
    modules: Iterable[nn.Module],
    dtype: torch.dtype,
    *,
    owned: Callable[[nn.Parameter], bool],
    trained: Callable[[nn.Parameter], bool],
) -> None:
    """Casts modules in place, and creates a master for each trained weight, which accumulates its gradients in float32.

    A weight that has its master keeps it; where another rank steps the weight from now on, or this one does, the master
    is replaced.

    Args:
        owned: whether this rank steps a weight. A weight stepped by another rank gets a placeholder of the same shape,
            which accumulates gradients but has no values and no memory.
        trained: whether a weight is trained.
    """
    for module in modules:
        keep = kept(module)
        masters: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in module.parameters():
            own = owned(parameter) if trained(parameter) and parameter not in keep else None
            if own is not None and not _has_master(parameter, own=own):
                masters[parameter] = nn.Parameter(
                    parameter.detach().to(torch.float32, copy=True)
                    if own
                    else torch.zeros((), device=parameter.device).expand(parameter.shape)
                )
                masters[parameter].ds_al_is_elsewhere = not own  # type: ignore[attr-defined]
        cast(module, dtype)
        for parameter, master in masters.items():
            if hasattr(parameter, "use_muon"):
                master.use_muon = parameter.use_muon  # type: ignore[attr-defined]
            if stepped(parameter) is parameter:
                parameter.register_post_accumulate_grad_hook(_hand_over)
            setattr(parameter, _MASTER, master)


def _has_master(parameter: nn.Parameter, *, own: bool) -> bool:
    master = stepped(parameter)
    return master is not parameter and master.ds_al_is_elsewhere is not own  # type: ignore[attr-defined]


def give_up(module: nn.Module) -> None:
    """Frees the masters of a module that this rank trains no more: another rank steps its weights."""
    for parameter in module.parameters():
        master = stepped(parameter)
        if master is not parameter:
            master.data = torch.zeros((), device=parameter.device).expand(parameter.shape)
            master.grad, master.ds_al_is_elsewhere = None, True  # type: ignore[attr-defined]


def kept(module: nn.Module) -> set[Tensor]:
    """Returns the weights and buffers of a module that keep their dtype in low precision."""
    keep: set[Tensor] = set()
    for part in module.modules():
        saved = part._non_persistent_buffers_set
        keep |= {b for name, b in part.named_buffers(recurse=False) if name in saved or name.endswith("inv_freq")}
        if isinstance(part, _BatchNorm):
            keep |= {*part.parameters(recurse=False), *part.buffers(recurse=False)}
    return keep | {buffer for buffer in module.buffers() if buffer.is_complex()}


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts a module as ``module.to(dtype)`` does, but for the weights and buffers that keep their dtype."""
    keep = kept(module)
    module._apply(lambda each: each.to(dtype) if each.is_floating_point() and each not in keep else each)


def check_dtypes(modules: Iterable[tuple[int, nn.Module]], *, low: bool) -> None:
    """Checks that the trained weights are of a type that the layers are trained in.

    Args:
        modules: ``(index, layer)``.
        low: whether layers compute below float32, with float32 masters.

    Raises:
        ALConfigError: a weight is complex in low precision, or without it of another type than float32; float64 needs
            ``torch.set_default_dtype(torch.float64)``, which labels and new weights follow. Or, in low precision, an
            embedding has a ``max_norm``.
    """
    full = {torch.float32, torch.get_default_dtype()} - {torch.bfloat16, torch.float16}
    for index, module in modules:
        for name, part in module.named_modules():
            if low and getattr(part, "max_norm", None) is not None and isinstance(part, _EMBEDDINGS):
                raise ALConfigError(
                    f"AL layer {index}, {name}: max_norm scales weights in the forward, and a step sets them back to "
                    "their masters: train in fp32, or leave max_norm out"
                )
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or parameter.dtype in full:
                continue
            found = f"AL layer {index}, {name}: got a weight of {parameter.dtype}"
            if low and parameter.is_complex():
                raise ALConfigError(f'{found}, of which "bf16" and "fp16" would keep the real part: train in fp32')
            if not low and parameter.is_floating_point():
                raise ALConfigError(
                    f"{found}, which would be stepped without a master in float32: "
                    + (
                        "make the model float32, by model.float()"
                        if parameter.dtype is torch.float64
                        else f'enable "{"bf16" if parameter.dtype is torch.bfloat16 else "fp16"}" in the config, or '
                        "make the model float32, by model.float()"
                    )
                )


def _hand_over(parameter: Tensor) -> None:
    """Adds a weight's gradient to that of its master, in float32, and frees it."""
    master, gradient = getattr(parameter, _MASTER), parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(torch.float32)
    else:
        master.grad += gradient
    parameter.grad = None


def master_here(parameter: nn.Parameter) -> Tensor | None:
    """Returns the master of a weight; ``None`` if it has none, or another replica of the stage owns it."""
    master = stepped(parameter)
    return None if master is parameter or master.ds_al_is_elsewhere else master.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def refresh(parameters: Iterable[nn.Parameter]) -> None:
    """Sets masters to weights that were changed other than by a step: by ``load_state_dict``, an average of weights, a
    clamp. A number that still is its rounded master keeps all digits.
    """
    for parameter in parameters:
        if (master := master_here(parameter)) is not None:
            weight = parameter.detach()
            torch.where(weight != master.to(weight.dtype), weight.to(master.dtype), master, out=master)


def full_state(layer: nn.Module, masters: Mapping[nn.Parameter, Tensor] | None = None) -> dict[str, Any]:
    """Returns a layer's ``state_dict`` in full precision, so that a checkpoint is independent of training precision.

    If the layer has masters, they replace the rounded weights, and other floating-point values are cast to float32.

    Args:
        masters: gathered masters of all weights, if the replicas of a stage shard them; without them weights whose
            master is on another replica are returned rounded.
    """
    state = dict(layer.state_dict())
    weights = dict(layer.named_parameters(remove_duplicate=False))
    if all(stepped(parameter) is parameter for parameter in weights.values()):
        return state
    refresh(weights.values())
    for name, value in state.items():
        if name in weights:
            master = masters.get(weights[name]) if masters is not None else master_here(weights[name])
            value = value if master is None else master
        if isinstance(value, Tensor) and value.is_floating_point():
            state[name] = value.to(torch.float32)
    return state
