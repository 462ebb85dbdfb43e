"""Forms of a run: which methods they are for, and the keys that each refuses."""

from __future__ import annotations

from typing import Any

import pytest

from ds_al.config.associated_learning import ALConfig
from ds_al.config.methods import AL_METHODS, BACKPROP_METHODS
from ds_al.errors import ALConfigError
from ds_al.experiment.config import ExperimentConfig, check_partition
from ds_al.experiment.forms import AssociatedLearning, BackpropPipeline, BackpropReplicas, form_of


def experiment(**keys: Any) -> ExperimentConfig:
    block = {"name": "n", "model": {"name": "mlp"}, "data": {"name": "fashion-mnist-small"}, "epochs": 1, **keys}
    return ExperimentConfig.model_validate(block)


def config(**keys: Any) -> ALConfig:
    return ALConfig.model_validate(keys)


def test_every_method_has_a_form() -> None:
    assert {type(form_of(config(method=method))) for method in AL_METHODS} == {AssociatedLearning}
    forms = {method: type(form_of(config(method=method))) for method in BACKPROP_METHODS}
    assert forms.pop("bp_dp") is forms.pop("bp_async") is BackpropReplicas and set(forms.values()) == {BackpropPipeline}


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("streaming", {"label_smoothing": 0.1}, r'label_smoothing" is for bp_\* methods: got streaming'),
        ("bp_1f1b", {"partition_method": "measured"}, "got 'measured', which is for AL methods: a bp_1f1b run"),
        ("bp_dp", {"partition_method": "cuts:2"}, "got 'cuts:2', which is for AL methods: a bp_dp run"),
    ],
)
def test_a_form_refuses_the_keys_of_others(method: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ALConfigError, match=message):
        form_of(config(method=method)).check(experiment(**keys))


def test_dualpipev_needs_a_micro_batch_per_part_of_the_network() -> None:
    form_of(config(method="bp_zb_h1")).check_batch(1, stages=4)
    form_of(config(method="bp_dualpipev")).check_batch(8, stages=4)
    with pytest.raises(ALConfigError, match="got 7 for 4 stages of bp_dualpipev: expected at least 8"):
        form_of(config(method="bp_dualpipev")).check_batch(7, stages=4)


@pytest.mark.parametrize("keys", [{"partition_memory": 1.0}, {"partition_cache": "off"}], ids=str)
def test_options_of_a_measured_partition_are_refused_for_others(keys: dict[str, Any]) -> None:
    check_partition(experiment(partition_method="measured", **keys))
    with pytest.raises(ALConfigError, match=r"with partition_method 'uniform': it is for \"measured\", leave it out"):
        check_partition(experiment(**keys))


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, 1),
        ({"count": "step"}, 4),
        ({"count": "step", "steps_per_batch": 2}, 2),
        ({"method": "bp_1f1b"}, 1),
    ],
    ids=str,
)
def test_the_learning_rate_schedule_counts_batches_or_steps(keys: dict[str, Any], steps: int) -> None:
    assert form_of(config(**keys)).schedule_steps(4) == steps
