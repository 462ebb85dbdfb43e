"""Form of a checkpoint's index: keys, types, and entries that must agree with each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_al.errors import ALCheckpointError

Count = Annotated[int, Field(ge=0)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Form):
    file: str
    bytes: Count
    blake2b: str


class _TensorFile(_File):
    tensors: dict[str, Annotated[tuple[str, list[Count]], Field(strict=False)]]


class _Group(_Form):
    options: dict[str, Any]
    parameters: list[str]
    schedule: dict[str, Any]


class _Optimizer(_Form):
    class_: str = Field(alias="class")
    groups: list[_Group]
    state: dict[str, dict[str, Any]]


class _Schedule(_Form):
    class_: str = Field(alias="class")
    state: dict[str, Any]


class _Layer(_Form):
    layer: Count
    stage: Count
    modules: dict[str, str]
    optimizers: dict[str, _Optimizer]
    left_out: list[str]
    extra: dict[str, Any]
    loss_scale: dict[str, float] | None
    schedule: _Schedule | None
    files: dict[str, _TensorFile]


class _StageFiles(_Form):
    random_states: _TensorFile
    client_state: _File | None = None


class _Stage(_Form):
    stage: Count
    data_position: Count | None
    random: dict[str, Any]
    files: _StageFiles


class _Counters(_Form):
    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    micro_steps: Count
    trained_micro_batches: Count


class _Index(_Form):
    num_layers: Count
    num_stages: Count
    base_seed: int
    micro_batch_size: Count
    step_after: str = "config"
    counters: _Counters
    stages: list[_Stage]
    layers: list[_Layer]


def layer_file(index: int, what: str) -> str:
    """Returns the name of a file of one AL layer."""
    return f"layer_{index:02d}-{what}.safetensors"


def stage_file(index: int, what: str) -> str:
    """Returns the name of a file of one stage."""
    return f"stage_{index:02d}-{what}"


RANDOM, CLIENT = "random_states.safetensors", "client_state.pt"


def check_form(index: Any, path: str) -> None:
    """Checks an index whose hash is right: one that a save has not written may lack or mix up anything.

    Args:
        path: of the index, for errors.

    Raises:
        ALCheckpointError: a key is missing, a value has another type, or entries do not agree.
    """
    try:
        given = _Index.model_validate(index, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise ALCheckpointError(f"{path!r} was not written by a save: {at}: {first['msg']}. {REMEDY}") from None
    problem = next(_disagreements(given), None)
    if problem is not None:
        raise ALCheckpointError(f"{path!r} was not written by a save: {problem}. {REMEDY}")


def _disagreements(index: _Index) -> Iterator[str]:
    if (numbers := [layer.layer for layer in index.layers]) != list(range(index.num_layers)) or not numbers:
        yield f"it lists the AL layers {numbers}, expected all of {index.num_layers}, in their order"
    if (numbers := [stage.stage for stage in index.stages]) != list(range(index.num_stages)) or not numbers:
        yield f"it lists the stages {numbers}, expected all of {index.num_stages}, in their order"
    for layer in index.layers:
        if layer.stage >= index.num_stages:
            yield f"AL layer {layer.layer} is on stage {layer.stage}, expected 0..{index.num_stages - 1}"
        roles = [f"{role}_optim_states" for role in layer.optimizers]
        for what in ("model_states", "training_states", *roles):
            if what not in layer.files:
                yield f"AL layer {layer.layer} has no file of {what}"
        for what, record in layer.files.items():
            if record.file != (expected := layer_file(layer.layer, what)):
                yield f"AL layer {layer.layer} has {what} in {record.file!r}, expected {expected!r}"
    for stage in index.stages:
        files = {RANDOM: stage.files.random_states, CLIENT: stage.files.client_state}
        for what, file in files.items():
            if file is not None and file.file != stage_file(stage.stage, what):
                yield f"stage {stage.stage} has {file.file!r}, expected {stage_file(stage.stage, what)!r}"


REMEDY = "Restore it from a copy, or load another checkpoint by its tag"
