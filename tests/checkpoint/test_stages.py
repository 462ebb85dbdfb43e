"""A run may go on with any other number of stages than it was saved with, and ends on the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_al
from ds_al.launch.ranks import run_ranks
from tests.checkpoint.test_checkpoint import SCHEDULER, dataset
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, engine_state, merge
from tests.support.networks import mlp_layers

pytestmark = pytest.mark.distributed

BATCHES = 10
STEPS = {"type": "StepLR", "params": {"step_size": 7, "gamma": 0.5}}
MUON = {"optimizer": "MuonAdamW", "params": {"lr": 0.02, "adamw_lr": 3e-3}}

CASES: dict[str, dict[str, Any]] = {
    "mse": {"scheduler": SCHEDULER},
    # Two optimizers of different classes, and schedules in schedules with an entry per parameter group.
    "sgd": {
        "autoencoder_optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "steps_per_batch": 2,
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6),
                torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 9]),
            ],
            milestones=[6],
        ),
    },
    # An optimizer of the user's, whose one group goes over all layers of a stage.
    "own": {"own": True},
    # 40 micro-batches are no multiple of the refresh: the copies that are saved are older than the decoders.
    "decoded": {"objective": {"name": "decoded", "refresh_every": 12}, "scheduler": SCHEDULER},
    "muon": {**MUON, "scheduler": STEPS},
}


def engine_of(case: str) -> ds_al.ALPipelineEngine:
    """The engine of a case, on a data set that is shuffled anew every epoch."""
    config = dict(CASES[case])
    objective, scheduler = config.pop("objective", None), config.pop("lr_scheduler", None)
    own = config.pop("own", False)
    layers = mlp_layers()
    if objective is not None:
        layers = [ds_al.ALLayerSpec(**spec.parts, **{**spec.module_kwargs, "objective": objective}) for spec in layers]
    module = ds_al.ALPipelineModule(layers, num_classes=4, base_seed=SEED)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3) if own else None
    return ds_al.initialize(
        model=module,
        config=engine_config(**config),
        training_data=dataset("mlp"),
        optimizer=optimizer,
        lr_scheduler=scheduler,
    )[0]


def observe(engine: ds_al.ALPipelineEngine) -> dict[str, Any]:
    """All that has to be the same whatever the number of stages is."""
    state: State = engine_state(engine)
    copies = engine.decoder_copies
    for number in range(len(copies)) if copies is not None else ():
        state |= {f"copy for stage {engine.stage_id}: {number}.{n}": v.clone() for n, v in copies.state(number).items()}
    return {
        "state": state,
        "lr": sorted(set(engine.get_lr())),
        "counters": [engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps],
        "micro_batches": engine.stage.trained_micro_batches,
        "position": engine.loader.position if engine.loader is not None else None,
        "losses": engine.gather_losses(),
    }


def begun(root: str, cases: list[str], whole: bool) -> dict[str, Any]:
    """Worker: 10 batches and a checkpoint of each case, and, if asked to, 10 more in one go."""
    results = {}
    for case in cases:
        engine = engine_of(case)
        for _ in range(BATCHES):
            engine.train_batch()
        assert engine.save_checkpoint(f"{root}/{case}-{engine.num_stages}", client_state={"stage": engine.stage_id})
        if whole:
            for _ in range(BATCHES):
                engine.train_batch()
            results[case] = observe(engine)
    return results


def continued(root: str, cases: list[str], saved_by: list[int]) -> dict[Any, Any]:
    """Worker: goes on for 10 batches from what other numbers of stages have saved."""
    results = {}
    for case, stages in product(cases, saved_by):
        torch.manual_seed(99)
        engine = engine_of(case)
        _, client = engine.load_checkpoint(f"{root}/{case}-{stages}")
        for _ in range(BATCHES):
            engine.train_batch()
        results[case, stages] = {**observe(engine), "client": client["stage"]}
    return results


def check(root: Path, whole: dict[str, list[dict[str, Any]]], cases: list[str], saved: list[int], loads: int) -> None:
    """Loads by ``loads`` stages all that was saved, and compares the end with that of the whole run."""
    ranks = run_ranks(f"{__name__}:continued", loads, root=str(root), cases=cases, saved_by=saved)
    for case, stages in product(cases, saved):
        got = [rank[case, stages] for rank in ranks]
        want = whole[case]
        found, expected = merge([g["state"] for g in got]), merge([w["state"] for w in want])
        weights = {name: value for name, value in expected.items() if not name.startswith("copy")}
        assert different({n: v for n, v in found.items() if not n.startswith("copy")}, weights) == [], (case, stages)
        for name, value in found.items():  # the copies of a decoder are the same on every stage that has them
            if name.startswith("copy"):
                assert torch.equal(value, expected[f"copy for stage {len(want) - 1}: {name.split(': ')[1]}"]), name
        for rank in got:
            for key in ("lr", "counters", "micro_batches"):
                assert rank[key] == want[0][key], (case, stages, key)
            assert torch.equal(rank["losses"], want[0]["losses"])  # of all 20 batches
        assert [g["position"] for g in got] == [2 * BATCHES * MICRO_BATCHES] + [None] * (loads - 1)
        assert [g["client"] for g in got] == (list(range(loads)) if loads == stages else [0] * loads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, list[dict[str, Any]]]]]:
    """A folder of checkpoints by 1 and by 2 stages, and the whole runs."""
    root = tmp_path_factory.mktemp("saved")
    run_ranks(f"{__name__}:begun", 1, root=str(root), cases=list(CASES), whole=False)
    ranks = run_ranks(f"{__name__}:begun", 2, root=str(root), cases=list(CASES), whole=True)
    yield root, {case: [rank[case] for rank in ranks] for case in CASES}


@pytest.mark.parametrize(("saves", "loads"), [([2], 1), ([2], 3), ([1, 2], 4)])
def test_other_stages_go_on(saved: tuple[Path, dict[str, Any]], saves: list[int], loads: int) -> None:
    root, whole = saved
    check(root, whole, ["decoded", "sgd", "own"] if loads == 4 else list(CASES), saves, loads)


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 2, 3, 4])
@pytest.mark.parametrize("loads", [1, 2, 3, 4])
def test_full_matrix(tmp_path: Path, saved: tuple[Path, dict[str, Any]], saves: int, loads: int) -> None:
    run_ranks(f"{__name__}:begun", saves, root=str(tmp_path), cases=list(CASES), whole=False)
    check(tmp_path, saved[1], list(CASES), [saves], loads)


def test_the_files_are_by_layer_and_the_same_whoever_saved(saved: tuple[Path, dict[str, Any]]) -> None:
    root, _ = saved
    for case in CASES:
        one, two = root / f"{case}-1" / "global_step10", root / f"{case}-2" / "global_step10"
        names = [sorted(path.name for path in folder.glob("layer_*")) for folder in (one, two)]
        assert names[0] == names[1]
        roles = ["optimizer"] if case == "own" else ["associated", "autoencoder"]
        kinds = ["model", "training", *(f"{role}_optim" for role in roles)]
        assert {n for n in names[0] if n.startswith("layer_00")} == {f"layer_00-{k}_states.safetensors" for k in kinds}
        for name in names[0]:
            assert (one / name).read_bytes() == (two / name).read_bytes(), (case, name)
    index = json.loads((two / "index.json").read_text())
    assert index["partition"] == [0, 2, 4] and index["num_stages"] == 2
    weight = index["layers"][2]["files"]["model_states"]["tensors"]["f.0.weight"]
    assert weight == ["float32", [16, 16]] and index["layers"][2]["modules"]["f.1"] == "Tanh"
    assert (two.parent / "latest").read_text() == "global_step10"
