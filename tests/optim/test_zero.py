"""ZeRO-1: copies of a stage share out its optimizer state, and end on the bits of plain data parallel training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist

import ds_al
from ds_al.optim.groups import trained_parameters
from ds_al.optim.masters import stepped
from tests.support.collectives import collectives
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, engine_state, merge
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

COPIES, BATCHES = 2, 2
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
MUON = {"optimizer": "MuonAdamW", "params": {"lr": 0.02, "adamw_lr": 3e-3}}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "clipped": {"layer_gradient_clipping": 0.05, "steps_per_batch": 2},
    "bf16": {"keys": BF16, "layer_gradient_clipping": 0.05},
    "adagrad": {"optimizer": "Adagrad", "params": {"lr": 0.01}},  # makes its state at once, for all weights
    "instance": {"keys": BF16, "instance": True},
    "muon": MUON if hasattr(torch.optim, "Muon") else {},
}


def make_engine(zero: bool, stages: int = 2, **case: Any) -> ds_al.ALPipelineEngine:
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=SEED, num_stages=stages)
    own = torch.optim.AdamW(module.parameters(), lr=3e-3) if case.pop("instance", False) else None
    config = engine_config(**{**case, "keys": {**case.get("keys", {}), **(ZERO if zero else {})}})
    return ds_al.initialize(model=module, config=config, optimizer=own)[0]


def micro_batches(engine: ds_al.ALPipelineEngine, batches: range) -> Any:
    """Of this copy."""
    data = NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES * COPIES)
    per_batch = MICRO_BATCHES * COPIES
    mine = data[batches.start * per_batch : batches.stop * per_batch]
    return iter(mine[engine.replicas.index :: engine.replicas.count])


def held(engine: ds_al.ALPipelineEngine) -> int:
    """Numbers of optimizer state and of masters that this rank holds in memory."""
    tensors = [v for state in engine.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    for _, layer in engine.layers:
        tensors += [stepped(p) for p in trained_parameters(layer) if stepped(p) is not p]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors) // 4


def trained(folder: str) -> dict[str, Any]:
    """Worker: every case with ZeRO and without; checkpoints of both."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        for zero in (False, True):
            engine = make_engine(zero, **case)
            assert engine.zero_optimization_stage() == zero
            for number in range(BATCHES):
                if number == 1 and name in ("adamw", "bf16"):
                    engine.save_checkpoint(f"{folder}/{name}-{zero}")
                with collectives() as groups:
                    engine.train_batch(micro_batches(engine, range(number, number + 1)))
            found[name, zero, "groups"] = groups
            found[name, zero] = engine_state(engine)
            found[name, zero, "held"] = held(engine)
            scores = engine.predict(NETWORKS["mlp"].batches(1)[0][0])
            found[name, zero, "scores"] = scores
    found["place"] = engine.replicas.index, engine.stage_id
    engine = make_engine(True, method="forward_first")
    with collectives() as groups:
        engine.train_batch(micro_batches(engine, range(1)))
    found["with a barrier"] = groups
    for name in ("adamw", "bf16"):
        for zero in (False, True):  # each from the checkpoint of the other
            engine = make_engine(zero, **CASES[name])
            engine.load_checkpoint(f"{folder}/{name}-{not zero}")
            engine.train_batch(micro_batches(engine, range(1, BATCHES)))
            found[name, zero, "resumed"] = engine_state(engine)
    return found


def resumed_alone(folder: str) -> dict[str, Any]:
    """Worker, one copy on one stage: what two copies saved with ZeRO and without is the same to go on from."""
    found = {}
    for name in ("adamw", "bf16"):
        for zero in (False, True):
            engine = make_engine(zero, stages=1, **CASES[name])
            engine.load_checkpoint(f"{folder}/{name}-{zero}")
            found[name, zero, "loaded"] = engine_state(engine)
            engine.train_batch(iter(NETWORKS["mlp"].batches(MICRO_BATCHES)))
            found[name, zero] = engine_state(engine)
            engine.save_checkpoint(f"{folder}/alone-{name}-{zero}")
    assert dist.get_world_size() == 1
    return found


def loaded_by_two(folder: str) -> dict[str, Any]:
    """Worker: two copies of one stage load what one rank saved."""
    found = {}
    for name in ("adamw", "bf16"):
        engine = make_engine(True, stages=1, **CASES[name])
        engine.load_checkpoint(f"{folder}/alone-{name}-False")
        found[name], found[name, "held"] = engine_state(engine), held(engine)
    return found


def test_zero_1_leaves_the_bits_of_plain_copies_in_half_the_memory(tmp_path: Path) -> None:
    """Checkpoints go from ZeRO to none and back, and from two copies to one and back."""
    ranks = run_ranks(f"{__name__}:trained", 2 * COPIES, folder=str(tmp_path))
    assert sorted(rank["place"] for rank in ranks) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    whole: dict[tuple[str, bool], State] = {}
    for name in CASES:
        for zero in (False, True):
            for copy in range(COPIES):
                own = [rank for rank in ranks if rank["place"][0] == copy]
                state = merge([rank[name, zero] for rank in own])
                assert different(state, whole.setdefault((name, False), state)) == [], (name, zero, copy)
                if (name, zero, "resumed") in own[0]:
                    again = merge([rank[name, zero, "resumed"] for rank in own])
                    assert different(again, state) == [], (name, zero, copy)
        for rank in ranks:
            assert torch.equal(rank[name, True, "scores"], ranks[0][name, False, "scores"]), name
            assert 0.4 < rank[name, True, "held"] / rank[name, False, "held"] < 0.6, name

    for number, rank in enumerate(ranks):  # no collective of training spans stages, whatever is on
        stage = tuple(other for other, each in enumerate(ranks) if each["place"][1] == rank["place"][1])
        assert len(stage) == COPIES and number in stage
        for name in CASES:
            assert rank[name, False, "groups"] == rank[name, True, "groups"] == {stage}, name
        assert rank["with a barrier"] - {stage}, "a collective of all stages is seen"

    (alone,) = run_ranks(f"{__name__}:resumed_alone", 1, folder=str(tmp_path))
    two = run_ranks(f"{__name__}:loaded_by_two", 2, folder=str(tmp_path))
    for name in ("adamw", "bf16"):
        assert different(alone[name, False, "loaded"], alone[name, True, "loaded"]) == []
        assert different(alone[name, False], alone[name, True]) == []
        assert all(different(rank[name], alone[name, False]) == [] for rank in two)
        assert sum(rank[name, "held"] for rank in two) < 1.2 * 2 * min(rank[name, "held"] for rank in two)
