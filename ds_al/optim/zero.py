"""ZeRO stage 1: the data parallel replicas of a stage shard its optimizer state by whole weights.

    replica 0   averaged gradients of all weights   steps weights 0, 2, ..   broadcasts them to replica 1
    replica 1   averaged gradients of all weights   steps weights 1, 3, ..   broadcasts them to replica 0

Weights are assigned whole, the largest first, each to the replica with the smallest load. Every step is therefore
bit-identical to one without ZeRO, with any optimizer, Muon included. Only replicas of one stage communicate.

DeepSpeed's own stage 1 flattens the weights of a group into one vector and splits it anywhere, which Muon cannot step
and no other number of replicas can load; and it computes a norm over all stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from ds_al.parallel.replicas import Replicas


class Shards:
    """Assignment of a stage's weights to its replicas.

    Args:
        parameters: all trained weights of the stage, in the same order on all replicas.
        replicas: data parallel replicas of the stage.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], replicas: Replicas) -> None:
        self._replicas = replicas
        self._parameters = list(dict.fromkeys(parameters))
        loads = [0] * replicas.count
        self._owner: dict[nn.Parameter, int] = {}
        for parameter in sorted(self._parameters, key=lambda each: -each.numel()):  # stable: equal on all replicas
            owner = loads.index(min(loads))
            loads[owner] += parameter.numel()
            self._owner[parameter] = owner

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this replica steps the weight."""
        return self._owner[parameter] == self._replicas.index

    @torch.no_grad()
    def share(self) -> None:
        """Broadcasts every weight from the replica that stepped it: one message per replica and dtype."""
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
        """Gathers values of all weights from the replicas that step them. Every replica must call it.

        Args:
            own: for each weight that this replica steps, values by name: tensors, or picklable objects.
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
    """Placeholder of a tensor that is broadcast afterwards."""

    shape: torch.Size
    dtype: torch.dtype
