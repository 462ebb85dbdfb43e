"""bf16 and fp16: the bits depend on neither partition nor schedule, and checkpoints hold float32 masters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import nn

import ds_al
from ds_al.checkpoint.consolidate import consolidate
from ds_al.errors import ALConfigError
from ds_al.optim.masters import stepped
from ds_al.optim.muon import MuonAdamW, tag_embeddings
from ds_al.tensors import first
from tests.support import reference
from tests.support.collectives import collectives
from tests.support.engines import (
    MICRO_BATCHES,
    SEED,
    State,
    different,
    engine_state,
    make_engine,
    merge,
)
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

BATCHES = 3
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
MUON = {"optimizer": "MuonAdamW", "params": {"lr": 0.02, "adamw_lr": 3e-3}}
CASES: list[dict[str, Any]] = [
    {"method": "streaming", "keys": BF16},
    {"method": "sequential", "keys": BF16, "steps_per_batch": 2},
    {"method": "forward_first", "keys": BF16, "layer_gradient_clipping": 0.05},
    {"method": "streaming", "keys": {**BF16, "pipeline": {"activation_checkpoint_interval": 1}}},
    {"method": "streaming", "keys": {"bfloat16": {"enabled": True, "check_grad_overflow": False}}, **MUON},
    {"method": "parallel_backward", "keys": FP16, "steps_per_batch": 2, "layer_gradient_clipping": 0.05},
]
if not hasattr(torch.optim, "Muon"):
    CASES = [case for case in CASES if case.get("optimizer") != "MuonAdamW"]


def trained(network: str, cases: list[dict[str, Any]]) -> list[State]:
    """Worker: masters, buffers and optimizer state, case after case."""
    allow_fp16()
    results = []
    for case in cases:
        engine = make_engine(network, **case)
        low = torch.float16 if "fp16" in case["keys"] else torch.bfloat16
        kept = {p for part in engine.module.modules() if isinstance(part, nn.BatchNorm2d) for p in part.parameters()}
        assert all(p.dtype is (torch.float32 if p in kept else low) for p in engine.module.parameters())
        assert (engine.fp16_enabled(), engine.bfloat16_enabled()) == (low is torch.float16, low is torch.bfloat16)
        batches = NETWORKS[network].batches(BATCHES * MICRO_BATCHES)
        mine = iter(batches)
        with collectives() as groups:
            for _ in range(BATCHES):
                engine.train_batch(mine)
        if case["method"] == "streaming":
            assert not groups, "no stage waits for an overflow, a norm or a scale of another one"
        for _, layer in engine.layers:
            for p in layer.parameters():
                assert stepped(p).dtype is torch.float32 and torch.equal(p, stepped(p).to(p.dtype))
        assert first(engine.run.s).dtype is low and first(engine.run.t).dtype is low  # so messages are half as long
        scores = engine.predict(batches[0][0])
        assert scores.dtype is torch.float32
        assert engine.evaluate(batches[:2])["samples"] == 16
        results.append(engine_state(engine))
    return results


def allow_fp16() -> None:
    """torch computes float16 on a CPU, which DeepSpeed's accelerator says that it does not everywhere."""
    get_accelerator().is_fp16_supported = lambda: True


def in_sequence(
    network: str, case: dict[str, Any], count: int = BATCHES * MICRO_BATCHES, *, device: str = "cpu"
) -> State:
    """The plain loop."""
    net = NETWORKS[network]
    layers = net.build(SEED, device=device)
    make: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True)  # noqa: E731
    if case.get("optimizer") == "MuonAdamW":
        for layer in layers:
            tag_embeddings(layer)
        make = lambda p: MuonAdamW(p, **case["params"])  # noqa: E731
    optimizers = reference.train(
        layers,
        net.batches(count, device=device),
        num_classes=net.classes,
        make_optimizer=make,
        base_seed=SEED,
        accumulate=MICRO_BATCHES // case.get("steps_per_batch", MICRO_BATCHES),
        clip=case.get("layer_gradient_clipping", 0.0),
        dtype=torch.float16 if "fp16" in case["keys"] else torch.bfloat16,
        loss_scale=2.0**4 if "fp16" in case["keys"] else 1.0,
    )
    return reference.state(layers, optimizers)


@pytest.mark.parametrize(
    ("network", "stages"),
    [
        ("mlp", 3),
        pytest.param("vgg", 2, marks=pytest.mark.slow),
        pytest.param("transformer", 4, marks=pytest.mark.slow),
    ],
)
def test_low_precision_leaves_the_bits_of_the_plain_loop_with_masters(network: str, stages: int) -> None:
    ranks = run_ranks(f"{__name__}:trained", stages, network=network, cases=CASES)
    for number, case in enumerate(CASES):
        got = merge([rank[number] for rank in ranks])
        assert different(got, in_sequence(network, case)) == [], case


def resumed(folder: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Worker: loads what other stages have saved, and trains on."""
    engine = make_engine("vgg", keys=keys)
    engine.load_checkpoint(folder)
    found: dict[str, Any] = {"loaded": engine_state(engine)}
    mine = iter(NETWORKS["vgg"].batches(BATCHES * MICRO_BATCHES)[MICRO_BATCHES:])
    for _ in range(BATCHES - 1):
        engine.train_batch(mine)
    found["end"] = engine_state(engine)
    return found


def saved(folder: str) -> dict[str, Any]:
    """Worker: a batch, saved; then other ways to set weights."""
    engine = make_engine("vgg", keys=BF16)
    engine.train_batch(iter(NETWORKS["vgg"].batches(MICRO_BATCHES)))
    engine.save_checkpoint(folder)
    found: dict[str, Any] = {"at save": engine_state(engine)}

    fresh = make_engine("vgg", keys=BF16)
    ds_al.load_weights(fresh, folder)  # masters take over all digits, or the first step would undo what was loaded
    fresh.optimizer.round_masters()
    found["weights"] = {name: value for name, value in engine_state(fresh).items() if "/" not in name}
    for _, layer in fresh.layers:
        layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})
    fresh.optimizer.refresh_fp32_params()
    assert all(torch.equal(stepped(p), p.float()) for p in fresh.module.parameters())

    get_accelerator().is_fp16_supported = lambda: False  # some CPUs have it
    with pytest.raises(
        ALConfigError, match='"fp16": DeepSpeed\'s accelerator \'cpu\' does not compute in it: enable "bf16"'
    ):
        make_engine("vgg", keys=FP16)
    return found


def changed(folder: str, keys: dict[str, Any], stages: int) -> dict[str, Any]:
    """Worker: weights that the user sets between two batches; then batches whose steps change nothing."""
    engine = make_engine("mlp", keys=keys, module_options={"num_stages": stages})
    batches = iter(NETWORKS["mlp"].batches(20 * MICRO_BATCHES))
    engine.train_batch(batches)
    early = {name: value.clone() for name, value in engine.module.state_dict().items()}
    by_layer = {f"{i}.{name}": v.clone() for i, layer in engine.layers for name, v in layer.state_dict().items()}
    engine.train_batch(batches)
    late = engine_state(engine)

    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.train_batch(batches)
    same = engine_state(engine)
    engine.module.load_state_dict(early)
    engine.save_checkpoint(folder)
    engine.train_batch(batches)
    found = {
        "masters that nobody changed": all(torch.equal(same[n], value) for n, value in late.items() if "/" not in n),
        "loaded": all(torch.equal(value, early[n]) for n, value in engine.module.state_dict().items()),
    }
    for weight in engine.module.parameters():
        weight.data.clamp_(-0.01, 0.01)
    engine.train_batch(batches)
    found["clamped"] = all(weight.abs().max() <= 0.0101 for weight in engine.module.parameters())
    return {**found, "early": by_layer}


@pytest.mark.parametrize(
    ("keys", "stages"), [(BF16, 2), ({**BF16, "zero_optimization": {"stage": 1}}, 1)], ids=["bf16", "ZeRO 1"]
)
def test_weights_that_the_user_sets_reach_their_masters(tmp_path: Path, keys: dict[str, Any], stages: int) -> None:
    """The next step set them back to what they had been, and a save in between held what they had been."""
    ranks = run_ranks(f"{__name__}:changed", 2, folder=str(tmp_path), keys=keys, stages=stages)
    for rank in ranks:
        assert rank["masters that nobody changed"] and rank["loaded"] and rank["clamped"], rank
    consolidate(tmp_path, tmp_path / "all.safetensors")
    file = load_file(tmp_path / "all.safetensors")
    early = {name: value for rank in ranks for name, value in rank["early"].items()}
    assert early.keys() == file.keys() and all(torch.equal(file[n].bfloat16(), value) for n, value in early.items())


def test_checkpoints_hold_masters_and_go_on_exactly_on_other_stages(tmp_path: Path) -> None:
    """Batch norm's buffers are among them. Without the masters the rounded weights would be gone on from."""
    ranks = run_ranks(f"{__name__}:saved", 2, folder=str(tmp_path))
    at_save = merge([rank["at save"] for rank in ranks])
    weights = merge([rank["weights"] for rank in ranks])
    trained = [name for name in weights if name.endswith((".weight", ".bias"))]
    assert trained and all(torch.equal(weights[name], at_save[name]) for name in trained)

    consolidate(tmp_path, tmp_path / "all.safetensors")
    file = load_file(tmp_path / "all.safetensors")
    assert all(value.dtype in (torch.float32, torch.int64) for value in file.values())
    assert all(torch.equal(value, at_save[name]) for name, value in file.items())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in file.values())

    ranks = run_ranks(f"{__name__}:resumed", 3, folder=str(tmp_path), keys=BF16)
    assert different(merge([rank["loaded"] for rank in ranks]), at_save) == []
    whole = in_sequence("vgg", {"keys": BF16})
    assert different(merge([rank["end"] for rank in ranks]), whole) == []

    (alone,) = run_ranks(f"{__name__}:resumed", 1, folder=str(tmp_path), keys={})
    assert different(alone["loaded"], at_save) == []  # in float32, too
    assert different(alone["end"], whole)
