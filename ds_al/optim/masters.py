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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MASTER = "ds_al_master"


def stepped(parameter: nn.Parameter) -> nn.Parameter:
    """What an optimizer steps for a weight: its master, or in float32 the weight itself."""
    return getattr(parameter, _MASTER, parameter)


def lower(modules: Iterable[nn.Module], dtype: torch.dtype, *, owned: Callable[[nn.Parameter], bool]) -> None:
    """Casts modules in place, and gives each weight that is trained a master, on which its gradients are summed up.

    Args:
        owned: whether this rank steps a weight. Of one that another rank steps there is a placeholder, which has the
            shape of a master and takes gradients, but has no values and no memory.
    """
    for module in modules:
        masters = {}
        for parameter in module.parameters():
            if parameter.requires_grad:
                own = owned(parameter)
                masters[parameter] = nn.Parameter(
                    parameter.detach().to(torch.float32, copy=True)
                    if own
                    else torch.zeros((), device=parameter.device).expand(parameter.shape)
                )
                masters[parameter].ds_al_is_elsewhere = not own  # type: ignore[attr-defined]
        module.to(dtype)
        for parameter, master in masters.items():
            if hasattr(parameter, "use_muon"):
                master.use_muon = parameter.use_muon  # type: ignore[attr-defined]
            setattr(parameter, _MASTER, master)
            parameter.register_post_accumulate_grad_hook(_hand_over)


def _hand_over(parameter: Tensor) -> None:
    """Adds a gradient to that of the master, in float32, and drops it."""
    master, gradient = getattr(parameter, _MASTER), parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(torch.float32)
    else:
        master.grad += gradient
    parameter.grad = None


def master_here(parameter: nn.Parameter) -> Tensor | None:
    """The master of a weight, with its values; ``None`` where it has none, or another copy of the stage has it."""
    master = stepped(parameter)
    return None if master is parameter or master.ds_al_is_elsewhere else master.detach()  # type: ignore[attr-defined]


def full_state(layer: nn.Module, masters: Mapping[nn.Parameter, Tensor] | None = None) -> dict[str, Any]:
    """A layer's ``state_dict``; if it has masters, in float32: masters instead of rounded weights, and all other
    numbers to_float32, without loss. So a checkpoint says nothing of the precision that it was trained in.

    Args:
        masters: those of all weights, where copies of a stage share them out; without them weights whose master is
            elsewhere come as they are rounded.
    """
    state = dict(layer.state_dict())
    weights = dict(layer.named_parameters(remove_duplicate=False))
    if all(stepped(parameter) is parameter for parameter in weights.values()):
        return state
    for name, value in state.items():
        if name in weights:
            master = masters.get(weights[name]) if masters is not None else master_here(weights[name])
            value = value if master is None else master
        if isinstance(value, Tensor) and value.is_floating_point():
            state[name] = value.to(torch.float32)
    return state
