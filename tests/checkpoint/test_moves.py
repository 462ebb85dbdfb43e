"""Layers change their stage in the middle of training, and nothing shows: weights, optimizer state, losses, rates."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import ds_al
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from tests.checkpoint.test_stages import observe
from tests.optim.test_precision import allow_fp16
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, make_engine, merge
from tests.support.networks import NETWORKS, Network

pytestmark = pytest.mark.distributed

BATCHES = 8
COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 40, "warmup_num_steps": 3}}
MUON = {"optimizer": "MuonAdamW", "params": {"lr": 0.02, "weight_decay": 0.01, "adamw_lr": 3e-3}}


def in_sequence(optimizer: Any) -> Any:
    """A schedule of schedules, two of them with a function per parameter group."""
    parts = [lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


CASES: dict[str, dict[str, Any]] = {
    "dropout": {"network": "mlp", "scheduler": COSINE, "objective": {"name": "decoded", "refresh_every": 12}},
    "batch norm": {"network": "vgg", **MUON, "steps_per_batch": 2, "layer_gradient_clipping": 0.05},
    "text": {"network": "transformer", "given": True},
    "fp16": {"network": "vgg", "keys": {"fp16": {"enabled": True, "loss_scale_window": 3}}},
    "bf16": {"network": "mlp", **MUON, "keys": {"bf16": {"enabled": True}}, "scheduler": COSINE},
    "recomputed": {"network": "vgg", "module_options": {"activation_checkpoint_interval": 1}},
    "deep": {"network": "mlp", "more": 3, "scheduler": COSINE, "method": "forward_first"},
    "replicas": {"network": "mlp", "stages": 2, "keys": {"zero_optimization": {"stage": 1}}, "scheduler": COSINE},
    "sharded masters": {
        "network": "mlp",
        "stages": 2,
        "keys": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    },
}
ON_TWO = ["dropout", "batch norm", "text", "fp16", "bf16", "recomputed"]
MOVES: dict[tuple[int, int], dict[int, Sequence[int]]] = {  # after a batch, by the numbers of stages and layers
    (2, 4): {1: [0, 3, 4], 3: [0, 1, 4], 6: [0, 2, 4]},
    (3, 4): {0: [0, 2, 3, 4], 2: [0, 1, 3, 4], 5: [0, 1, 2, 4]},
    (4, 7): {0: [0, 1, 2, 3, 7], 3: [0, 4, 5, 6, 7], 4: [0, 1, 3, 5, 7]},
}


def engine_of(case: str) -> ds_al.ALPipelineEngine:
    """The engine of a case."""
    options = dict(CASES[case])
    net, objective = NETWORKS[options.pop("network")], options.pop("objective", None)
    layers, given = net.layers(), options.pop("given", False)
    layers += [layers[-1]] * options.pop("more", 0)
    if objective is not None:
        layers = [ds_al.ALLayerSpec(**spec.parts, **{**spec.module_kwargs, "objective": objective}) for spec in layers]
    module = ds_al.ALPipelineModule(
        layers,
        num_stages=options.pop("stages", None),
        num_classes=net.classes,
        base_seed=SEED,
        **options.pop("module_options", {}),
    )
    optimizer = (lambda groups: torch.optim.NAdam(groups, lr=3e-3)) if given else None
    return ds_al.initialize(
        model=module,
        config=engine_config(**options),
        optimizer=optimizer,
        lr_scheduler=in_sequence if given else None,
    )[0]


def batches_of(engine: ds_al.ALPipelineEngine, net: Network) -> list[Any]:
    """The micro-batches of this replica."""
    number = engine.replicas.count
    return net.batches(BATCHES * MICRO_BATCHES * number)[engine.replicas.index :: number]


def let_train(engine: ds_al.ALPipelineEngine, trains: bool) -> None:
    """Freezes a weight of layer 1, or lets it learn again."""
    for index, layer in engine.layers:
        if index == 1:
            next(layer.f.parameters()).requires_grad_(trains)


def trained(cases: list[str]) -> dict[str, Any]:
    """Worker: trains each case without moves and with them; in between a weight is frozen for some batches."""
    allow_fp16()
    results: dict[str, Any] = {}
    for case in cases:
        for name in (case, f"{case}, moved"):
            engine, net = engine_of(case), NETWORKS[CASES[case]["network"]]
            moves = MOVES[engine.num_stages, engine.module.num_layers] if name != case else {}
            batches = batches_of(engine, net)
            data, scores, optimizer = iter(batches), [], engine.optimizer
            for batch in range(BATCHES):
                engine.train_batch(data)
                if batch in (0, 3):
                    let_train(engine, batch == 3)
                if batch in moves:
                    gone = {i: weakref.ref(layer) for i, layer in engine.layers}
                    assert engine.repartition(moves[batch])
                    gc.collect()
                    held = {i for i, _ in engine.layers}
                    assert {i for i, layer in gone.items() if layer() is not None} == held & gone.keys()
                    assert engine.optimizer is optimizer and engine.module.bounds == list(moves[batch])
                if batch in (2, 5):
                    scores.append(engine.predict(batches[0][0]))
            results[name] = {**observe(engine), "scores": scores, "report": engine.report.clone()}
            results[name] |= {
                "stage": engine.stage_id,
                "bounds": engine.module.bounds,
                "place": engine.topology.replica,
            }
    return results


def compare(cases: list[str], ranks: list[dict[str, Any]]) -> None:
    """Compares what both runs of each case left, on all ranks."""
    for case in cases:
        want, got = ([rank[name] for rank in ranks] for name in (case, f"{case}, moved"))
        states: list[State] = []
        for each in (want, got):
            first = [rank["state"] for rank in each if rank["place"] == 0]
            copies = {k.split(": ")[1]: v for state in first for k, v in state.items() if k.startswith("copy")}
            states.append(merge([{k: v for k, v in state.items() if not k.startswith("copy")} for state in first]))
            states[-1] |= {f"copy {name}": value for name, value in copies.items()}
        assert different(*states) == [], case
        for one, two in zip(want, got, strict=True):
            for key in ("lr", "counters", "micro_batches", "position"):
                assert one[key] == two[key], (case, key)
            assert torch.equal(one["losses"], two["losses"]) and torch.equal(one["losses"], want[0]["losses"]), case
            assert all(map(torch.equal, one["scores"], two["scores"])), case
            known = ~two["report"].isnan().any(dim=1)  # a stage knows of no layer after its own
            assert known.tolist() == [i < two["bounds"][two["stage"] + 1] for i in range(len(known))], case


def test_layers_that_move_train_as_if_they_had_not() -> None:
    compare(ON_TWO, run_ranks(f"{__name__}:trained", 2, cases=ON_TWO))


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (4, ["deep", "replicas", "sharded masters"]),
        pytest.param(3, ["dropout", "batch norm", "bf16"], marks=pytest.mark.slow),
    ],
)
def test_also_over_several_stages_and_with_replicas(ranks: int, cases: list[str]) -> None:
    compare(cases, run_ranks(f"{__name__}:trained", ranks, cases=cases))


# ---- what follows, and what is refused ---------------------------------------------------------------


def saved_after_a_move(root: str) -> dict[str, Any]:
    """Worker: a checkpoint that is saved after a move, continued here and loaded by an engine of the first partition;
    then what must be refused."""
    net = NETWORKS["mlp"]
    batches = net.batches(4 * MICRO_BATCHES)
    engine = make_engine("mlp", compile={"backend": "eager"})
    engine.train_batch(iter(batches))
    engine.repartition("cuts:3")
    engine.save_checkpoint(root)
    engine.train_batch(iter(batches))
    other = make_engine("mlp", compile={"backend": "eager"})
    other.load_checkpoint(root)
    other.train_batch(iter(batches))
    found = {"moved": observe(engine)["state"], "loaded": observe(other)["state"]}
    compiled = [layer.f._compiled_call_impl is not None for _, layer in engine.layers]
    refusals = []
    for bounds in ([0, 4], [0, 0, 4], [0, 2, 5], "cuts:9", [0, 1, 4] if engine.stage_id else [0, 2, 4]):
        refusals.append(_refusal(engine, bounds))
    for _, layer in engine.layers:
        layer.f.register_forward_hook(lambda *_: None)
    refusals.append(_refusal(engine, [0, 2, 4]))
    before = engine.module.bounds
    given = _with_instance()
    refusals.append(_refusal(given, [0, 3, 4]))
    return {**found, "compiled": compiled, "refusals": refusals, "bounds": before, "same": engine.repartition(before)}


def _with_instance() -> ds_al.ALPipelineEngine:
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4)
    optimizer = torch.optim.AdamW(module.parameters())
    return ds_al.initialize(model=module, config=engine_config(), optimizer=optimizer)[0]


def _refusal(engine: ds_al.ALPipelineEngine, bounds: Any) -> str:
    try:
        engine.repartition(bounds)
    except ALConfigError as error:
        return str(error)
    return "was not refused"


def test_what_follows_and_what_is_refused(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:saved_after_a_move", 2, root=str(tmp_path))
    assert different(merge([r["moved"] for r in ranks]), merge([r["loaded"] for r in ranks])) == []
    for rank in ranks:
        assert all(rank["compiled"]) and rank["bounds"] == [0, 3, 4] and rank["same"] is False
        short, empty, long, cut, differing, hooked, instance = rank["refusals"]
        assert "got partition_method='cuts:'" in short or "expected" in short
        assert "expected" in empty and "expected" in cut
        assert "got bounds [0, 2, 5]: expected 3 of them, from 0 to 4" in long
        assert "repartition is not the same on all ranks" in differing
        assert "AL layer 2 cannot change its stage: hooks of f is 1 forward_hooks where it is trained" in hooked
        assert "layers cannot change their stage with an optimizer instance: give a callable" in instance


class Counting(nn.Linear):
    """Counts its calls in a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def modules_moved() -> list[Any]:
    """Worker: layers that are given as modules, with a buffer that no checkpoint has.

    They are in evaluation mode, as ``from_pretrained`` of transformers leaves them: on the stage that got a layer, its
    dropout was once off.
    """
    torch.manual_seed(3)
    parts = [nn.Sequential(Counting(), nn.Dropout(0.5)).eval() for _ in range(4)]
    engine, x = _of_modules(parts), torch.randn(8, 12)
    data = [(x, torch.zeros(8, dtype=torch.int64))] * MICRO_BATCHES
    for bounds in ([0, 1, 4], [0, 3, 4], [0, 2, 4]):
        engine.train_batch(iter(data))
        engine.repartition(bounds)
    engine.train_batch(iter(data))
    return [(index, float(layer.f[0].calls), layer.f[1].training) for index, layer in engine.layers]


def _of_modules(parts: Sequence[nn.Module]) -> ds_al.ALPipelineEngine:
    layers = [
        ds_al.ALLayer(f, nn.Linear(12, 6), nn.Linear(6 if i else 4, 6), nn.Linear(6, 6 if i else 4))
        for i, f in enumerate(parts)
    ]
    module = ds_al.ALPipelineModule(layers, num_classes=4)
    return ds_al.initialize(model=module, config=engine_config())[0]


def test_layers_given_as_modules_move_with_all_their_buffers_and_their_mode() -> None:
    found = [each for rank in run_ranks(f"{__name__}:modules_moved", 2) for each in rank]
    assert found == [(index, 4.0 * MICRO_BATCHES, True) for index in range(4)]
