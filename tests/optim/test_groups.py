"""Weights to train and their options, by ``model_parameters`` or an optimizer instance, train as a plain torch loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_al
from tests.support import reference
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, engine_state, merge
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks
from tests.support.schedules import SCHEDULES

pytestmark = pytest.mark.distributed

BATCHES = 3
BF16 = {"bf16": {"enabled": True}}
Parameters = list[nn.Parameter]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, fused=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def decayed(parameters: Parameters) -> list[dict[str, Any]]:
    """Norms and biases apart from matrices, as usual; with rates and betas of their own, so that each shows."""
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": 0.5, "name": "matrices"},
        {"params": others, "weight_decay": 0.0, "lr": 1e-3, "betas": (0.5, 0.9)},
    ]


def matrices(parameters: Parameters) -> Parameters:
    return [p for p in parameters if p.ndim > 1]


def associated(module: ds_al.ALPipelineModule) -> Parameters:
    return [p for _, layer in module.local_layers for p in layer.associated_parameters()]


Given = Callable[[ds_al.ALPipelineModule], dict[str, Any]]
CASES: dict[str, tuple[dict[str, Any], Given, dict[str, Any]]] = {
    "groups": (
        {},
        lambda module: {"model_parameters": decayed(list(module.parameters()))},
        {"make_optimizer": lambda parameters: adamw(decayed(parameters))},
    ),
    "groups, bf16 and clipping": (
        {"keys": BF16, "layer_gradient_clipping": 0.05, "steps_per_batch": 2},
        lambda module: {"model_parameters": decayed(list(module.parameters()))},
        {
            "make_optimizer": lambda parameters: adamw(decayed(parameters)),
            "dtype": torch.bfloat16,
            "clip": 0.05,
            "accumulate": 2,
        },
    ),
    "a subset": (
        {},
        lambda module: {"model_parameters": matrices(list(module.parameters()))},
        {"make_optimizer": lambda parameters: adamw(matrices(parameters))},
    ),
    "named, by a generator": (
        {},
        lambda module: {"model_parameters": module.named_parameters()},
        {"make_optimizer": adamw},
    ),
    "groups for a callable": (
        {},
        lambda module: {"model_parameters": decayed(list(module.parameters())), "optimizer": adamw},
        {"make_optimizer": lambda parameters: adamw(decayed(parameters))},
    ),
    "an instance": (
        {"layer_gradient_clipping": 0.05, "steps_per_batch": 2},
        lambda module: {"optimizer": sgd(module.parameters())},
        {"make_optimizer": sgd, "clip": 0.05, "accumulate": 2},
    ),
    "an instance of groups, bf16": (
        {"keys": BF16},
        lambda module: {"optimizer": adamw(decayed(list(module.parameters())))},
        {"make_optimizer": lambda parameters: adamw(decayed(parameters)), "dtype": torch.bfloat16},
    ),
    "an instance of f and b, g and h by the config": (
        {"autoencoder_optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}},
        lambda module: {"optimizer": sgd(associated(module))},
        {"make_optimizer": sgd, "make_autoencoder_optimizer": adamw},
    ),
}


def engine_of(case: str, *, keys: dict[str, Any] | None = None) -> ds_al.ALPipelineEngine:
    config, given, _ = CASES[case]
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=SEED)
    return ds_al.initialize(model=module, config={**engine_config(**config), **(keys or {})}, **given(module))[0]


def trained(cases: list[str]) -> list[State]:
    """Worker: weights and optimizer state of this stage, case after case."""
    states = []
    for case in cases:
        engine = engine_of(case)
        batches = iter(NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES))
        for _ in range(BATCHES):
            engine.train_batch(batches)
        assert all(p.grad is None for p in engine.module.parameters())
        states.append(engine_state(engine))
    return states


def in_sequence(case: str) -> State:
    """The plain loop, with an optimizer of torch per side of a layer."""
    net = NETWORKS["mlp"]
    layers = net.build(SEED)
    optimizers = reference.train(
        layers, net.batches(BATCHES * MICRO_BATCHES), num_classes=4, base_seed=SEED, **CASES[case][2]
    )
    return reference.state(layers, optimizers)


@pytest.mark.parametrize("stages", [1, 2])
def test_weights_options_and_instances_train_as_in_a_plain_loop(stages: int) -> None:
    ranks = run_ranks(f"{__name__}:trained", stages, cases=list(CASES))
    for number, case in enumerate(CASES):
        assert different(merge([rank[number] for rank in ranks]), in_sequence(case)) == [], case


# ---- checkpoints of groups, and LR schedules over them ---------------------------------------------------

CYCLE = {"scheduler": {"type": "OneCycleLR", "params": {"max_lr": 0.01, "total_steps": 8}}}
SAVED = ("groups", "groups, bf16 and clipping", "an instance of groups, bf16")


def rates(engine: ds_al.ALPipelineEngine) -> list[tuple[float, ...]]:
    """All different options that groups are stepped by."""
    return sorted({(g["lr"], *g["betas"], g["weight_decay"]) for g in engine.optimizer.param_groups})


def gone_on(folder: str, start: int, stop: int) -> dict[str, Any]:
    """Worker: batches ``start`` to ``stop`` of each case, from a checkpoint and into one."""
    found: dict[str, Any] = {}
    for case in SAVED:
        engine = engine_of(case, keys=CYCLE)
        if start:
            engine.load_checkpoint(f"{folder}/{case}", tag=str(start))
        batches = iter(NETWORKS["mlp"].batches(stop * MICRO_BATCHES)[start * MICRO_BATCHES :])
        for _ in range(start, stop):
            engine.train_batch(batches)
        engine.save_checkpoint(f"{folder}/{case}", tag=str(stop))
        found[case] = {"state": engine_state(engine), "rates": rates(engine)}
    return found


def test_groups_and_a_momentum_that_cycles_go_on_on_other_stages(tmp_path: Path) -> None:
    (whole,) = run_ranks(f"{__name__}:gone_on", 1, folder=str(tmp_path / "whole"), start=0, stop=5)
    for start, stop, stages in ((0, 2, 2), (2, 3, 1), (3, 5, 3)):
        ranks = run_ranks(f"{__name__}:gone_on", stages, folder=str(tmp_path / "parts"), start=start, stop=stop)
    for case in SAVED:
        assert different(merge([rank[case]["state"] for rank in ranks]), whole[case]["state"]) == [], case
        assert all(rank[case]["rates"] == whole[case]["rates"] for rank in ranks), case
        first, second = whole[case]["rates"]  # the schedule has set rate and first beta of both groups, no more
        assert first[:2] == second[:2] and 0.85 < first[1] < 0.95 and first[1] != 0.9 and first[2:] != second[2:], case


def resumed_schedules(folder: str) -> dict[str, tuple[list[str], list[float], list[float]]]:
    """Worker: what differs between four batches, and two of them from a checkpoint after the other two."""
    found = {}
    for name in SCHEDULES.keys() - {"ReduceLROnPlateau"}:
        engines = [scheduled(name) for _ in range(2)]
        batches = NETWORKS["mlp"].batches(4 * MICRO_BATCHES)
        for number, engine in enumerate(engines):
            data = iter(batches[2 * number * MICRO_BATCHES :])
            if number:
                engine.load_checkpoint(f"{folder}/{name}")
            for batch in range(2 * number, 4):
                engine.train_batch(data)
                if batch == 1:
                    engine.save_checkpoint(f"{folder}/{name}")
        whole, resumed = engines
        found[name] = (different(engine_state(whole), engine_state(resumed)), whole.get_lr(), resumed.get_lr())
    return found


def scheduled(name: str) -> ds_al.ALPipelineEngine:
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=SEED)
    return ds_al.initialize(model=module, config=engine_config(), lr_scheduler=SCHEDULES[name])[0]


def test_every_schedule_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    (found,) = run_ranks(f"{__name__}:resumed_schedules", 1, folder=str(tmp_path))
    for name, (differences, whole, resumed) in found.items():
        assert differences == [] and whole == resumed, name


# ---- weights that are frozen, unfrozen or added later ----------------------------------------------------


def changed_later() -> dict[str, Any]:
    """Worker: what happens with a weight that is frozen for a while, and with one that comes later."""
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=SEED)
    layer = module.local_layers[1][1]
    late, held = layer.f[0].weight, layer.f[0].bias
    held.requires_grad_(False)
    engine = ds_al.initialize(model=module, config=engine_config(params={"lr": 0.01, "torch_adam": True}))[0]
    batches = iter(NETWORKS["mlp"].batches(9 * MICRO_BATCHES))
    found: dict[str, Any] = {"moved": []}
    for trained_now in (True, False, True):
        late.requires_grad_(trained_now)
        before = late.detach().clone()
        engine.train_batch(batches)
        found["moved"].append(not torch.equal(before, late))
    held.requires_grad_(True)
    found["unfrozen"] = error_of(lambda: engine.train_batch(batches))
    held.requires_grad_(False)
    engine.train_batch(batches)
    layer.f[0] = nn.Linear(16, 16)
    found["replaced"] = error_of(lambda: engine.train_batch(batches))
    layer.f[0].requires_grad_(False)
    engine.train_batch(batches)
    layer.f[0].bias.requires_grad_(True)
    found["replaced, unfrozen"] = error_of(lambda: engine.train_batch(batches))
    found["add_param_group"] = error_of(lambda: engine.optimizer.add_param_group({"params": [held]}))
    return found


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_weight_that_is_frozen_rests_and_one_that_no_optimizer_has_is_named() -> None:
    (found,) = run_ranks(f"{__name__}:changed_later", 1)
    assert found["moved"] == [True, False, True]
    named = (
        r"ALConfigError: AL layer 1, f.0.{}: it requires a gradient since ds_al.initialize, and no optimizer steps it"
    )
    assert found["unfrozen"].startswith(named.format("bias"))
    assert found["replaced"].startswith(named.format("weight"))
    assert found["replaced, unfrozen"].startswith(named.format("bias"))
    assert found["add_param_group"].startswith("ALConfigError: add_param_group: the groups of a stage are fixed")


def test_an_optimizer_of_g_and_h_steps_an_h_that_the_associated_loss_trains() -> None:
    """With ``greedy`` the associated loss trains h, and the key says which optimizer steps it."""
    torch.manual_seed(0)
    x, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    layers = [nn.Linear(6, 8), nn.Linear(8, 3)]
    network = ds_al.from_layers(layers, num_al_layers=1, num_classes=3, example=x, objective="greedy")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "associated_learning": {"autoencoder_optimizer": {"type": "SGD", "params": {"lr": 0.0}}},
    }
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    engine, *_ = ds_al.initialize(model=network, config=config)
    engine.train_batch(iter([(x, labels)]))
    moved = {name.split(".")[1] for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"f"}
    assert [group["name"] for group in engine.optimizer.param_groups] == ["layer_00/associated", "layer_00/autoencoder"]
