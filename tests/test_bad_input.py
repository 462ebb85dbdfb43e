"""Bad input ends with one clear message (got, expected, remedy) and an exit code that is not 0; it never hangs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn

import ds_al
from ds_al.launch.ranks import RankFailure, run_ranks
from tests.support.engines import MICRO_BATCHES, SEED, different, engine_config, engine_state, make_engine
from tests.support.networks import NETWORKS, mlp_layers

pytestmark = pytest.mark.distributed


def spoiled(spoil: Callable[[Any, Any], Any]) -> None:
    """Trains on good micro-batches, of which the sixth is spoiled."""
    batches = NETWORKS["mlp"].batches(2 * MICRO_BATCHES)
    batches[5] = spoil(*batches[5])
    train(iter(batches))


def train(batches: Any) -> None:
    engine = make_engine("mlp")
    for _ in range(2):
        engine.train_batch(batches)
    engine.flush()


def with_nan(x: torch.Tensor, y: torch.Tensor) -> Any:
    x[3, 2] = float("nan")
    return x, y


class ReturnsList(nn.Module):
    """What a layer must not return."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]


def wrong_type() -> None:
    module = ds_al.ALPipelineModule(mlp_layers(), num_classes=4, base_seed=SEED)
    for index, layer in module.local_layers:
        if index == 2:
            layer.f = ReturnsList()
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))


def single() -> ds_al.ALLayer:
    """A layer that no two stages can share: its f is one module."""
    return ds_al.ALLayer(nn.Linear(12, 16), nn.Linear(16, 6), nn.Linear(4, 6), nn.Linear(6, 4))


def build(layers: Any = None, **options: Any) -> ds_al.ALPipelineModule:
    return ds_al.ALPipelineModule(layers or mlp_layers(), num_classes=4, **options)


def initialize(config: Any, **options: Any) -> None:
    ds_al.initialize(model=build(), config=config, **options)


def plain_module() -> None:
    import deepspeed

    deepspeed.init_distributed()
    module = PipelineModule([nn.Linear(2, 2), nn.Linear(2, 2)], num_stages=2, loss_fn=nn.MSELoss())
    ds_al.initialize(model=module, config=engine_config())


def endless() -> Any:
    while True:
        yield from NETWORKS["mlp"].batches(1)


def float16_where_there_is_none() -> None:
    get_accelerator().is_fp16_supported = lambda: False  # some CPUs have it
    initialize({**engine_config(), "fp16": {"enabled": True}})


def label_smoothing_of_the_twin() -> None:
    from ds_al.experiment.job import Job

    data = {"name": "fashion-mnist-small"}
    experiment = {"name": "x", "model": {"name": "mlp"}, "data": data, "epochs": 1, "label_smoothing": 0.1}
    Job({**engine_config(), "experiment": experiment})


def inside_autocast() -> None:
    """Its steps changed weights that no forward read, since the context keeps what it has cast."""
    engine = make_engine("mlp")
    with torch.autocast(get_accelerator().device_name(), dtype=torch.bfloat16):
        engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))


CASES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "labels out of range": (
        lambda: spoiled(lambda x, y: (x, y + 3)), "ALDataError", r"got labels from \d to \d: expected 0..3"),
    "negative label": (lambda: spoiled(lambda x, y: (x, y - 1)), "ALDataError", "expected 0..3"),
    "float label": (
        lambda: spoiled(lambda x, y: (x, y.float())), "ALDataError", "got labels of torch.float32: expected integer"),
    "NaN in an input": (lambda: spoiled(with_nan), "ALDataError", "1 values of an input are NaN"),
    "no pair": (lambda: spoiled(lambda x, y: x), "ALDataError", r"expected \(x, labels\)"),
    "no data": (lambda: train(None), "ALDataError", "no data: pass an iterator"),
    "iterator ends": (
        lambda: train(iter(NETWORKS["mlp"].batches(5))), "ALDataError", "the data ran out after 5 micro-batches"),
    "shape changes": (
        lambda: spoiled(lambda x, y: (x[:, :6], y)), "ALDataError", "shape of micro-batches changed.*dynamic_shape"),
    "smaller micro-batch": (
        lambda: spoiled(lambda x, y: (x[:5], y[:5])), "ALDataError", "shape of micro-batches changed"),
    "wrong micro-batch size": (
        lambda: train((x[:5], y[:5]) for x, y in endless()), "ALDataError",
        "got a micro-batch of 5 samples: expected 8"),
    "empty data set": (
        lambda: initialize(engine_config(), training_data=torch.utils.data.TensorDataset(torch.zeros(0, 12))),
        "ALDataError", "empty data set"),
    "layer returns a list": (wrong_type, "ALLayerError", "AL layer 2.*f returned a list; expected a tensor"),
    "more processes than blocks": (
        lambda: build([single()]), "ALConfigError", r"got 2 stages for 1 AL layers of \[1\] blocks"),
    "stages are not processes": (lambda: build(num_stages=3), "ALConfigError", "2 processes for 3 stages"),
    "no layers": (lambda: build([nn.Linear(2, 2)]), "ALConfigError", "layer 0 is Linear.*expected an ALLayerSpec"),
    "tied layers": (
        lambda: build([TiedLayerSpec("k", nn.Linear, 2, 2)]), "ALConfigError", "TiedLayerSpec.*weights of its own"),
    "no config": (lambda: initialize(None), "ALConfigError", "no config: give --deepspeed_config"),
    "missing config": (lambda: initialize("/nowhere.json"), "ALConfigError", "'/nowhere.json' does not exist"),
    "malformed config": (lambda: initialize(__file__), "ALConfigError", "not valid JSON"),
    "unknown key": (
        lambda: initialize(engine_config(queue_deph=2)), "ALConfigError", "did you mean 'queue_depth'"),
    "ZeRO 2": (
        lambda: initialize({**engine_config(), "zero_optimization": {"stage": 2}}), "ALConfigError",
        "zero_optimization.*set stage 1"),
    "fp16": (float16_where_there_is_none, "ALConfigError", "fp16.*train in fp32"),
    "inside autocast": (inside_autocast, "ALConfigError", 'inside torch.autocast.*call it outside.*"bf16"'),
    "global clipping": (
        lambda: initialize({**engine_config(), "gradient_clipping": 1.0}), "ALConfigError", "layer_gradient_clipping"),
    "label smoothing of the twin": (
        label_smoothing_of_the_twin, "ALConfigError",
        'label_smoothing" is for bp_.*: got streaming, give it to its objective'),
    "plain module, AL method": (plain_module, "ALConfigError", "use one of bp_1f1b, bp_gpipe, bp_naive"),
}  # fmt: skip


BEFORE_TRAINING = [
    "more processes than blocks", "stages are not processes", "no layers", "tied layers", "no config", "missing config",
    "malformed config", "unknown key", "ZeRO 2", "fp16", "global clipping", "plain module, AL method",
    "label smoothing of the twin", "inside autocast",
]  # fmt: skip
"""Cases that end on every rank before a message passes, so that they can share a world."""


def bad(name: str) -> None:
    """Worker: one case, alone in its world."""
    CASES[name][0]()


@pytest.mark.parametrize("name", [name for name in CASES if name not in BEFORE_TRAINING])
def test_ends_with_one_clear_message(name: str) -> None:
    _, error, pattern = CASES[name]
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:bad", 2, name=name, timeout=100)
    first = str(caught.value).split("--- rank ")[1]
    line = next((line for line in first.splitlines() if f"ds_al.errors.{error}: " in line), "")
    assert line, str(caught.value)
    assert re.search(pattern, line), line
    assert caught.value.seconds < 60


def refused() -> dict[str, tuple[str, str]]:
    """Worker: what each case before training raises on this rank."""
    found = {}
    for name in BEFORE_TRAINING:
        try:
            bad(name)
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    return found


def test_what_cannot_train_is_refused_on_every_rank() -> None:
    for found in run_ranks(f"{__name__}:refused", 2, timeout=100):
        assert list(found) == BEFORE_TRAINING
        for name, (kind, message) in found.items():
            _, error, pattern = CASES[name]
            assert kind == error and re.search(pattern, message), (name, kind, message)


def after_a_failure(keys: dict[str, Any]) -> bool:
    """Worker: a batch between two others is interrupted in its third micro-batch, before its only step."""
    batches = NETWORKS["mlp"].batches(2 * MICRO_BATCHES)
    engines = [make_engine("mlp", steps_per_batch=1, keys=keys) for _ in range(2)]
    for engine in engines:
        engine.train_batch(iter(batches[:MICRO_BATCHES]))
    with pytest.raises(KeyboardInterrupt):
        engines[1].train_batch(interrupted(batches[:2]))
    engines[0].stage.trained_micro_batches += 2  # dropout is seeded by them
    for engine in engines:
        engine.train_batch(iter(batches[MICRO_BATCHES:]))
    one, two = (engine_state(engine) for engine in engines)
    return different(one, two) == []


def interrupted(batches: Any) -> Any:
    yield from batches
    raise KeyboardInterrupt


@pytest.mark.parametrize("keys", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_a_batch_that_was_interrupted_leaves_no_gradients(keys: dict[str, Any]) -> None:
    """The next batch added its own to them, as after Ctrl-C in a notebook."""
    assert run_ranks(f"{__name__}:after_a_failure", 1, keys=keys) == [True]


def test_the_table_has_no_case_that_passes() -> None:
    """The good batches of this file do train, so it is the bad input that ends the others."""
    run_ranks(f"{__name__}:good", 2, timeout=100)


def good() -> None:
    """Worker: the same, nothing spoiled."""
    spoiled(lambda x, y: (x, y))
    assert os.environ["WORLD_SIZE"] == "2"
