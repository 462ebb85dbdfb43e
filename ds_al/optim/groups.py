"""Parameter groups of a stage: the trained weights by AL layer and side, with the options that the user gave them.

``model_parameters`` of ``ds_al.initialize`` is a list of weights or of groups, whatever the layers are::

    [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]

A stage splits each group by layer and by side, (f, b) or (g, h), since it clips, steps, saves and loads by layer. Every
part keeps the options of its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.config.optimizers import check_options
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.optim.masters import stepped
from ds_al.spec import ALLayerSpec

ParamGroups = list[dict[str, Any]]
Layers = Sequence[tuple[int, ALLayer]]
"""``(index in the network, layer)`` of a stage."""

SIDES: dict[str, Callable[[ALLayer], Iterable[nn.Parameter]]] = {
    "associated": ALLayer.associated_parameters,
    "autoencoder": ALLayer.autoencoder_parameters,
}
"""The sides of a layer, each trained by one of its losses."""

NO_OPTIONS = ("params", "name", "param_names")
"""Keys of a parameter group that are not options of the optimizer."""


@dataclass(frozen=True)
class Selection:
    """The weights of a stage to train, where the user says which.

    Attributes:
        options: options of each given group.
        group: index of the group of each weight.
        where: the argument of ``ds_al.initialize`` that gave them, for errors.
    """

    options: list[dict[str, Any]]
    group: Mapping[nn.Parameter, int]
    where: str

    @classmethod
    def of(cls, given: Any, layers: Layers, *, elsewhere: Iterable[nn.Parameter] = (), where: str) -> Selection:
        """Reads parameters or parameter groups in any form that torch's optimizers take.

        Args:
            given: weights, ``(name, weight)`` pairs, or groups of them.
            layers: the stage's layers.
            elsewhere: weights of other stages, which this stage leaves out.

        Raises:
            ALConfigError: there are no weights, one of them is not in the network or is given twice, or an option of a
                group is not valid.
        """
        if isinstance(given, (Tensor, str)) or not isinstance(given, Iterable):
            raise ALConfigError(
                f"got {where} of {type(given).__name__}: expected an iterable of weights or of parameter groups"
            )
        entries = list(given)
        if not any(isinstance(entry, Mapping) for entry in entries):
            entries = [{"params": entries}]
        here = {p: name for index, layer in layers for name, p in _named(index, layer)}
        others = set(elsewhere)
        group: dict[nn.Parameter, int] = {}
        seen: set[nn.Parameter] = set()
        for number, entry in enumerate(entries):
            for parameter in _members(entry, number, where):
                if parameter in seen:
                    name = here.get(parameter, "a weight of another stage")
                    raise ALConfigError(f"{where}: {name} is given twice: list every weight once, in one group")
                seen.add(parameter)
                if parameter in here:
                    group[parameter] = number
                elif parameter not in others:
                    raise ALConfigError(
                        f"{where}, group {number}: got a weight of shape {list(parameter.shape)} that is not in this "
                        "network: list those of the module after it is built, module.parameters(), and leave out "
                        "embeddings or heads that it copied"
                    )
        if not seen:
            raise ALConfigError(f"{where} lists no weights: leave it out to train all, or list those to train")
        options = [{key: value for key, value in entry.items() if key != "params"} for entry in entries]
        for number, each in enumerate(options):
            check_options(each, where=f"{where}, group {number}, {{}}")
        return cls(options, group, where)

    @property
    def has_options(self) -> bool:
        """Whether a group has options of its own."""
        return any(key not in NO_OPTIONS for each in self.options for key in each)


def _members(entry: Any, number: int, where: str) -> Iterator[nn.Parameter]:
    if not isinstance(entry, Mapping) or "params" not in entry:
        raise ALConfigError(f'{where}, group {number}: got {_kind(entry)}: expected {{"params": [...], option: value}}')
    params = entry["params"]
    for each in [params] if isinstance(params, Tensor) else params:
        parameter = each[1] if isinstance(each, tuple) and len(each) == 2 else each  # torch takes (name, weight), too
        if not isinstance(parameter, nn.Parameter):
            raise ALConfigError(f"{where}, group {number}: got {_kind(parameter)}: expected parameters of the network")
        yield parameter


def _kind(value: Any) -> str:
    return f"a dict with {', '.join(map(repr, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _named(index: int, layer: ALLayer) -> Iterator[tuple[str, nn.Parameter]]:
    return ((f"AL layer {index}, {name}", parameter) for name, parameter in layer.named_parameters())


def trained_parameters(layer: ALLayer, selection: Selection | None = None) -> list[nn.Parameter]:
    """Returns all trained weights of a layer, each once."""
    return list(dict.fromkeys(p for side in SIDES for p in _of_side(layer, side, selection)))


def trained_masters(layer: ALLayer, side: str, selection: Selection | None = None) -> list[nn.Parameter]:
    """Returns what the optimizer steps of one side of a layer: its trained weights, or their masters."""
    return [stepped(parameter) for parameter in _of_side(layer, side, selection)]


def _of_side(layer: ALLayer, side: str, selection: Selection | None) -> list[nn.Parameter]:
    weights = (p for p in dict.fromkeys(SIDES[side](layer)) if p.requires_grad)  # tied ones once
    return [p for p in weights if selection is None or p in selection.group]


def of_targets(layer: ALLayer) -> list[nn.Parameter]:
    """Returns the weights of g and h, also of an h that the associated loss trains."""
    return list(dict.fromkeys([*layer.autoencoder_parameters(), *layer.g.parameters(), *layer.h.parameters()]))


def split(layers: Layers, side: str, selection: Selection | None = None, *, targets_apart: bool = False) -> ParamGroups:
    """Returns the parameter groups of one side, layer by layer, without empty ones.

    With ``targets_apart`` an h that the associated loss trains is on the other side, with g: the two sides have
    optimizers of their own. A group is named ``layer_02/associated``; a part of a group that the user gave
    ``layer_02/associated/0``, or with the user's own name at the end.
    """
    groups: ParamGroups = []
    for index, layer in layers:
        name, trained = f"layer_{index:02d}/{side}", _of_side(layer, side, selection)
        if targets_apart:
            own = set(of_targets(layer))
            both = trained_parameters(layer, selection)
            trained = [p for p in both if (p in own) == (side == "autoencoder")]
        if selection is None:
            groups.append({"params": trained, "name": name})
            continue
        for number, options in enumerate(selection.options):
            members = [p for p in trained if selection.group[p] == number]
            groups.append({**options, "params": members, "name": f"{name}/{options.get('name', number)}"})
    return [{**group, "params": [stepped(p) for p in group["params"]]} for group in groups if group["params"]]


def given_elsewhere(specs: Iterable[Any], layers: Layers) -> set[nn.Parameter]:
    """Returns the weights of all modules that a layer list holds already, without those of this stage's layers."""
    parts = (part for spec in specs for part in (spec.parts.values() if isinstance(spec, ALLayerSpec) else (spec,)))
    here = {parameter for _, layer in layers for parameter in layer.parameters()}
    return {parameter for part in parts for module in _modules(part) for parameter in module.parameters()} - here


def _modules(part: Any) -> Iterator[nn.Module]:
    """Yields a module, or the modules among the arguments of a ``LayerSpec``."""
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, LayerSpec):
        yield from chain.from_iterable(map(_modules, (*part.module_args, *part.module_kwargs.values())))
    elif isinstance(part, (list, tuple)):
        yield from chain.from_iterable(map(_modules, part))
