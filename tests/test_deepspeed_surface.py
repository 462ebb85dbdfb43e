"""What DeepSpeed's users call stays true: on an AL engine, and of DeepSpeed itself beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.module import PipelineError
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ds_al
from ds_al import host
from ds_al.data.loader import ShuffledLoader
from ds_al.launch.ranks import free_port, rank_environment, run_ranks
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
from tests.support.networks import NETWORKS, tokens

pytestmark = pytest.mark.distributed

AL = ("streaming", "forward_first", "parallel_backward", "sequential")
BACKPROP = ("bp_1f1b", "bp_gpipe", "bp_naive")
WARMUP = {
    "type": "WarmupDecayLR",
    "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 4, "total_num_steps": 9, "warmup_type": "linear"},
}


def plain_loop(network: str, batches: list[tuple[Any, Tensor]], **options: Any) -> State:
    """What the plain loop leaves on these micro-batches."""
    net = NETWORKS[network]
    layers = net.build(SEED)
    options.setdefault("make_optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True))
    optimizers = reference.train(layers, batches, num_classes=net.classes, base_seed=SEED, **options)
    return reference.state(layers, optimizers)


# ---- the surface of PipelineEngine ---------------------------------------------------------------------


class Forbidden:
    """Data that only the first stage may read."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise AssertionError("a later stage has read data")


def surface() -> dict[str, Any]:
    """Worker: what users of a ``PipelineEngine`` do."""
    found: dict[str, Any] = {}
    net = NETWORKS["transformer"]
    module = ds_al.ALPipelineModule(net.layers(), num_classes=4, base_seed=SEED)
    result = ds_al.initialize(model=module, config=engine_config())
    engine, optimizer, loader, scheduler = result
    stage = engine.stage_id
    found["is PipelineEngine"] = isinstance(engine, deepspeed.PipelineEngine)
    found["tuple"] = (len(result), optimizer is engine.optimizer, loader, scheduler)
    found["first, last"] = (engine.is_first_stage(), engine.is_last_stage())

    def data(batches: list[Any]) -> Iterator[Any]:
        return iter(batches) if stage == 0 else iter(Forbidden())

    engine.train_batch(data_iter=data(net.batches(4)))
    engine.set_batch_fn(lambda batch: (batch["text"], batch["label"]))
    engine.train_batch(data([{"text": x, "label": y} for x, y in net.batches(4, seed=1)]))
    found["predict beside a batch_fn"] = engine.predict(net.batches(1)[0][0] if stage == 0 else None)
    engine.set_batch_fn(None)
    engine.set_train_batch_size(16)
    found["accumulation"] = (engine.gradient_accumulation_steps(), engine.micro_batches, engine.train_batch_size())
    engine.train_batch(data(net.batches(2, seed=2)))
    engine.reset_activation_shape()
    engine.train_batch(data(shorter(2)))
    found["counters"] = (engine.global_steps, engine.global_samples)
    found["state"] = engine_state(engine)
    for call in ("forward", "backward", "step"):
        with pytest.raises(PipelineError):
            getattr(engine, call)()

    for call, instead in host.INSTEAD.items():  # they had no effect, or failed without a reason
        with pytest.raises(ds_al.ALConfigError, match=re.escape(f"{call}() is not available: {instead}")):
            getattr(engine, call)(4)
    found["as before"] = engine.train_micro_batch_size_per_gpu()

    engine = make_engine("transformer", module_options={"dynamic_shape": True})
    engine.train_batch(data([*net.batches(1), *shorter(1), *net.batches(1, size=3, seed=4), *shorter(1)]))
    found["dynamic"] = engine_state(engine)
    return found


def shorter(count: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of sequences of another length."""
    generator = torch.Generator().manual_seed(8)
    return [(tokens(generator, 8, length=5), torch.randint(4, (8,), generator=generator)) for _ in range(count)]


def test_what_users_of_a_pipeline_engine_do() -> None:
    ranks = run_ranks(f"{__name__}:surface", 3)
    for stage, found in enumerate(ranks):
        assert found["is PipelineEngine"]
        assert found["tuple"] == (4, True, None, None)
        assert found["first, last"] == (stage == 0, stage == 2)
        assert found["accumulation"] == (2, 2, 16)
        assert found["counters"] == (4, (4 + 4 + 2 + 2) * 8)
        assert found["as before"] == 8
        assert found["predict beside a batch_fn"].shape == (8, 4)
    net = NETWORKS["transformer"]
    batches = [*net.batches(4), *net.batches(4, seed=1), *net.batches(2, seed=2), *shorter(2)]
    assert different(merge([found["state"] for found in ranks]), plain_loop("transformer", batches)) == []
    batches = [*net.batches(1), *shorter(1), *net.batches(1, size=3, seed=4), *shorter(1)]
    assert different(merge([found["dynamic"] for found in ranks]), plain_loop("transformer", batches)) == []


# ---- counters and learning rates -----------------------------------------------------------------------


def counted(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Worker: 6 batches; counters and learning rates after each."""
    results = []
    for case in cases:
        engine = make_engine("mlp", scheduler=WARMUP, **case)
        batches = iter(NETWORKS["mlp"].batches(6 * MICRO_BATCHES))
        rows = []
        for _ in range(6):
            engine.train_batch(batches)
            rows.append((engine.global_steps, engine.global_samples, sorted(set(engine.get_lr()))))
        results.append({"rows": rows, "state": engine_state(engine)})
    return results


def stock_rates(steps: int) -> list[list[float]]:
    """Worker: the learning rate before the first step of DeepSpeed's own engine and after each."""
    deepspeed.init_distributed()
    module = PipelineModule([nn.Linear(12, 4)], num_stages=1, loss_fn=nn.CrossEntropyLoss())
    config = {key: value for key, value in engine_config(scheduler=WARMUP).items() if key != "associated_learning"}
    engine, *_ = deepspeed.initialize(model=module, config=config)
    batches = iter(NETWORKS["mlp"].batches(steps * MICRO_BATCHES))
    rates = [engine.optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        engine.train_batch(batches)
        rates.append(engine.get_lr()[0])
    return rates


def test_counters_and_rates_are_right_in_every_mode() -> None:
    (rates,) = run_ranks(f"{__name__}:stock_rates", 1, steps=24)
    assert len(set(rates)) > 5
    cases = [
        *({"method": method, "count": count} for method in AL for count in ("batch", "step")),
        {"count": "step", "steps_per_batch": 2},
    ]
    ranks = run_ranks(f"{__name__}:counted", 2, cases=cases)
    for number, case in enumerate(cases):
        per_batch = 1 if case["count"] == "batch" else case.get("steps_per_batch", MICRO_BATCHES)
        for rank in ranks:
            for batch, (steps, samples, lr) in enumerate(rank[number]["rows"], start=1):
                assert steps == batch * per_batch, case
                assert samples == batch * MICRO_BATCHES * 8, case
                assert lr == [rates[steps]], case
        # The rates that were trained with, not only those that were reported:
        accumulate = MICRO_BATCHES // case.get("steps_per_batch", MICRO_BATCHES)
        unit = MICRO_BATCHES // per_batch
        expected = plain_loop(
            "mlp",
            NETWORKS["mlp"].batches(6 * MICRO_BATCHES),
            accumulate=accumulate,
            rate=lambda step, unit=unit: rates[step // unit],
        )
        assert different(merge([rank[number]["state"] for rank in ranks]), expected) == [], case


def own_objects() -> dict[str, Any]:
    """Worker: optimizers and an LR schedule that come from callables, and data that comes as a data set."""
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=SEED)
    config = engine_config(layer_gradient_clipping=0.05)
    del config["optimizer"]
    engine, optimizer, loader, scheduler = ds_al.initialize(
        model=module,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
        training_data=samples(),
        config=config,
    )
    for _ in range(3):
        engine.train_batch()
    kinds = tuple(type(each).__name__ for each in (optimizer, loader, scheduler))
    return {"lr": engine.get_lr(), "kinds": kinds, "state": engine_state(engine)}


def samples() -> TensorDataset:
    """8 micro-batches, so that 3 batches go into a second epoch."""
    return TensorDataset(*NETWORKS["mlp"].batches(1, size=64)[0])


def test_own_optimizer_schedule_and_data_set() -> None:
    ranks = run_ranks(f"{__name__}:own_objects", 2)
    assert [rank["kinds"] for rank in ranks] == [
        ("LocalOptimizer", "ShuffledLoader", "LambdaLR"),
        ("LocalOptimizer", "NoneType", "LambdaLR"),
    ]
    assert all(set(rank["lr"]) == {0.1 / 4} for rank in ranks)
    loader = ShuffledLoader(samples(), batch_size=8, seed=SEED)
    expected = plain_loop(
        "mlp",
        [next(loader) for _ in range(3 * MICRO_BATCHES)],
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        clip=0.05,
        rate=lambda step: 0.1 / (1 + step // MICRO_BATCHES),
    )
    assert different(merge([rank["state"] for rank in ranks]), expected) == []


# ---- DeepSpeed itself ----------------------------------------------------------------------------------


def run_script(folder: Path, *arguments: str) -> list[State]:
    """Runs plain_pipeline.py on two ranks and returns the weights of each."""
    folder.mkdir()
    script = Path(__file__).with_name("support") / "plain_pipeline.py"
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), *arguments],
            env=rank_environment(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_plain_deepspeed_is_untouched_beside_ds_al(tmp_path: Path) -> None:
    without = run_script(tmp_path / "without")
    beside = run_script(tmp_path / "beside", "--import")
    for one, two in zip(without, beside, strict=True):
        assert one and different(one, two) == []


def backprop(methods: list[str]) -> list[dict[str, Any]]:
    """Worker: DeepSpeed's own engine (method ``""``), and the back-propagation schedules of ds_al."""
    deepspeed.init_distributed()
    results = []
    for method in methods:
        layers = [
            LayerSpec(nn.Linear, 12, 16),
            LayerSpec(nn.Tanh),
            LayerSpec(nn.Linear, 16, 16),
            LayerSpec(nn.Linear, 16, 4),
        ]
        module = PipelineModule(
            layers,
            num_stages=2,
            loss_fn=nn.CrossEntropyLoss(),
            seed_layers=True,
            base_seed=3,
            partition_method="uniform",
        )
        config = engine_config(method=method) if method else engine_config()
        if not method:
            del config["associated_learning"]
            config["optimizer"]["params"]["fused"] = True  # ours adds it
        engine, *_ = (ds_al if method else deepspeed).initialize(model=module, config=config)
        batches = iter(NETWORKS["mlp"].batches(5 * MICRO_BATCHES))
        losses = [engine.train_batch(batches).item() for _ in range(5)]
        results.append({"state": {k: v.clone() for k, v in module.state_dict().items()}, "losses": losses})
    return results


def test_backprop_schedules_leave_the_bits_of_the_stock_engine() -> None:
    for stock, *others in run_ranks(f"{__name__}:backprop", 2, methods=["", *BACKPROP]):
        for method, other in zip(BACKPROP, others, strict=True):
            assert different(stock["state"], other["state"]) == [], method
            assert other["losses"] == stock["losses"], method
