"""Description of an AL network built from a model of ``transformers``, as JSON, from which it can be rebuilt.

Checkpoints contain it, so that one process can export them without the training script. Only the parts needed for the
scores can be rebuilt: user-defined bridges before the last layer are omitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ds_al.convert import adapters
from ds_al.errors import ALCheckpointError

if TYPE_CHECKING:
    from ds_al.convert.source import Source
    from ds_al.spec import ALLayerSpec


def describe(
    model_class: type,
    config: Any,
    generation: Any,
    *,
    task: str,
    groups: Sequence[int],
    objective: Any,
    code_width: int | None,
    code: str,
    bridge_blocks: int,
    classifier_pooling: str | None,
    own_bridges: Sequence[int],
    adapter: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns the description of a network.

    Args:
        model_class, config, generation: class, config and generation config of the model.
        groups: number of blocks of each AL layer.
        own_bridges: AL layers whose b is user-defined.
        adapter: result of :func:`ds_al.convert.adapters.described`.
        task, objective, code_width, code, bridge_blocks, classifier_pooling: arguments of
            :func:`ds_al.from_pretrained`.
    """
    return {
        "model_class": model_class.__name__,
        "config": _as_json(config),
        "generation": None if generation is None else _as_json(generation),
        "task": task,
        "groups": list(groups),
        "objective": dict(objective) if isinstance(objective, Mapping) else _name_of(objective),
        "code_width": code_width,
        "code": code,
        "bridge_blocks": bridge_blocks,
        "classifier_pooling": classifier_pooling,
        "own_bridges": list(own_bridges),
        "adapter": adapter,
    }


def made_again(description: Mapping[str, Any]) -> tuple[list[ALLayerSpec], Source]:
    """Rebuilds the specs of the AL layers of a description, with new weights, and their source.

    Raises:
        ALCheckpointError: the installed ``transformers`` does not have the model, or the last bridge or the objective
            is user-defined.
    """
    import transformers

    from ds_al.convert.hugging_face import layer_specs

    if description["objective"] is None:
        raise ALCheckpointError(f"its objective is one of your own. {_REMEDY}")
    if len(description["groups"]) - 1 in description["own_bridges"]:
        raise ALCheckpointError(f"the bridge of its last AL layer is one of your own. {_REMEDY}")
    model_class = getattr(transformers, description["model_class"], None)
    if model_class is None:
        raise ALCheckpointError(
            f"it was made of a {description['model_class']}, which transformers {transformers.__version__} has not. "
            f"{_REMEDY}"
        )
    config = model_class.config_class.from_dict(dict(description["config"]))
    model = model_class(config)
    if description["generation"] is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(dict(description["generation"]))
    if description.get("adapter"):
        adapters.added(model, description["adapter"])
    options = {key: description[key] for key in ("task", "groups", "objective", "code_width", "code", "bridge_blocks")}
    # Checkpoints before this option have no key of it.
    return layer_specs(model, **options, classifier_pooling=description.get("classifier_pooling"))


_REMEDY = "Make the module as the job did, and give it: ds_al.export(module, path, weights=checkpoint)"


def _as_json(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _name_of(objective: Any) -> str | None:
    return objective if isinstance(objective, str) else None
