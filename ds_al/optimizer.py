"""One stage's optimizer: an instance for f and b, one for g and h, with a parameter group per AL layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.layer import ALLayer

ParamGroups = list[dict[str, Any]]
Factory = Callable[[ParamGroups], torch.optim.Optimizer]


class LocalOptimizer(torch.optim.Optimizer):
    """Steps a stage's layers: ``associated`` trains f and b, ``autoencoder`` trains g and h.

    Its ``param_groups`` are those of both instances, named ``layer_02/associated`` and so on, so that LR
    schedules of DeepSpeed and torch drive both. Either instance is ``None`` where a stage has no such
    parameters.

    Args:
        layers: ``(index in the network, layer)`` of the stage.
        associated: makes the optimizer of f and b from parameter groups.
        autoencoder: makes that of g and h.
        clip: 2-norm to which the gradients of f and b, and those of g and h, of one layer are clipped; 0 is off.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, ALLayer]],
        *,
        associated: Factory,
        autoencoder: Factory,
        clip: float = 0.0,
    ) -> None:
        # torch.optim.Optimizer.__init__ is left out: it would demand parameters, which a stage may lack,
        # and copy the groups, which have to stay those of the two instances.
        self.defaults: dict[str, Any] = {}
        self.clip = clip
        sides = {
            "associated": _groups(layers, "associated", ALLayer.associated_parameters),
            "autoencoder": _groups(layers, "autoencoder", ALLayer.autoencoder_parameters),
        }
        # An instance may split a group (MuonAdamW does); what is clipped together is given by the layers alone.
        self._clipped = [list(group["params"]) for groups in sides.values() for group in groups]
        self.associated = associated(sides["associated"]) if sides["associated"] else None
        self.autoencoder = autoencoder(sides["autoencoder"]) if sides["autoencoder"] else None
        self.parts = {"associated": self.associated, "autoencoder": self.autoencoder}
        self._link()

    def _link(self) -> None:
        parts = [part for part in self.parts.values() if part is not None]
        self.param_groups: ParamGroups = list(chain.from_iterable(part.param_groups for part in parts))
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in parts:
            state.update(part.state)
            part.state = state
        self.state = state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clips each layer's gradients, if asked to, and steps both instances."""
        if self.clip > 0:
            for parameters in self._clipped:
                nn.utils.clip_grad_norm_(parameters, self.clip)
        for part in self.parts.values():
            if part is not None:
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of all parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The state of both instances, by name."""
        return {name: part and _own_state(part) for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restores what :meth:`state_dict` gave.

        Raises:
            ValueError: the groups differ from those of this stage.
        """
        for name, part in self.parts.items():
            if part is not None:
                part.load_state_dict(state_dict[name])
        self._link()

    def __repr__(self) -> str:
        names = {name: type(part).__name__ for name, part in self.parts.items()}
        return f"{type(self).__name__}({names}, layers={len(self.param_groups)} groups, clip={self.clip})"


def _groups(
    layers: Sequence[tuple[int, ALLayer]], role: str, parameters: Callable[[ALLayer], Iterable[nn.Parameter]]
) -> ParamGroups:
    return [
        {"params": trained, "name": f"layer_{index:02d}/{role}"}
        for index, layer in layers
        if (trained := [p for p in dict.fromkeys(parameters(layer)) if p.requires_grad])  # tied ones once
    ]


def _own_state(part: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of one instance without the other's entries in the shared ``state``."""
    own = {p for group in part.param_groups for p in group["params"]}
    shared = part.state
    part.state = defaultdict(dict, {p: s for p, s in shared.items() if p in own})
    try:
        return part.state_dict()
    finally:
        part.state = shared
