"""``ds_al.from_pretrained``: AL layers from a model of ``transformers``, with its blocks, weights and head.

task                        x                                             labels
"sequence-classification"   ids (B, T), (ids, mask), (ids, mask, types)   (B,)
"causal-lm"                 ids (B, T), (ids, mask)                       (B, T): the ids, -100 for no loss
"image-classification"      pixels (B, C, H, W)                           (B,)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.convert import adapters
from ds_al.convert.architectures import FAMILIES, GENERATE, Anatomy
from ds_al.convert.assemble import al_layers
from ds_al.convert.bodies import PooledBody
from ds_al.convert.counts import check_counts
from ds_al.convert.description import describe
from ds_al.convert.head import Head
from ds_al.convert.language import language_layers, language_objective
from ds_al.convert.loading import AUTO_CLASSES, load
from ds_al.convert.new_parts import set_samples
from ds_al.convert.plain_model import check_plain
from ds_al.convert.ranges import Groups, block_ranges
from ds_al.convert.source import Source, modules_of, names_of
from ds_al.errors import ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.objectives import DEFAULT
from ds_al.optim.held import mark_pretrained
from ds_al.spec import ALLayerSpec, Part


def from_pretrained(
    model: str | Path | nn.Module,
    *,
    task: str,
    num_al_layers: int = 4,
    groups: Groups = None,
    objective: str | Mapping[str, Any] | None = None,
    code_width: int | None = None,
    code: str = "linear",
    bridges: Sequence[Part | None] | None = None,
    bridge_blocks: int = 0,
    classifier_pooling: str | None = None,
    new_parts_first: int = 0,
    base_seed: int = 1234,
    model_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> ALPipelineModule:
    """Builds an AL network from a model of ``transformers``. Every rank calls it, with the same arguments.

    Each AL layer has a group of the model's own blocks; the first also has the embeddings, the last the final norm and
    the head. The weights are the model's, bit for bit. If embeddings and head are tied, each gets its own copy.

    Args:
        model: name or folder, which is loaded in float32; or a model, whose modules are used and trained in place.
        task: ``"sequence-classification"``, ``"causal-lm"`` or ``"image-classification"``.
        num_al_layers: K; blocks are distributed evenly.
        groups: number of blocks of each AL layer, instead of ``num_al_layers``; or ``"by-work"``: K layers of as even
            work as whole blocks allow, for a model with frozen blocks, which have no backward below all that train.
        objective: objective that trains f and b, see :mod:`ds_al.objectives`. The default is ``"greedy"``,
            which starts from the model's own scores; the published one is ``"mse"``. For a language model it is
            ``"next_token"`` (alias ``"greedy"``), with ``"readout"`` and ``"token_codes"`` as alternatives.
        code_width, code: see :mod:`ds_al.models.targets`. With ``"linear"`` the path from the last code to the scores
            folds into the model's classifier, so :func:`ds_al.export` writes a plain model. Codes of tokens are always
            ``"linear"``.
        bridges: b of each AL layer, ``None`` to choose it automatically, see :mod:`ds_al.convert.bridges`.
        bridge_blocks: number of new blocks of the model's own kind in each bridge before the last; for language models.
        classifier_pooling: ``"mean"`` for a head of classification that reads the mean over the tokens (of ViT, the
            patches) in place of one token, before its pooler, dense layer or norm; ``None`` for what the model's class
            reads. Earlier exits always read the mean. No class of ``transformers`` computes the scores of ``"mean"``,
            so :func:`ds_al.export` then writes the trunk and a program.
        new_parts_first: number of samples on which new parts (bridges, codes, the classifier) train alone, while the
            model's own weights rest; whole batches, rounded up. See :mod:`ds_al.convert.new_parts`.
        base_seed: seed of new weights, of random numbers and of the order of the data.
        model_options: arguments for ``from_pretrained`` of ``transformers``, such as ``{"num_labels": 4}``; for a name
            or folder.
        options: all other arguments of :class:`~ds_al.module.ALPipelineModule`, such as ``dynamic_shape``.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}
        >>> model = ViTForImageClassification(ViTConfig(num_hidden_layers=4, patch_size=8, num_labels=3, **sizes))
        >>> network = ds_al.from_pretrained(model, task="image-classification", num_al_layers=2)
        >>> network.num_layers, network.num_classes
        (2, 3)

    Raises:
        ALConfigError: the task, the kind of model or the objective is not known here, or the blocks do not fit K.
    """
    source = load(model, task=task, base_seed=base_seed, model_options=model_options)
    specs, origin = layer_specs(
        source,
        task=task,
        num_al_layers=num_al_layers,
        groups=groups,
        objective=objective,
        code_width=code_width,
        code=code,
        bridges=bridges,
        bridge_blocks=bridge_blocks,
        classifier_pooling=classifier_pooling,
    )
    module = ALPipelineModule(specs, num_classes=classes(source, task), base_seed=base_seed, **options)
    module.source, module.config = origin, origin.config
    set_samples(module, new_parts_first)
    if not isinstance(model, nn.Module):
        _release(module)
    return module


def layer_specs(
    model: Any,
    *,
    task: str,
    num_al_layers: int = 4,
    groups: Groups = None,
    objective: str | Mapping[str, Any] | None = None,
    code_width: int | None = None,
    code: str = "linear",
    bridges: Sequence[Part | None] | None = None,
    bridge_blocks: int = 0,
    classifier_pooling: str | None = None,
) -> tuple[list[ALLayerSpec], Source]:
    """Returns the AL layers of a model and their source; arguments and errors as in :func:`from_pretrained`."""
    check_counts(num_al_layers=num_al_layers, groups=groups, code_width=code_width, by_work=True)
    anatomy = _pooled(dissect(model, task), model, classifier_pooling)
    ranges = block_ranges(anatomy, num_al_layers=num_al_layers, groups=groups)
    head, embedding = _head(model, anatomy)
    f = _pretrained(anatomy, ranges)
    if classifier_pooling is not None and bridges is not None and bridges[-1] is not None:
        raise ALConfigError(
            f"got classifier_pooling={classifier_pooling!r} and a bridge of your own in the last AL layer, which reads "
            "the tokens in place of the head: leave one of them out"
        )
    trained: Any = language_objective(objective) if task == GENERATE else objective or DEFAULT
    if task == GENERATE:
        specs = language_layers(
            f,
            head,
            vocabulary=classes(model, task),
            objective=trained,
            code_width=code_width,
            private=_private(anatomy, ranges, bridge_blocks),
            bridges=bridges,
            embedding=embedding,
        )
    else:
        if bridge_blocks:
            raise ALConfigError(f"got bridge_blocks={bridge_blocks} for {task!r}: they are for {GENERATE!r}")
        specs = al_layers(
            f,
            [anatomy.activations[which.stop - 1] for which in ranges],
            head,
            num_classes=classes(model, task),
            objective=trained,
            code_width=code_width,
            code=code,
            bridges=bridges,
        )
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    assert isinstance(head.scores, nn.Linear)
    names = names_of(specs, model, head.scores, anatomy.scores)
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    again = describe(
        type(model),
        config,
        generation,
        task=task,
        groups=[len(which) for which in ranges],
        objective=trained,
        code_width=code_width,
        code=code,
        bridge_blocks=bridge_blocks,
        classifier_pooling=classifier_pooling,
        own_bridges=[index for index, own in enumerate(bridges or ()) if own is not None],
        adapter=adapters.described(model),
    )
    return specs, Source(type(model), config, generation, names, anatomy.scores, task, again)


def twin_layers(
    model: Any,
    *,
    task: str,
    num_al_layers: int = 4,
    groups: Groups = None,
    classifier_pooling: str | None = None,
) -> list[Part | LayerSpec]:
    """Returns the same blocks and head for a plain ``PipelineModule``, which computes the model's own scores, or with
    ``classifier_pooling`` those of its head on the mean over the tokens. The head is a layer of its own, after those of
    the blocks."""
    anatomy = _pooled(dissect(model, task), model, classifier_pooling)
    ranges = block_ranges(anatomy, num_al_layers=num_al_layers, groups=groups)
    return [*_pretrained(anatomy, ranges), _head(model, anatomy)[0].twin()]


def dissect(model: Any, task: str) -> Anatomy:
    """Finds the parts of a model.

    Raises:
        ALConfigError: the type of model is not supported, or not for this task.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    family, tasks = FAMILIES.get(kind, (None, ()))
    if family is None or task not in tasks:
        known = sorted(name for name, (_, tasks) in FAMILIES.items() if task in tasks)
        raise ALConfigError(
            f"got a model of type {kind!r} for {task!r}: expected one of {', '.join(known)}. Others can be written as "
            "a list of layers, for ds_al.from_layers"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ALConfigError("got a model with is_decoder or add_cross_attention: its blocks read more than one stream")
    try:
        anatomy = family(model, task)
        model.get_submodule(anatomy.scores)
    except AttributeError as error:
        raise ALConfigError(
            f"got a {type(model).__name__} for {task!r}: expected what {AUTO_CLASSES[task]} loads ({error})"
        ) from None
    check_plain(model, scores=anatomy.scores, classifies=task != GENERATE)
    return anatomy


def _pooled(anatomy: Anatomy, model: Any, pooling: str | None) -> Anatomy:
    """Returns the parts of a model, whose head reads what ``classifier_pooling`` says."""
    if pooling not in (None, "mean"):
        raise ALConfigError(f"got classifier_pooling={pooling!r}: expected 'mean', or None for what the model reads")
    if pooling is None:
        return anatomy
    if not isinstance(anatomy.body, PooledBody):
        raise ALConfigError(
            f"got classifier_pooling={pooling!r} for a {type(model).__name__}: expected a model that classifies by one "
            "of its tokens; leave it out"
        )
    anatomy.body.mean = True
    return anatomy


def classes(model: Any, task: str) -> int:
    """Returns V: the number of labels, or the vocabulary size."""
    return int(model.config.vocab_size if task == GENERATE else model.config.num_labels)


def _release(module: ALPipelineModule) -> None:
    """Moves the weights of other stages to the meta device, for a model that has no other owner."""
    own = {parameter for _, layer in module.local_layers for parameter in layer.parameters()}
    specs = [spec for spec in module.al_layers if isinstance(spec, ALLayerSpec)]
    for part in (each for spec in specs for _, whole in modules_of(spec) for each in whole.modules()):
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in own:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def _private(anatomy: Anatomy, ranges: Sequence[range], count: int) -> list[Part | None]:
    """Returns the private blocks of each bridge, built like the block after the layer; the last layer has none."""
    if not isinstance(count, int) or count < 0:
        raise ALConfigError(f"got bridge_blocks={count!r}: expected how many blocks, 0 or more")
    assert anatomy.private is not None
    return [None if not count or each is ranges[-1] else anatomy.private(count, each.stop) for each in ranges]


def _pretrained(anatomy: Anatomy, ranges: Sequence[range]) -> list[nn.Module]:
    """Returns f of each range; their modules and those of the head but its linear layer are marked as pretrained."""
    f = [anatomy.group(which) for which in ranges]
    for part in (*f, anatomy.body):
        mark_pretrained(part)
    return f


def _head(model: Any, anatomy: Anatomy) -> tuple[Head, Tensor | None]:
    """Returns the head, and the input embedding if the model ties it to the head; the head is then a copy."""
    scores = model.get_submodule(anatomy.scores)
    if not isinstance(scores, nn.Linear):
        raise ALConfigError(f"got a model whose {anatomy.scores} is a {type(scores).__name__}: expected num_labels > 0")
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is scores.weight]
    embedding = scores.weight if len(names) > 1 else None
    if embedding is not None:
        scores = copy.deepcopy(scores)
    return Head(anatomy.body, scores, scores.in_features, scores.bias is not None), embedding
