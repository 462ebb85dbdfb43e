"""Data parallel replicas of layers that span stages, and ZeRO-1 over them: the bits of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ds_al
from ds_al.launch.ranks import run_ranks
from tests.group.networks import network
from tests.support import reference
from tests.support.collectives import collectives
from tests.support.engines import SEED, State, different, engine_config, engine_state, merge

pytestmark = pytest.mark.distributed

REPLICAS, BATCHES, MICRO_BATCHES = 2, 2, 4
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True, "check_grad_overflow": False}}
CASES: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "zero": {"group_schedule": "zb_h2", "keys": ZERO},
    "bf16": {"group_schedule": "zb_h1", "keys": {**ZERO, **BF16}, "steps_per_batch": 2},
}


def make_engine(stages: int, case: dict[str, Any]) -> ds_al.ALPipelineEngine:
    net = network("transformer", 1)
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED, num_stages=stages)
    config = engine_config(micro_batches=MICRO_BATCHES, **{"steps_per_batch": 1, **case})
    return ds_al.initialize(model=module, config=config)[0]


def train(engine: ds_al.ALPipelineEngine, batches: range) -> None:
    per_batch = MICRO_BATCHES * REPLICAS
    data = network("transformer", 1).batches(BATCHES * per_batch)[batches.start * per_batch : batches.stop * per_batch]
    mine = iter(data[engine.replicas.index :: engine.replicas.count])
    for _ in batches:
        engine.train_batch(mine)


def trained(stages: int, folder: str) -> dict[str, Any]:
    """Worker: the state by case, ranks of the collectives of training, and the state resumed from a checkpoint."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        engine = make_engine(stages, case)
        with collectives() as groups:
            train(engine, range(1))
        found[name, "groups"] = groups
        engine.save_checkpoint(f"{folder}/{stages}/{name}")
        train(engine, range(1, BATCHES))
        found[name] = engine_state(engine)
        found[name, "losses"] = engine.gather_losses()
    engine = make_engine(stages, CASES["zero"])
    engine.load_checkpoint(f"{folder}/2/1f1b")  # saved without ZeRO
    train(engine, range(1, BATCHES))
    found["resumed"] = engine_state(engine)
    found["place"] = engine.replicas.index, engine.stage_id
    return found


def expected() -> State:
    net = network("transformer", 1)
    layers = net.build(SEED)
    optimizers = reference.train(
        layers,
        net.batches(BATCHES * MICRO_BATCHES * REPLICAS),
        num_classes=net.classes,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
        base_seed=SEED,
        accumulate=MICRO_BATCHES,
        replicas=REPLICAS,
    )
    return reference.state(layers, optimizers)


def test_replicas_of_a_group_train_as_one_process_does(tmp_path: Path) -> None:
    """Gradients are summed by replica, then averaged; in bf16 two stages leave the bits of two replicas of one."""
    groups = run_ranks(f"{__name__}:trained", 2 * REPLICAS, stages=2, folder=str(tmp_path))
    whole = run_ranks(f"{__name__}:trained", REPLICAS, stages=1, folder=str(tmp_path))
    plain = expected()
    for replica in range(REPLICAS):
        own = [rank for rank in groups if rank["place"][0] == replica]
        for name in (*CASES, "resumed"):
            want = whole[replica][name] if name == "bf16" else plain
            assert different(merge([rank[name] for rank in own]), want) == [], (name, replica)
    for number, rank in enumerate(groups):
        stage = tuple(other for other, each in enumerate(groups) if each["place"][1] == rank["place"][1])
        for name in CASES:
            assert rank[name, "groups"] == {stage}, "no collective of training spans stages"
            assert torch.equal(rank[name, "losses"], whole[0][name, "losses"]), number
