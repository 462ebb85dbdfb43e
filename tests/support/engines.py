"""What the workers of distributed tests share: an engine on a small network, and its state by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ds_al
from ds_al.optim.masters import full_state, stepped
from tests.support.networks import NETWORKS, Network

SEED = 7
MICRO_BATCHES = 4

State = dict[str, Tensor]


def engine_config(
    *,
    optimizer: str = "AdamW",
    params: dict[str, Any] | None = None,
    micro_batches: int = MICRO_BATCHES,
    scheduler: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
    **al: Any,
) -> dict[str, Any]:
    """A config in which a stage steps after every micro-batch of 8 samples unless ``al`` says otherwise.

    Args:
        keys: more of DeepSpeed's own.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": optimizer, "params": params or {"lr": 3e-3, "torch_adam": True}},
        "steps_per_print": None,
        "associated_learning": al,
        **(keys or {}),
    }
    if scheduler is not None:
        config["scheduler"] = scheduler
    return config


def make_engine(
    network: str | Network = "mlp",
    *,
    training_data: Any = None,
    module_options: dict[str, Any] | None = None,
    **config: Any,
) -> ds_al.ALPipelineEngine:
    """An engine for one of the test networks, or another one, under :func:`engine_config`."""
    net = NETWORKS[network] if isinstance(network, str) else network
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED, **(module_options or {}))
    engine, *_ = ds_al.initialize(model=module, config=engine_config(**config), training_data=training_data)
    return engine


def engine_state(engine: ds_al.ALPipelineEngine) -> State:
    """Weights (masters, where there are any), buffers and optimizer state of this stage's layers, as
    ``layer.name[/key]``. With ZeRO all copies of the stage call it."""
    state = {}
    optimizer = engine.optimizer
    states, masters = optimizer.gather() if hasattr(optimizer, "gather") else (optimizer.state, None)
    for index, layer in engine.layers:
        state |= {f"{index}.{name}": value.clone() for name, value in full_state(layer, masters).items()}
        for name, parameter in layer.named_parameters():
            for key, value in states.get(stepped(parameter), {}).items():
                if value is not None:
                    state[f"{index}.{name}/{key}"] = torch.as_tensor(value).clone()
    return state


def merge(states: list[State]) -> State:
    """The states of all ranks as one."""
    merged: State = {}
    for state in states:
        assert not merged.keys() & state.keys()
        merged |= state
    return merged


def different(one: State, two: State) -> list[str]:
    """Names that are not in both states, and those whose values differ in any bit."""
    missing = one.keys() ^ two.keys()
    return sorted(missing | {name for name in one.keys() & two.keys() if not torch.equal(one[name], two[name])})
