"""Optimizer of one stage: one instance for f and b, one for g and h, with parameter groups per AL layer.

A user's own instance takes the place of both, or with an optimizer of g and h in the config that of f and b.

Steps of :meth:`LocalOptimizer.step`; none of them combines several layers:

    [1] scales     divide gradients by the layer's loss scale; drop those that are not finite      (fp16, bf16, skip)
    [2] clip       gradients to a norm over the layer's f and b, and over its g and h
                   [1] and [2] with the other stages of the layer, where it spans several
    [3] shards     drop gradients of weights that another replica of the stage steps               (ZeRO-1)
    [4] step       both instances
    [5] masters    round masters to the weights                                                    (fp16, bf16)
    [6] shards     broadcast stepped weights to the other replicas of the stage                    (ZeRO-1)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.optim.accepted import accepted
from ds_al.optim.groups import SIDES, Layers, ParamGroups, Selection, split, trained_masters, trained_parameters
from ds_al.optim.masters import master_here, refresh, stepped
from ds_al.optim.skip import LayerSkip
from ds_al.optim.zero import Shards

Factory = Callable[[ParamGroups], torch.optim.Optimizer]


class Together(Protocol):
    """Exchange with the other stages of a layer, see :class:`ds_al.group.together.Together`."""

    def finite(self, own: bool) -> bool:
        """Returns whether the gradients of all stages are finite."""

    def norms(self, own: Tensor) -> Tensor:
        """Returns the norms ``(n,)`` of the gradients of all stages."""


class LocalOptimizer(torch.optim.Optimizer):
    """Optimizer of a stage's layers: ``associated`` trains f and b, ``autoencoder`` trains g and h.

    Its ``param_groups`` are those of both instances, named ``layer_02/associated`` and so on, so that LR
    schedules of DeepSpeed and torch drive both. An instance is ``None`` if the stage has no such parameters.

    Args:
        layers: ``(index in the network, layer)`` of the stage.
        associated: builds the optimizer of f and b from parameter groups; or an instance that steps the selection.
        autoencoder: builds the optimizer of g and h from parameter groups; ``None`` where an instance steps them, too.
        selection: the weights to train; by default all that require gradients.
        clip: maximum 2-norm of the gradients of f and b, and of those of g and h, of one layer; 0 is off.
        scales: loss scales by layer index, or what leaves out steps, if layers check their gradients.
        shards: assignment of weights to the replicas of the stage, with ZeRO-1.

    Raises:
        ALConfigError: an optimizer cannot step these layers.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        associated: Factory | torch.optim.Optimizer,
        autoencoder: Factory | None,
        selection: Selection | None = None,
        clip: float = 0.0,
        scales: Mapping[int, LayerSkip] | None = None,
        shards: Shards | None = None,
    ) -> None:
        # torch.optim.Optimizer.__init__ is not called: it would require parameters, which a stage may lack,
        # and copy the groups, which must remain those of the two instances.
        self.clip = clip
        self.scales = scales or {}
        self.shards = shards
        self.together: Together | None = None
        """Exchange with the other stages of the layer, where it spans several and they step together."""
        apart = autoencoder is not None and autoencoder is not associated
        sides = {side: split(layers, side, selection, targets_apart=apart) for side in SIDES}
        # Groups and instances split the weights of a side (as MuonAdamW does); clipping depends on the layers alone.
        self._clipped = {side: [trained_masters(layer, side, selection) for _, layer in layers] for side in SIDES}
        self._of_layer = {index: trained_parameters(layer, selection) for index, layer in layers}
        self._weights = [parameter for parameters in self._of_layer.values() for parameter in parameters]
        self._rounded = [parameter for parameter in self._weights if stepped(parameter) is not parameter]
        self._watch = _Watch(layers, self._weights)
        self.parts: dict[str, torch.optim.Optimizer | None]
        """The instances by role: ``associated`` and ``autoencoder``, or ``optimizer`` for one that steps both."""
        if isinstance(associated, torch.optim.Optimizer):
            self.parts = {"optimizer" if autoencoder is None else "associated": _on_masters(associated)}
        else:
            self.parts = {"associated": _made(associated, sides["associated"])}
        if autoencoder is not None:
            self.parts["autoencoder"] = _made(autoencoder, sides["autoencoder"])
        instances = [part for part in self.parts.values() if part is not None]
        self.defaults = _shared_defaults(instances or [_of_nothing(associated)])
        self.elsewhere = frozenset(stepped(p) for p in self._weights if shards is not None and not shards.owns(p))
        """Optimized tensors that another replica of the stage steps."""
        for part in instances:
            for parameter in self.elsewhere:  # some optimizers create the state of all parameters at once
                part.state.pop(parameter, None)
        self._link()

    def become(self, other: LocalOptimizer) -> None:
        """Takes over layers, groups and instances of another one, so that what refers to this one steps those."""
        vars(self).update(vars(other))

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
            gradients = [master.grad for master in masters if master.grad is not None]
            if not scale.admits(gradients, agree=None if self.together is None else self.together.finite):
                _drop_gradients(masters)
        if self.clip > 0:  # [2]
            for side, layers in self._clipped.items():
                together = self.together if side == "associated" else None  # one stage alone has g and h
                for parameters in layers:
                    _clip(parameters, self.clip, together)
        _drop_gradients(self.elsewhere)  # [3]
        for part in self.parts.values():  # [4]
            if part is not None:
                _step(part)
        self.round_masters()  # [5]
        if self.shards is not None:  # [6]
            self.shards.share()

    @property
    def skipped(self) -> dict[int, int]:
        """Number of skipped steps by layer index, of layers that check their gradients."""
        return {index: scale.skipped for index, scale in self.scales.items()}

    @torch.no_grad()
    def round_masters(self) -> None:
        """Sets the weights to their rounded masters, if this replica of the stage owns them."""
        masters = {p: master for p in self._rounded if (master := master_here(p)) is not None}
        if masters:
            torch._foreach_copy_([parameter.detach() for parameter in masters], list(masters.values()))

    def refresh_fp32_params(self) -> None:
        """Sets the masters to weights that were changed other than by a step, see
        :func:`~ds_al.optim.masters.refresh`."""
        refresh(self._rounded)

    def gather(self) -> tuple[dict[Tensor, dict[str, Any]], dict[nn.Parameter, Tensor]]:
        """Returns the state of this stage by optimized tensor, and its masters by weight.

        With ZeRO-1 this is a collective that gathers the state of all replicas of the stage: all must call it.
        """
        self.refresh_fp32_params()
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

    def check_weights(self) -> None:
        """Checks that no weight of the layers was unfrozen or added since the start, which nothing would step.

        A weight that is frozen now, or was in between, is no error: it is left as it is while it is frozen.

        Raises:
            ALConfigError: a weight requires a gradient, and no optimizer has it.
        """
        self._watch.check()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Is refused: groups are those of the layers at the start.

        Raises:
            ALConfigError: always.
        """
        raise ALConfigError(
            "add_param_group: the groups of a stage are fixed by ds_al.initialize. Pass model_parameters to it, or "
            "start with the weight trained and freeze it by requires_grad_(False) until it is to learn"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters, those that no optimizer steps included."""
        _drop_gradients(self._watch.left_out)
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


class _Watch:
    """Weights of the layers that no optimizer steps: frozen ones, and those outside of the user's selection."""

    def __init__(self, layers: Layers, trained: Iterable[nn.Parameter]) -> None:
        self._layers = layers
        stepped_here = set(trained)
        asking = dict.fromkeys(p for _, layer in layers for p in layer.parameters() if p.requires_grad)
        self.left_out = [parameter for parameter in asking if parameter not in stepped_here]
        """Weights outside of the selection, which get gradients all the same."""
        self._known = stepped_here.union(asking)
        self._look()

    def _look(self) -> None:
        self._frozen = [p for _, layer in self._layers for p in layer.parameters() if p not in self._known]
        parts = [part for _, layer in self._layers for part in layer.modules()]
        self._dicts = [d for part in parts for d in (part._parameters, part._modules)]
        self._held = self._ids()

    def _ids(self) -> list[int]:
        return [id(each) for d in self._dicts for each in d.values()]  # a tenth of the time of parameters()

    def check(self) -> None:
        """Raises :class:`~ds_al.errors.ALConfigError` for a weight that requires a gradient since the start."""
        if not any(parameter.requires_grad for parameter in self._frozen) and self._ids() == self._held:
            return
        for index, layer in self._layers:
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad and parameter not in self._known:
                    raise ALConfigError(
                        f"AL layer {index}, {name}: it requires a gradient since ds_al.initialize, and no optimizer "
                        "steps it. Let it require one before initialize, and freeze it by requires_grad_(False) "
                        "afterwards until it is to learn"
                    )
        self._look()


def _made(factory: Factory, groups: ParamGroups) -> torch.optim.Optimizer | None:
    return accepted(factory(groups), asked=groups) if groups else None


def _on_masters(instance: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets an instance step the masters of its weights, where they have any."""
    instance.param_groups[:] = [group for group in instance.param_groups if group["params"]]
    for group in instance.param_groups:
        group["params"] = [stepped(parameter) for parameter in group["params"]]
    moved: dict[Tensor, Any] = {stepped(parameter): values for parameter, values in instance.state.items()}  # type: ignore[arg-type]
    instance.state = defaultdict(dict, moved)
    return instance


def _of_nothing(associated: Factory | torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns what a stage without trained weights would step by, for its options."""
    if isinstance(associated, torch.optim.Optimizer):
        return associated
    return associated([{"params": [nn.Parameter(torch.zeros(1))]}])


def _shared_defaults(instances: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Returns the options that all instances have: schedules look there for what they may cycle."""
    defaults = instances[0].defaults
    return {key: value for key, value in defaults.items() if all(key in each.defaults for each in instances)}


def _step(part: torch.optim.Optimizer) -> None:
    """Steps one instance.

    The fused SGD of torch takes momentum buffers of all weights or of none: weights that get their first gradient later
    than others (experts) are stepped apart, which changes no number.
    """
    late = {
        weight
        for group in part.param_groups
        if group.get("fused") and group.get("momentum")
        for weight in group["params"]
        if weight.grad is not None and part.state[weight].get("momentum_buffer") is None
    }
    weights = [weight for group in part.param_groups for weight in group["params"]] if late else []
    others = {weight: weight.grad for weight in weights if weight not in late and weight.grad is not None}
    if others:
        _drop_gradients(others)
        part.step()
        _drop_gradients(late)
        for weight, gradient in others.items():
            weight.grad = gradient
    part.step()


def _clip(parameters: list[nn.Parameter], maximum: float, together: Together | None) -> None:
    """Clips gradients to a norm, which with ``together`` is that of the gradients of all stages of the layer.

    A norm is computed as ``clip_grad_norm_`` does, from the norms of the single gradients in their order.
    """
    if together is None:
        if parameters:
            nn.utils.clip_grad_norm_(parameters, maximum)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    own = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(0)
    total = torch.linalg.vector_norm(together.norms(own))
    if gradients:
        torch._foreach_mul_(gradients, torch.clamp(maximum / (total + 1e-6), max=1.0))


def _drop_gradients(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _own_state(part: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state dict of one instance, without the other's entries in the shared ``state``."""
    own = {p for group in part.param_groups for p in group["params"]}
    shared = part.state
    part.state = defaultdict(dict, {p: s for p, s in shared.items() if p in own})
    try:
        return part.state_dict()
    finally:
        part.state = shared
