"""Stages of a layer that step together: clipping by the norm of the whole layer, and one decision on an overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_al
from ds_al.launch.ranks import run_ranks
from tests.group.networks import network
from tests.support import reference
from tests.support.engines import SEED, State, different, engine_config, engine_state, merge

pytestmark = pytest.mark.distributed

BATCHES, MICRO_BATCHES = 3, 4
CLIP = 0.05
LOW = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 40}}}
CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"network": "transformer", "layers": 2, "layer_gradient_clipping": CLIP},
    "zb_h2": {"network": "mlp", "layers": 1, "layer_gradient_clipping": CLIP, "group_schedule": "zb_h2"},
    "experts": {"network": "users", "layers": 2, "layer_gradient_clipping": CLIP, "unused_parameters": "allow"},
    "bf16": {"network": "mlp", "layers": 1, "layer_gradient_clipping": CLIP, "keys": LOW["bf16"]},
    "fp16": {"network": "mlp", "layers": 2, "keys": {**LOW["fp16"]}, "group_schedule": "zb_h1"},
}


def trained() -> dict[str, Any]:
    """Worker: the state by case, and skipped steps of the layers."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        options = dict(case)
        net = network(options.pop("network"), options.pop("layers"))
        module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED)
        config = engine_config(micro_batches=MICRO_BATCHES, steps_per_batch=2, group_step="together", **options)
        try:
            engine, *_ = ds_al.initialize(model=module, config=config)
        except ds_al.ALConfigError as error:  # fp16 is not for every CPU
            found[name] = str(error)
            continue
        batches = iter(net.batches(BATCHES * MICRO_BATCHES))
        for _ in range(BATCHES):
            engine.train_batch(batches)
        engine.flush()
        found[name] = engine_state(engine)
        found[name, "scales"] = {index: scale.state() for index, scale in engine.optimizer.scales.items()}
    return found


def expected(case: dict[str, Any]) -> State:
    net = network(case["network"], case["layers"])
    layers = net.build(SEED)
    optimizers = reference.train(
        layers,
        net.batches(BATCHES * MICRO_BATCHES),
        num_classes=net.classes,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
        base_seed=SEED,
        accumulate=MICRO_BATCHES // 2,
        clip=CLIP,
    )
    return reference.state(layers, optimizers)


def test_stages_that_step_together_leave_the_bits_of_one_process() -> None:
    (alone,) = run_ranks(f"{__name__}:trained", 1)
    ranks = run_ranks(f"{__name__}:trained", 4)
    for name, case in CASES.items():
        if isinstance(alone[name], str):
            assert name == "fp16" and all(rank[name] == alone[name] for rank in ranks)
            continue
        assert different(merge([rank[name] for rank in ranks]), alone[name]) == [], name
        if "keys" not in case:
            assert different(alone[name], expected(case)) == [], name
        for rank in ranks:
            for index, state in rank[name, "scales"].items():
                assert state == alone[name, "scales"][index], (name, index)
                assert name != "fp16" or 0 < state["skipped"] < BATCHES * 2
