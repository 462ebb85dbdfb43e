"""A key is honoured or refused by name, with what to do instead; none is ignored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.config.associated_learning import ALConfig, al_config
from ds_al.config.base import BLOCK, read_file
from ds_al.config.deepspeed import DEEPSPEED_KEYS, honour, zero_stage
from ds_al.config.precision import Precision
from ds_al.errors import ALConfigError
from ds_al.experiment.config import experiment_config, override
from ds_al.experiment.description import Description

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gradient_clipping": 1.0}, '"gradient_clipping": got 1.0.*layer_gradient_clipping'),
    ({"zero_optimization": {"stage": 2}}, '"zero_optimization": got stage 2.*gradients too.*set stage 1'),
    ({"zero_optimization": {"stage": 3}}, '"zero_optimization": got stage 3.*gradients and weights too.*set stage 1'),
    ({"zero_optimization": {"stage": 4}}, '"zero_optimization": got .*expected {"stage": 1}'),
    ({"zero_optimization": True}, '"zero_optimization": got True.*expected {"stage": 1}'),
    (
        {"zero_optimization": {"stage": 1, "overlap_comm": True}},
        '"zero_optimization.overlap_comm": got True.*remove it',
    ),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {}}}, '"zero_optimization.offload_optimizer"'),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, '"bf16" and "fp16" are both enabled'),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, '"bf16.bf16_optimizer_states": got True.*float32'),
    ({"bf16": {"enable": True}}, "\"bf16.enable\" is not a key.*did you mean 'enabled'"),
    ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "fp16.loss_scale_window.*got 0"),
    ({"fp16": {"enabled": True, "opt_level": "O1"}}, '"fp16.opt_level" is not a key'),
    (
        {"bf16": {"enabled": True}, BLOCK: {"message_dtype": "int8"}},
        'message_dtype": got .int8. with "bf16".*precision of the layers. Remove it',
    ),
    ({"pipeline": {"stages": 2}}, '"pipeline.stages" is not a key.*Only activation_checkpoint_interval'),
    ({"pipeline": {"activation_checkpoint_interval": -1}}, "activation_checkpoint_interval.*got -1.*0 for off"),
    ({"pipeline": 2}, '"pipeline": got 2'),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True, "profile": False}},
        '"activation_checkpointing": got cpu_checkpointing[.] .*remove the block.*activation_checkpoint_interval',
    ),
    ({BLOCK: {"compile": {"functions": ["r"]}}}, "compile.functions.*got 'r'"),
    ({BLOCK: {"compile": {"backend": "eager", "options": {"debug": True}}}}, "compile.*options are inductor's"),
    ({BLOCK: {"compile": {"options": {"fallback_random": False}}}}, "compile.*fallback_random must be true"),
    ({"torch_autocast": {"enabled": True}}, '"torch_autocast" is not supported.*use "bf16"'),
    ({"flops_profiler": {"enabled": True}}, '"flops_profiler"'),
    ({"checkpoint": {"use_node_local_storage": True}}, '"checkpoint.use_node_local_storage".*that all ranks see'),
    ({"checkpoint": 3}, '"checkpoint": got 3, expected an object'),
    ({"curriculum_learning": {"enabled": True}}, '"curriculum_learning"'),
    # It was listed as honoured, while messages between stages passed it by.
    ({"comms_logger": {"enabled": True}}, '"comms_logger" is not supported.*do not pass.*associated_learning.trace'),
    ({"compile": {"deepcompile": True}}, '"compile": got deepcompile.*DeepCompile.*remove the block'),
    ({"optimiser": {}}, "\"optimiser\" is not a key.*did you mean 'optimizer'"),
    ({"something": 1}, '"something" is not a key'),
    ({BLOCK: {"steps_per_batch": 3}}, "steps_per_batch.*got 3.*does not divide.*= 4"),
]


@pytest.mark.parametrize(
    ("extra", "message"), REFUSED, ids=[next(iter(extra)) + str(i) for i, (extra, _) in enumerate(REFUSED)]
)
def test_what_cannot_be_honoured_is_refused_by_name(extra: dict[str, Any], message: str) -> None:
    config = {**BASE, **extra}
    with pytest.raises(ALConfigError, match=re.compile(message, re.DOTALL)):
        honour(config, al_config(config))


@pytest.mark.parametrize(
    "off",
    [
        {"activation_checkpointing": {"profile": False}},
        {"compile": {}},
        {"pipeline": {}},
        {"fp16": {"enabled": False}},
        {"fp16": {}},
        {"bf16": {"bf16_optimizer_states": False}, "fp16": {"fp16_master_weights_and_grads": False}},
        {"zero_optimization": {"stage": 0}},
        {"gradient_clipping": 0.0},
    ],
)
def test_what_is_turned_off_passes(off: dict[str, Any]) -> None:
    assert honour({**BASE, **off}, ALConfig())["gradient_clipping"] == 0.0


def test_precision_and_zero_are_done_here_and_deepspeed_is_not_told() -> None:
    config = {**BASE, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    assert set(honour(config, ALConfig())) == {*BASE, "gradient_clipping"}
    assert zero_stage(config) == 1 and Precision.of(config).dtype is torch.bfloat16
    assert Precision.of({"bfloat16": {"enabled": True}}).dtype is torch.bfloat16
    assert zero_stage(BASE) == 0 and not Precision.of(BASE).is_low


def test_clipping_is_off_where_deepspeed_would_turn_it_on() -> None:
    assert honour(BASE, ALConfig())["gradient_clipping"] == 0.0


def test_honoured_keys_reach_deepspeed() -> None:
    config = {**BASE, "optimizer": {"type": "Adam"}, "wandb": {"enabled": False}, BLOCK: {}}
    passed = honour(config, al_config(config))
    assert BLOCK not in passed and passed["optimizer"] == {"type": "Adam"} and passed["wandb"] == {"enabled": False}
    assert set(passed) - {"gradient_clipping"} <= set(DEEPSPEED_KEYS)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"queue_deph": 2}, ["associated_learning.queue_deph", "did you mean 'queue_depth'"]),
        ({"methd": "streaming"}, ["did you mean 'method'"]),
        ({"method": "streamin"}, ["associated_learning.method", "'streamin'", "streaming"]),
        ({"queue_depth": 0}, ["associated_learning.queue_depth", "got 0", "greater than or equal to 1"]),
        ({"layer_gradient_clipping": -1}, ["layer_gradient_clipping", "got -1"]),
        ({"autoencoder_optimizer": {"typ": "SGD"}}, ["autoencoder_optimizer"]),
        ({"checkpoint": {"keep_last": 0}}, ["associated_learning.checkpoint.keep_last", "got 0"]),
        ({"checkpoint": {"async": True}}, ["associated_learning.checkpoint.async", "did you mean"]),
        (3, ['"associated_learning" is a int', "expected an object"]),
    ],
)
def test_a_bad_block_says_what_came_and_what_is_valid(block: Any, words: list[str]) -> None:
    with pytest.raises(ALConfigError) as caught:
        al_config({BLOCK: block})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("steps_per_batch", 2, ["got 2", "one step per batch", "expected null or 1"]),
        ("layer_gradient_clipping", 0.5, ["got 0.5", '"gradient_clipping"', "expected 0.0"]),
        ("autoencoder_optimizer", {"type": "SGD", "params": {"lr": 0.1}}, ["neither g nor h"]),
        ("compile", {}, ["uncompiled"]),
        ("copy_inputs", True, ["expected false"]),
        ("message_dtype", "int8", ["DeepSpeed's own", 'expected "fp32"']),
    ],
)
def test_what_local_learning_alone_can_do_is_refused_with_back_propagation(
    key: str, value: Any, words: list[str]
) -> None:
    """Clipping, steps and compilation were left out of the twin without a word, which made the comparison unfair."""
    al_config({BLOCK: {"method": "streaming", key: value}})
    with pytest.raises(ALConfigError, match=rf"associated_learning\.{key}") as caught:
        al_config({BLOCK: {"method": "bp_1f1b", key: value}})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    al_config({BLOCK: {"method": "bp_1f1b", "steps_per_batch": 1}})


def test_defaults() -> None:
    al = al_config({})
    assert (al.method, al.queue_depth, al.steps_per_batch, al.count) == ("streaming", 2, None, "batch")


def test_reading_a_file(tmp_path: Path) -> None:
    with pytest.raises(ALConfigError, match="does not exist"):
        read_file(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": 1,}')
    with pytest.raises(ALConfigError, match=r"bad\.json' is not valid JSON: .*line 1"):
        read_file(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ALConfigError, match="holds a list: expected an object"):
        read_file(tmp_path / "list.json")


def test_override_sets_json_values_and_strings() -> None:
    config = override({"a": {"b": 1}}, ["a.b=2", "a.c=text", "d.e=[1, 2]"])
    assert config == {"a": {"b": 2, "c": "text"}, "d": {"e": [1, 2]}}
    with pytest.raises(ALConfigError, match=r"expected key\.path=value"):
        override({}, ["a.b"])
    with pytest.raises(ALConfigError, match="is no object"):
        override({"a": 1}, ["a.b=2"])


def test_a_missing_experiment_block_is_named() -> None:
    with pytest.raises(ALConfigError, match='no "experiment" block'):
        experiment_config(BASE)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json")), ids=lambda p: p.stem
)
def test_the_configs_in_the_repository_are_valid(path: Path) -> None:
    config = read_file(path)
    experiment = experiment_config(config)
    assert path.stem == experiment.name
    assert Description.of(config).layout.stages == 1
