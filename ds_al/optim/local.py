"""Optimizer of one stage: one instance for f and b, one for g and h, with a parameter group per AL layer.

Steps of :meth:`LocalOptimizer.step`; none of them combines several layers:

    [1] scales     divide gradients by the layer's loss scale; drop them if the layer overflows    (fp16, bf16)
    [2] clip       gradients to a norm over the layer's f and b, and over its g and h
    [3] shards     drop gradients of weights that another replica of the stage steps               (ZeRO-1)
    [4] step       both instances
    [5] masters    round masters to the weights                                                    (fp16, bf16)
    [6] shards     broadcast stepped weights to the other replicas of the stage                    (ZeRO-1)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.layer import ALLayer
from ds_al.optim.loss_scale import LayerScale
from ds_al.optim.masters import master_here, stepped
from ds_al.optim.zero import Shards

ParamGroups = list[dict[str, Any]]
Factory = Callable[[ParamGroups], torch.optim.Optimizer]


class LocalOptimizer(torch.optim.Optimizer):
    """Optimizer of a stage's layers: ``associated`` trains f and b, ``autoencoder`` trains g and h.

    Its ``param_groups`` are those of both instances, named ``layer_02/associated`` and so on, so that LR
    schedules of DeepSpeed and torch drive both. An instance is ``None`` if the stage has no such parameters.

    Args:
        layers: ``(index in the network, layer)`` of the stage.
        associated: builds the optimizer of f and b from parameter groups.
        autoencoder: builds the optimizer of g and h from parameter groups.
        clip: maximum 2-norm of the gradients of f and b, and of those of g and h, of one layer; 0 is off.
        scales: loss scales by layer index, if layers check for overflow.
        shards: assignment of weights to the replicas of the stage, with ZeRO-1.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, ALLayer]],
        *,
        associated: Factory,
        autoencoder: Factory,
        clip: float = 0.0,
        scales: Mapping[int, LayerScale] | None = None,
        shards: Shards | None = None,
    ) -> None:
        # torch.optim.Optimizer.__init__ is not called: it would require parameters, which a stage may lack,
        # and copy the groups, which must remain those of the two instances.
        self.defaults: dict[str, Any] = {}
        self.clip = clip
        self.scales = scales or {}
        self.shards = shards
        sides = {
            "associated": _groups(layers, "associated", ALLayer.associated_parameters),
            "autoencoder": _groups(layers, "autoencoder", ALLayer.autoencoder_parameters),
        }
        # An instance may split a group (MuonAdamW does); clipping depends on the layers alone.
        self._clipped = [list(group["params"]) for groups in sides.values() for group in groups]
        self._of_layer = {index: trained_parameters(layer) for index, layer in layers}
        self._weights = [parameter for parameters in self._of_layer.values() for parameter in parameters]
        self._rounded = [parameter for parameter in self._weights if stepped(parameter) is not parameter]
        self.associated = associated(sides["associated"]) if sides["associated"] else None
        self.autoencoder = autoencoder(sides["autoencoder"]) if sides["autoencoder"] else None
        self.parts = {"associated": self.associated, "autoencoder": self.autoencoder}
        self.elsewhere = frozenset(stepped(p) for p in self._weights if shards is not None and not shards.owns(p))
        """Optimized tensors that another replica of the stage steps."""
        for part in filter(None, self.parts.values()):
            for parameter in self.elsewhere:  # some optimizers create the state of all parameters at once
                part.state.pop(parameter, None)
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
        """Performs one step, [1] to [6] of the module docstring."""
        for index, scale in self.scales.items():  # [1]
            masters = [stepped(parameter) for parameter in self._of_layer[index]]
            if not scale.admits([master.grad for master in masters if master.grad is not None]):
                _drop_gradients(masters)
        if self.clip > 0:  # [2]
            for parameters in self._clipped:
                nn.utils.clip_grad_norm_(parameters, self.clip)
        _drop_gradients(self.elsewhere)  # [3]
        for part in self.parts.values():  # [4]
            if part is not None:
                part.step()
        self.round_masters()  # [5]
        if self.shards is not None:  # [6]
            self.shards.share()

    @torch.no_grad()
    def round_masters(self) -> None:
        """Sets the weights to their rounded masters, if this replica of the stage owns them."""
        masters = {p: master for p in self._rounded if (master := master_here(p)) is not None}
        if masters:
            torch._foreach_copy_([parameter.detach() for parameter in masters], list(masters.values()))

    @torch.no_grad()
    def refresh_fp32_params(self) -> None:
        """Sets the masters to the weights, after weights were changed other than by a step."""
        for parameter in self._rounded:
            if (master := master_here(parameter)) is not None:
                master.copy_(parameter)

    def gather(self) -> tuple[dict[Tensor, dict[str, Any]], dict[nn.Parameter, Tensor]]:
        """Returns the state of this stage by optimized tensor, and its masters by weight.

        With ZeRO-1 this is a collective that gathers the state of all replicas of the stage: all must call it.
        """
        masters = {p: master for p in self._rounded if (master := master_here(p)) is not None}
        if self.shards is None:
            return dict(self.state), masters
        own: dict[nn.Parameter, dict[str, Any]] = {}
        for parameter in self._weights:
            if self.shards.owns(parameter):
                values = {f"state/{name}": value for name, value in self.state.get(stepped(parameter), {}).items()}
                own[parameter] = {**values, **({"master": masters[parameter]} if parameter in masters else {})}
        state: dict[Tensor, dict[str, Any]] = {}
        for parameter, values in self.shards.gather(own).items():
            if "master" in values:
                masters[parameter] = values.pop("master")
            state[stepped(parameter)] = {name.removeprefix("state/"): value for name, value in values.items()}
        return state, masters

    def gradients_of(self) -> list[nn.Parameter]:
        """Returns the tensors that hold the gradients: the trained weights, or their masters."""
        return [stepped(parameter) for parameter in self._weights]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Returns the state of both instances, by name."""
        return {name: part and _own_state(part) for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Restores a state returned by :meth:`state_dict`.

        Raises:
            ValueError: its groups differ from those of this stage.
        """
        for name, part in self.parts.items():
            if part is not None:
                part.load_state_dict(state_dict[name])
        self._link()

    def __repr__(self) -> str:
        names = {name: type(part).__name__ for name, part in self.parts.items()}
        return f"{type(self).__name__}({names}, layers={len(self.param_groups)} groups, clip={self.clip})"


def trained_parameters(layer: ALLayer) -> list[nn.Parameter]:
    """Returns all trained weights of a layer, each once."""
    both = chain(layer.associated_parameters(), layer.autoencoder_parameters())
    return list(dict.fromkeys(parameter for parameter in both if parameter.requires_grad))


def _drop_gradients(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _groups(
    layers: Sequence[tuple[int, ALLayer]], role: str, parameters: Callable[[ALLayer], Iterable[nn.Parameter]]
) -> ParamGroups:
    return [
        {"params": [stepped(parameter) for parameter in trained], "name": f"layer_{index:02d}/{role}"}
        for index, layer in layers
        if (trained := [p for p in dict.fromkeys(parameters(layer)) if p.requires_grad])  # tied ones once
    ]


def _own_state(part: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state dict of one instance, without the other's entries in the shared ``state``."""
    own = {p for group in part.param_groups for p in group["params"]}
    shared = part.state
    part.state = defaultdict(dict, {p: s for p, s in shared.items() if p in own})
    try:
        return part.state_dict()
    finally:
        part.state = shared
