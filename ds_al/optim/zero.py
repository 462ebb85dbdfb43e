"""ZeRO stage 1: data parallel copies of a stage share out its optimizer state, and with it the steps.

    copy 0   gradients' means of all weights   steps weights 0, 2, ..   sends them to copy 1
    copy 1   the same                          steps weights 1, 3, ..   sends them to copy 0

Whole weights are shared out, the largest first, each to the copy that has least. So each is stepped as without ZeRO,
to the bit, by any optimizer, Muon included. All messages stay within the copies of one stage.

DeepSpeed's own stage 1 cuts the weights of a group, joined to one vector, at any place, which Muon cannot step and no
other number of copies can read; and it agrees on a norm with all stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from ds_al.parallel.replicas import Replicas


class Shards:
    """Which copy of a stage steps which weight.

    Args:
        parameters: all that the stage trains; in the same order on all copies.
        replicas: the copies.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], replicas: Replicas) -> None:
        self._replicas = replicas
        self._parameters = list(dict.fromkeys(parameters))
        loads = [0] * replicas.count
        self._owner: dict[nn.Parameter, int] = {}
        for parameter in sorted(self._parameters, key=lambda each: -each.numel()):  # stable: alike on all copies
            owner = loads.index(min(loads))
            loads[owner] += parameter.numel()
            self._owner[parameter] = owner

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this copy steps the weight."""
        return self._owner[parameter] == self._replicas.index

    @torch.no_grad()
    def share(self) -> None:
        """Brings every weight from the copy that stepped it to all others: a message per copy and dtype."""
        for owner in range(self._replicas.count):
            by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
            for parameter in self._parameters:
                if self._owner[parameter] == owner:
                    by_dtype.setdefault(parameter.dtype, []).append(parameter)
            for parameters in by_dtype.values():
                flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
                self._replicas.broadcast(flat, source=owner)
                if owner != self._replicas.index:
                    parts = flat.split([parameter.numel() for parameter in parameters])
                    for parameter, part in zip(parameters, parts, strict=True):
                        parameter.copy_(part.view(parameter.shape))

    @torch.no_grad()
    def gather(self, own: Mapping[nn.Parameter, Mapping[str, Any]]) -> dict[nn.Parameter, dict[str, Any]]:
        """Brings what the copies know of the weights that they step to all of them. Every copy calls it.

        Args:
            own: of each weight that this copy steps, values by name: tensors, or what can be pickled.
        """
        numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        known = {
            numbers[parameter]: {
                name: _Shape(value.shape, value.dtype) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
            for parameter, values in own.items()
        }
        everyone: list[Any] = [None] * self._replicas.count
        dist.all_gather_object(everyone, known, group=self._replicas.group)
        gathered: dict[nn.Parameter, dict[str, Any]] = {}
        for parameter, number in numbers.items():
            owner = self._owner[parameter]
            values = gathered[parameter] = {}
            for name, value in everyone[owner].get(number, {}).items():
                if isinstance(value, _Shape):
                    if owner == self._replicas.index:
                        sent = own[parameter][name].to(parameter.device).contiguous()
                    else:
                        sent = torch.empty(value.shape, dtype=value.dtype, device=parameter.device)
                    self._replicas.broadcast(sent, source=owner)
                    value = sent
                values[name] = value
        return gathered


class _Shape(NamedTuple):
    """Stands for a tensor in the message that goes before it."""

    shape: torch.Size
    dtype: torch.dtype
