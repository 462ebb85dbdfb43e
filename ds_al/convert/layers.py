"""``ds_al.from_layers``: AL layers from the layer list of a ``PipelineModule``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from ds_al.convert.assemble import al_layers
from ds_al.convert.counts import check_counts
from ds_al.convert.group import Group, HeadBody, head_scores
from ds_al.convert.head import Head, last_linear, without
from ds_al.convert.probe import Found, probe
from ds_al.errors import ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.objectives import DEFAULT
from ds_al.partition.plan import balance
from ds_al.spec import ALLayerSpec, Part
from ds_al.tensors import Activation, first


def from_layers(
    layers: Sequence[Any],
    *,
    num_classes: int,
    example: Activation,
    num_al_layers: int = 4,
    groups: Sequence[int] | None = None,
    head: int | None = None,
    objective: str | Mapping[str, Any] = DEFAULT,
    code_width: int | None = None,
    code: str = "tanh",
    bridges: Sequence[Part | None] | None = None,
    base_seed: int = 1234,
    **options: Any,
) -> ALPipelineModule:
    """Builds an AL network from the layer list of a plain ``PipelineModule``.

    Consecutive layers become the f of one AL layer. The classifier at the end becomes the last layer's bridge; all
    other bridges are built for the output shapes of the groups, and g and h for the number of classes. Modules are used
    as they are and trained in place; a ``LayerSpec`` is built on its own stage, with the weights of
    ``PipelineModule(layers, seed_layers=True, base_seed=base_seed)``.

    Args:
        layers: ``LayerSpec``, ``TiedLayerSpec``, modules and functions.
        num_classes: V.
        example: a micro-batch ``x``, from which the shapes of activations are inferred; 2 samples suffice. With
            ``partition_method="measured"``, a micro-batch of the training size.
        num_al_layers: K, the number of groups, which are balanced by their parameters.
        groups: number of layers of each group, instead of ``num_al_layers``.
        head: number of layers at the end that are the classifier; by default detected by its last ``nn.Linear(..., V)``
            and the pooling, flattening and normalization before it. 0 if the list has no classifier.
        objective: objective that trains f and b, see :mod:`ds_al.objectives`; by default ``"greedy"``.
            The published one is ``"mse"``.
        code_width, code: see :mod:`ds_al.models.targets`; by default K is about V, at least 64.
        bridges: b of each AL layer, ``None`` to choose it automatically, see :mod:`ds_al.convert.bridges`.
        base_seed: see above.
        options: all other arguments of :class:`~ds_al.module.ALPipelineModule`.

    Example:
        >>> layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
        >>> x = torch.randn(2, 8)
        >>> network = ds_al.from_layers(layers, num_al_layers=2, num_classes=3, example=x)
        >>> network(x).shape
        torch.Size([2, 3])

    Raises:
        ALConfigError: the list cannot be grouped in this way, the classifier is not found, tied layers are in two
            groups, or no bridge is known for an activation.
    """
    specs = layer_specs(
        layers,
        num_classes=num_classes,
        example=example,
        num_al_layers=num_al_layers,
        groups=groups,
        head=head,
        objective=objective,
        code_width=code_width,
        code=code,
        bridges=bridges,
        base_seed=base_seed,
    )
    return ALPipelineModule(specs, num_classes=num_classes, base_seed=base_seed, example=example, **options)


def layer_specs(
    layers: Sequence[Any],
    *,
    num_classes: int,
    example: Activation,
    num_al_layers: int = 4,
    groups: Sequence[int] | None = None,
    head: int | None = None,
    objective: str | Mapping[str, Any] = DEFAULT,
    code_width: int | None = None,
    code: str = "tanh",
    bridges: Sequence[Part | None] | None = None,
    base_seed: int = 1234,
) -> list[ALLayerSpec]:
    """Returns the AL layers of a ``PipelineModule``'s layers; arguments and errors as in :func:`from_layers`."""
    layers = list(layers)
    if not layers:
        raise ALConfigError("got an empty layer list: expected the layers that PipelineModule gets")
    check_counts(num_al_layers=num_al_layers, groups=groups, code_width=code_width)
    found = probe(layers, example)
    stop = len(layers) - (_recognise(found, num_classes) if head is None else _named(head, found, num_classes))
    blocks = found[:stop]
    sizes = _balanced(blocks, num_al_layers) if groups is None else _given(groups, stop)
    bounds = [0, *accumulate(sizes)]
    _refuse_tied(layers, bounds)
    return al_layers(
        [_part(layers[a:b], a, base_seed) for a, b in pairwise(bounds)],
        [found[b - 1].output for b in bounds[1:]],
        None if stop == len(layers) else _head(layers, stop, found, num_classes=num_classes, base_seed=base_seed),
        num_classes=num_classes,
        objective=objective,
        code_width=code_width,
        code=code,
        bridges=bridges,
    )


def _part(run: Sequence[Any], start: int, base_seed: int) -> Part:
    """Returns f of one AL layer. Modules are used as they are; specifications are built on their own stage."""
    if all(isinstance(layer, nn.Module) for layer in run):
        return run[0] if len(run) == 1 else nn.Sequential(*run)
    return LayerSpec(Group, list(run), start=start, base_seed=base_seed)


def _head(layers: Sequence[Any], start: int, found: Sequence[Found], *, num_classes: int, base_seed: int) -> Head:
    linear = _linear(found[start:], num_classes)
    run, width, bias = list(layers[start:]), linear.in_features, linear.bias is not None
    if all(isinstance(layer, nn.Module) for layer in run):
        whole = nn.Sequential(*run)
        path = last_linear(whole, num_classes)
        assert path is not None
        return Head(without(whole, path), whole.get_submodule(path), width, bias)
    options = {"start": start, "base_seed": base_seed, "num_classes": num_classes}
    return Head(LayerSpec(HeadBody, run, **options), partial(head_scores, run, **options), width, bias)


def _linear(found: Sequence[Found], num_classes: int) -> nn.Linear:
    whole = nn.Sequential(*(each.module for each in found))
    path = last_linear(whole, num_classes)
    assert path is not None
    linear = whole.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _recognise(found: Sequence[Found], num_classes: int) -> int:
    """Returns the number of layers of the classifier: the last linear layer and the pooling before it.

    Raises:
        ALConfigError: the last layer does not end with a linear layer of V outputs.
    """
    if last_linear(found[-1].module, num_classes) is None or first(found[-1].output).shape[-1] != num_classes:
        raise ALConfigError(
            f"the last layer is a {type(found[-1].module).__name__} that returns "
            f"{tuple(first(found[-1].output).shape)}: expected one that ends with nn.Linear(..., {num_classes}), "
            f"num_classes={num_classes}. Say how many layers at the end are the classifier, head=n; head=0 where the "
            "list has none"
        )
    start = last = len(found) - 1
    while start > 0 and _may_pool(found[start - 1].module):
        start -= 1
    while start < last and not _sums_up(found, start):
        start += 1
    return len(found) - max(start, 1)


def _may_pool(module: nn.Module) -> bool:
    """Returns whether a module has no weights, or is a norm over single samples."""
    has_weights = any(True for _ in module.parameters())
    return not has_weights or isinstance(module, (nn.LayerNorm, nn.RMSNorm) if hasattr(nn, "RMSNorm") else nn.LayerNorm)


def _sums_up(found: Sequence[Found], index: int) -> bool:
    """Returns whether a layer without weights belongs to the classifier: it pools, flattens, normalizes or drops
    out."""
    module = found[index].module
    if any(True for _ in module.parameters()) or isinstance(module, nn.Dropout):
        return True
    return first(found[index].output).shape != first(found[index - 1].output).shape


def _named(head: int, found: Sequence[Found], num_classes: int) -> int:
    if not 0 <= head < len(found):
        raise ALConfigError(f"got head={head} for {len(found)} layers: expected 0..{len(found) - 1}")
    if head and last_linear(nn.Sequential(*(each.module for each in found[-head:])), num_classes) is None:
        raise ALConfigError(
            f"the last {head} layers do not end with nn.Linear(..., {num_classes}): expected the classifier of "
            f"num_classes={num_classes}; head=0 gives the last layer a bridge of its own"
        )
    return head


def _balanced(blocks: Sequence[Found], num_al_layers: int) -> list[int]:
    """Returns the sizes of K groups, minimizing the largest; a layer without parameters joins the layer before it."""
    starts = [i for i, block in enumerate(blocks) if block.parameters] or [0]
    starts[0] = 0
    if not 1 <= num_al_layers <= len(starts):
        raise ALConfigError(
            f"got num_al_layers={num_al_layers}: expected 1..{len(starts)}, the number of layers with weights before "
            "the classifier"
        )
    bounds = [*starts, len(blocks)]
    weights = [float(sum(block.parameters for block in blocks[a:b])) for a, b in pairwise(bounds)]
    cuts = balance([weights] * num_al_layers)
    return [bounds[b] - bounds[a] for a, b in pairwise(cuts)]


def _given(groups: Sequence[int], blocks: int) -> list[int]:
    if sum(groups) != blocks or any(size < 1 for size in groups):
        raise ALConfigError(
            f"got groups={list(groups)}: expected how many layers each AL layer holds, 1 or more, {blocks} in all "
            "(the classifier at the end is not counted)"
        )
    return list(groups)


def _refuse_tied(layers: Sequence[Any], bounds: Sequence[int]) -> None:
    """Checks that each tied layer is used in one AL layer only.

    Raises:
        ALConfigError: a tied layer is used in two AL layers.
    """
    home: dict[Any, tuple[int, int]] = {}
    for index, layer in enumerate(layers):
        if not isinstance(layer, TiedLayerSpec):
            continue
        group = sum(index >= bound for bound in bounds[1:])
        before, owner = home.setdefault(layer.key, (index, group))
        if owner != group:
            places = [f"AL layer {g}" if g < len(bounds) - 1 else "the classifier" for g in (owner, group)]
            raise ALConfigError(
                f"layers {before} and {index} are tied by the key {layer.key!r}, in {places[0]} and {places[1]}: "
                "each AL layer learns by itself, and tied weights would be averaged at every step. Hold both in one "
                "AL layer by groups=[...], or give each a LayerSpec of its own"
            )
