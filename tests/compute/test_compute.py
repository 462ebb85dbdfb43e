"""How a layer computes, recomputed or compiled, changes nothing that it must not change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_al
from ds_al.errors import ALConfigError, ALLayerError
from ds_al.launch.ranks import run_ranks
from tests.support import reference
from tests.support.engines import (
    MICRO_BATCHES,
    SEED,
    State,
    different,
    engine_config,
    engine_state,
    make_engine,
    merge,
)
from tests.support.networks import NETWORKS

pytestmark = pytest.mark.distributed

BATCHES = 2
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on CPU"
)


def trained(cases: list[dict[str, Any]]) -> list[State]:
    """Worker: state of this rank's layers after training, case after case."""
    results = []
    for case in cases:
        case = dict(case)
        net, interval = NETWORKS[case.pop("network")], case.pop("interval", 0)
        layers = net.layers()[: case.pop("layers", None)]
        module = ds_al.ALPipelineModule(layers, num_classes=net.classes, base_seed=SEED)
        config = {**engine_config(**case), "pipeline": {"activation_checkpoint_interval": interval}}
        engine, *_ = ds_al.initialize(model=module, config=config)
        batches = iter(net.batches(BATCHES * MICRO_BATCHES))
        for _ in range(BATCHES):
            engine.train_batch(batches)
        engine.flush()
        results.append(engine_state(engine))
        if "compile" in case:
            with pytest.raises(ALConfigError, match="compiled already"):
                engine.compile()
    return results


def refused() -> None:
    """Worker: what cannot be compiled as promised."""
    net = NETWORKS["mlp"]
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, dynamic_shape=True)
    with pytest.raises(ALConfigError, match=r"compile.* with dynamic_shape"):
        ds_al.initialize(model=module, config=engine_config(compile={}))
    engine = make_engine("mlp")
    with pytest.raises(ALConfigError, match=r"compile\(schedule=\.\.\.\) is not supported"):
        engine.compile(schedule=[(0, [])])
    engine = make_engine("lstm", compile={"backend": "aot_eager"})
    with pytest.raises(ALLayerError, match=r"stage 0, AL layer 1 .LSTMLayer., forward of micro-batch 0"):
        engine.train_batch(iter(NETWORKS["lstm"].batches(MICRO_BATCHES)))


def expected(network: str, layers_of_it: int | None = None, *, fused: bool = True, device: str = "cpu") -> State:
    """The state that the plain loop leaves."""
    net = NETWORKS[network]
    layers = net.build(SEED, device=device)[:layers_of_it]
    optimizers = reference.train(
        layers,
        net.batches(BATCHES * MICRO_BATCHES, device=device),
        num_classes=net.classes,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=fused),
        base_seed=SEED,
    )
    return reference.state(layers, optimizers)


def states(stages: int, cases: list[dict[str, Any]], **options: Any) -> list[State]:
    """The whole network's state, by case."""
    by_rank = run_ranks(f"{__name__}:trained", stages, cases=cases, **options)
    return [merge(list(ranks)) for ranks in zip(*by_rank, strict=True)]


def test_recomputed_and_traced_layers_leave_the_bits_of_the_plain_loop() -> None:
    """``aot_eager`` does all that a compiler does but make code, so it must change nothing."""
    cases = [
        {"network": "mlp", "interval": 1},
        {"network": "mlp", "interval": 2, "method": "parallel_backward"},
        *({"network": network, "interval": 1} for network in ("vgg", "transformer", "lstm")),
        {"network": "mlp", "compile": {"backend": "aot_eager", "functions": ["f", "b", "g", "h"]}},
        {"network": "mlp", "compile": {"backend": "aot_eager"}, "interval": 2},
        {"network": "mlp", "params": {"lr": 3e-3, "torch_adam": True, "fused": False}},
    ]
    for case, state in zip(cases, states(2, cases), strict=True):
        assert different(state, expected(case["network"], fused="params" not in case)) == [], case
    assert different(state, expected("mlp")) != []  # a step that is not fused rounds otherwise


def test_what_cannot_be_compiled_is_refused() -> None:
    run_ranks(f"{__name__}:refused", 1)


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_leave_the_same_bits_on_every_partition(tmp_path: Path) -> None:
    on: dict[str, Any] = {"network": "mlp", "layers": 2, "compile": {}}
    two_stages = [on, {**on, "method": "forward_first", "queue_depth": 1}]
    # Each rank makes its own code: if all took it from one cache, it would be the same without being right.
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    env["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
    (one,) = states(1, [on], env=env)
    for state in states(2, two_stages, env=env):
        assert different(one, state) == []
    plain = expected("mlp", 2)
    assert different(one, plain) != []  # it was compiled,
    for name, value in plain.items():  # and drew the same dropout: a mask of its own would be far off
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-5)
