"""Builds the optimizer of a stage from the settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch

from ds_al.config.optimizers import OptimizerConfig
from ds_al.config.settings import Settings
from ds_al.errors import ALConfigError
from ds_al.optim import masters, muon
from ds_al.optim.accepted import accepted
from ds_al.optim.groups import Layers, ParamGroups, Selection, of_targets, trained_parameters
from ds_al.optim.local import Factory, LocalOptimizer
from ds_al.optim.loss_scale import LayerScale
from ds_al.optim.skip import LayerSkip
from ds_al.optim.zero import Shards
from ds_al.parallel.replicas import Replicas


def local_optimizer(
    layers: Layers,
    *,
    settings: Settings,
    replicas: Replicas,
    given: Factory | torch.optim.Optimizer | None,
    by_config: Callable[[OptimizerConfig | None], Factory],
    selection: Selection | None = None,
) -> LocalOptimizer:
    """Builds the optimizer of a stage's layers, and casts the layers to the precision of the settings.

    Args:
        layers: ``(index in the network, layer)``.
        settings: precision, ZeRO stage, clipping and optimizers.
        replicas: data parallel replicas of the stage.
        given: the user's callable of parameter groups, for f and b, and for g and h unless the config has
            ``autoencoder_optimizer``; or the user's instance over weights of the stage.
        by_config: returns a factory for an optimizer block of the config; for ``"optimizer"`` if it gets ``None``.
        selection: the user's ``model_parameters``.

    Raises:
        ALConfigError: an optimizer cannot step these layers, or weights are of a type that is not trained.
    """
    precision, al = settings.precision, settings.al
    if isinstance(given, torch.optim.Optimizer):
        selection = _of_instance(given, layers, selection, own_autoencoder=al.autoencoder_optimizer is not None)
    masters.check_dtypes(layers, low=precision.is_low)
    trained = [parameter for _, layer in layers for parameter in trained_parameters(layer, selection)]
    shards = Shards(trained, replicas) if settings.zero_stage and replicas.count > 1 else None
    scales: Mapping[int, LayerSkip] = {}
    if al.non_finite != "raise":
        scales = {index: LayerSkip(index) for index, _ in layers}
    if precision.is_low:
        for _, layer in layers:
            muon.tag_embeddings(layer)  # masters inherit the tags
        masters.lower(
            (layer for _, layer in layers),
            precision.dtype,
            owned=shards.owns if shards else lambda parameter: True,
            trained=set(trained).__contains__,
        )
        if precision.checks_overflow:
            scales = {index: LayerScale(index, precision) for index, _ in layers}
    associated = (
        by_config(None) if given is None else given if isinstance(given, torch.optim.Optimizer) else _named(given)
    )
    if al.autoencoder_optimizer is not None:
        autoencoder: Factory | None = by_config(al.autoencoder_optimizer)
    else:
        autoencoder = None if isinstance(associated, torch.optim.Optimizer) else associated
    optimizer = LocalOptimizer(
        layers,
        associated=associated,
        autoencoder=autoencoder,
        selection=selection,
        clip=al.layer_gradient_clipping,
        scales=scales,
        shards=shards,
    )
    optimizer.round_masters()
    if selection is not None:
        _tell_left_out(layers, selection)
    return optimizer


def _tell_left_out(layers: Layers, selection: Selection) -> None:
    """Warns of weights that require gradients outside of a selection: bridges are new, and nobody may mean those."""
    names = [
        f"{index}.{name}"
        for index, layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and parameter not in selection.group
    ]
    if names:
        warnings.warn(
            f"{selection.where} lacks {len(names)} weights of this stage that require gradients, which rest: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Bridges and codes (b, g, h) are part of "
            "module.parameters(); requires_grad_(False) says that a weight is meant to rest",
            stacklevel=2,
        )


def _of_instance(
    instance: torch.optim.Optimizer, layers: Layers, given: Selection | None, *, own_autoencoder: bool
) -> Selection:
    """Returns the weights that a user's instance steps; with an optimizer of g and h in the config, theirs, too.

    Raises:
        ALConfigError: the instance cannot step these layers, or another argument contradicts it.
    """
    where = f"optimizer ({type(accepted(instance)).__name__})"
    own = Selection.of(instance.param_groups, layers, where=where)
    if given is not None and (given.has_options or set(given.group) != set(own.group)):
        raise ALConfigError(
            "got model_parameters that differ from the groups of the optimizer instance: leave them out, or give a "
            "callable, which gets them: optimizer=lambda groups: torch.optim.AdamW(groups)"
        )
    if not own_autoencoder:
        return own
    for index, layer in layers:
        for parameter in of_targets(layer):
            if parameter in own.group:
                name = next(name for name, each in layer.named_parameters() if each is parameter)
                raise ALConfigError(
                    f'got an {where} that holds AL layer {index}, {name}, and "associated_learning.'
                    'autoencoder_optimizer" for g and h: give an instance over the weights of f and b alone, or a '
                    "callable of parameter groups, or remove the key"
                )
    decoders = (p for _, layer in layers for p in of_targets(layer))
    return Selection([*own.options, {}], {**dict.fromkeys(decoders, len(own.options)), **own.group}, own.where)


def _named(given: Factory) -> Factory:
    """Lets the errors of a user's callable say what it is called with."""

    def make(groups: ParamGroups) -> torch.optim.Optimizer:
        try:
            return given(groups)
        except Exception as error:
            raise ALConfigError(
                f"the optimizer callable raised {type(error).__name__}: {error}. It is called with a list of parameter "
                "groups, once for f and b and once for g and h: lambda groups: torch.optim.SGD(groups, lr=0.1)"
            ) from error

    return make
