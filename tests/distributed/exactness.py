"""Worker: trains one network with the engine, case after case, and returns its layers' state by index."""

from __future__ import annotations

from typing import Any

import torch

import ds_al
from tests.networks import NETWORKS

STEPS = 24
MICRO_BATCHES = 4


def engine_config(
    *, optimizer: str = "AdamW", params: dict[str, Any] | None = None, micro_batches: int = MICRO_BATCHES, **al: Any
) -> dict[str, Any]:
    """A config in which a stage steps after every micro-batch unless ``al`` says otherwise."""
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": optimizer, "params": params or {"lr": 3e-3, "torch_adam": True}},
        "steps_per_print": None,
        "associated_learning": al,
    }


def optimizer_state(engine: ds_al.ALPipelineEngine) -> dict[str, Any]:
    """Optimizer state by parameter name, ``layer index.name``."""
    state = {}
    for index, layer in engine.layers:
        for name, parameter in layer.named_parameters():
            for key, value in engine.optimizer.state[parameter].items():
                state[f"{index}.{name}.{key}"] = torch.as_tensor(value).clone()
    return state


def run(network: str, cases: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Trains under each case's ``associated_learning`` block; returns this rank's weights and states."""
    results = []
    for case in cases:
        net = NETWORKS[network]
        module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=7)
        engine, *_ = ds_al.initialize(model=module, config=engine_config(**case))
        batches = iter(net.batches(STEPS))
        for _ in range(STEPS // MICRO_BATCHES):
            engine.train_batch(batches)
        state = {f"{i}.{k}": v.clone() for i, layer in engine.layers for k, v in layer.state_dict().items()}
        results.append({**state, **{f"optimizer {k}": v for k, v in optimizer_state(engine).items()}})
    return results
