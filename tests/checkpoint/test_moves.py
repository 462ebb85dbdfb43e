"""Layers change their stage in the middle of training, and nothing shows: weights, optimizer state, losses, rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_al
from ds_al.launch.ranks import run_ranks
from tests.checkpoint.test_stages import observe
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, engine_state, make_engine, merge
from tests.support.networks import NETWORKS

pytestmark = pytest.mark.distributed

BATCHES = 8
COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 40, "warmup_num_steps": 3}}
MUON = {"optimizer": "MuonAdamW", "params": {"lr": 0.02, "weight_decay": 0.01, "adamw_lr": 3e-3}}

CASES: dict[str, dict[str, Any]] = {
    "dropout": {"network": "mlp", "scheduler": COSINE},
    "batch norm": {"network": "vgg", **MUON, "steps_per_batch": 2, "layer_gradient_clipping": 0.05},
    "text": {"network": "transformer", "autoencoder_optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
    "decoded": {"network": "mlp", "objective": {"name": "decoded", "refresh_every": 12}},
    "fp16": {"network": "vgg", "keys": {"fp16": {"enabled": True, "loss_scale_window": 3}}},
    "bf16": {"network": "mlp", **MUON, "keys": {"bf16": {"enabled": True}}, "scheduler": COSINE},
    "recomputed": {"network": "vgg", "module_options": {"activation_checkpoint_interval": 1}},
}
MOVES: dict[int, dict[int, Sequence[int]]] = {  # after a batch, by the number of stages
    2: {1: [0, 3, 4], 3: [0, 1, 4], 6: [0, 2, 4]},
    3: {0: [0, 2, 3, 4], 2: [0, 1, 3, 4], 5: [0, 1, 2, 4]},
    4: {1: [0, 1, 2, 3, 4]},
}


def engine_of(case: str) -> ds_al.ALPipelineEngine:
    """The engine of a case."""
    options = dict(CASES[case])
    objective = options.pop("objective", None)
    if objective is None:
        return make_engine(**options)
    net = NETWORKS[options.pop("network")]
    layers = [
        ds_al.ALLayerSpec(**spec.parts, **{**spec.module_kwargs, "objective": objective}) for spec in net.layers()
    ]
    module = ds_al.ALPipelineModule(layers, num_classes=net.classes, base_seed=SEED)
    return ds_al.initialize(model=module, config=engine_config(**options))[0]


def trained(stages: int, cases: list[str], root: str | None = None) -> dict[str, Any]:
    """Worker: trains each case without moves and with them."""
    results: dict[str, Any] = {}
    for case in cases:
        for moves in ({}, MOVES[stages]):
            engine, net = engine_of(case), NETWORKS[CASES[case]["network"]]
            batches = net.batches(BATCHES * MICRO_BATCHES)
            data, scores = iter(batches), []
            for batch in range(BATCHES):
                engine.train_batch(data)
                if batch in moves:
                    optimizer = engine.optimizer
                    engine.repartition(moves[batch])
                    assert engine.optimizer is optimizer and engine.module.bounds == list(moves[batch])
                if batch in (2, 5):
                    scores.append(engine.predict(batches[0][0]))
            found = {**observe(engine), "scores": scores, "report": engine.report.clone(), "bounds": engine.module.bounds}
            if root is not None and moves:
                engine.save_checkpoint(f"{root}/{case}")
                found["loss"] = float(engine.train_batch(iter(batches)))
            results[f"{case}, moved" if moves else case] = found
    return results


def compare(cases: list[str], ranks: list[dict[str, Any]]) -> None:
    for case in cases:
        want, got = ([rank[name] for rank in ranks] for name in (case, f"{case}, moved"))
        states: list[State] = []
        for each in (want, got):
            copies = {k.split(": ")[1]: v for r in each for k, v in r["state"].items() if k.startswith("copy")}
            states.append(merge([{k: v for k, v in r["state"].items() if not k.startswith("copy")} for r in each]))
            states[-1] |= {f"copy {name}": value for name, value in copies.items()}
        assert different(*states) == [], case
        for one, two in zip(want, got, strict=True):
            for key in ("lr", "counters", "micro_batches", "position"):
                assert one[key] == two[key], (case, key)
            assert torch.equal(one["losses"], two["losses"]) and torch.equal(one["losses"], want[0]["losses"]), case
            assert all(map(torch.equal, one["scores"], two["scores"])), case
        for rank in got:  # what a stage does not know of later layers, it does not claim to know
            stage = got.index(rank)
            known = ~rank["report"].isnan().any(dim=1)
            assert known.tolist() == [i < rank["bounds"][stage + 1] for i in range(len(known))], case


@pytest.mark.parametrize("stages", [2, 3])
def test_layers_that_move_train_as_if_they_had_not(stages: int) -> None:
    cases = list(CASES) if stages == 2 else ["dropout", "batch norm", "decoded"]
    compare(cases, run_ranks(f"{__name__}:trained", stages, stages=stages, cases=cases))
