"""Finds trained weights that get no gradient: they would silently stay as they are.

A weight counts as used if one micro-batch of the first batch gave it a gradient, on this replica or on another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch

from ds_al.config.base import BLOCK
from ds_al.errors import ALLayerError
from ds_al.layer import ALLayer
from ds_al.optim.masters import stepped

_NAMED = 8  # weights that a message names


class UnusedWeights:
    """Watches the first batch of a stage.

    Args:
        layers: ``(index in the network, layer)`` of the stage.
        optimizer: steps the trained weights.
        stage_id: number of the stage, for the error.
        allowed: ``"raise"``, ``"allow"``, or patterns of names that may lack a gradient.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, ALLayer]],
        *,
        optimizer: torch.optim.Optimizer | None,
        stage_id: int,
        allowed: Literal["raise", "allow"] | Sequence[str],
    ) -> None:
        self._layers, self._stage_id = dict(layers), stage_id
        trained = {tensor for group in optimizer.param_groups for tensor in group["params"]} if optimizer else set()
        patterns = {"raise": [], "allow": ["*"]}[allowed] if isinstance(allowed, str) else allowed
        named = {
            f"{index}.{name}": weight
            for index, layer in layers
            for name, weight in layer.named_parameters()
            if name.split(".")[0] not in layer.objective.untrained
        }
        self._missing = {
            name: stepped(weight)
            for name, weight in named.items()
            if stepped(weight) in trained and not any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    def before_step(self) -> None:
        """Removes the weights that have a gradient from those that are missing one."""
        if self._missing:
            self._missing = {name: weight for name, weight in self._missing.items() if weight.grad is None}

    def _rests(self, name: str) -> bool:
        """Returns whether a weight is frozen for now."""
        index, _, own = name.partition(".")
        return not self._layers[int(index)].get_parameter(own).requires_grad

    def end(self) -> None:
        """Ends the watch in a process that continues after the first batch."""
        self._missing = {}

    def after_batch(self) -> None:
        """Ends the watch.

        Raises:
            ALLayerError: a weight had no gradient in the first batch.
        """
        missing = {name: weight for name, weight in self._missing.items() if not self._rests(name)}
        self._missing = {}
        if not missing:
            return
        index, function = next(iter(missing)).split(".")[:2]
        names = ", ".join(list(missing)[:_NAMED]) + (f" and {len(missing) - _NAMED} more" * (len(missing) > _NAMED))
        raise ALLayerError(
            f"stage {self._stage_id}, {self._layers[int(index)].label}, {function}: got no gradient in the first batch "
            f"for trained weights: {names}; expected one for each, or they would never change. Freeze them "
            "(requires_grad_(False)), let them take part in the output, or, if it is meant (experts, layers that are "
            f'left out at random), name them in "{BLOCK}": {{"unused_parameters": ["{index}.{function}.*"]}}, or '
            '"allow" all'
        )
