"""Layers that span several stages, K < P: objectives, inference, checkpoints, what is refused; and DeepSpeed's 1F1B."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ds_al
from ds_al.baseline.twin import TwinModule
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import RankFailure, run_ranks
from ds_al.layer import ALLayer
from ds_al.models import build_al
from ds_al.partition.shared import refuse_shared_by_runs
from tests.group.networks import MODELS, network
from tests.support.networks import Network, tokens

pytestmark = pytest.mark.distributed

BATCHES, SEED = 3, 7
State = dict[str, Tensor]


def refused(cases: dict[str, Any]) -> dict[str, str]:
    """Worker: the errors of configs."""
    found = {}
    for name, keys in cases.items():
        net = network("mlp", 1)
        module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes)
        config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2, "steps_per_print": None}
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
        with pytest.raises(ALConfigError) as error:
            ds_al.initialize(model=module, config={**config, **keys})
        found[name] = str(error.value)
    return found


def _state(layers: Any, optimizer_state: Any) -> State:
    state: State = {}
    for index, layer in layers:
        state |= {f"{index}.{name}": value.clone() for name, value in layer.state_dict().items()}
        for name, parameter in layer.named_parameters():
            for key, value in optimizer_state[parameter].items():
                state[f"{index}.{name}/{key}"] = torch.as_tensor(value).clone()
    return state


def measured(cases: list[dict[str, Any]]) -> list[Any]:
    """Worker: trains, then evaluates and predicts."""
    results = []
    for case in cases:
        options = dict(MODELS["transformer"], objective=case.get("objective", "mse"))
        net = Network(lambda options=options: build_al("transformer", num_layers=2, **options), tokens)
        module = ds_al.ALPipelineModule(
            net.layers(),
            num_classes=net.classes,
            base_seed=SEED,
            num_stages=case["stages"],
            activation_checkpoint_interval=case.get("recomputed", 0),
        )
        config = {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 4,
            "steps_per_print": None,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
            "associated_learning": {"steps_per_batch": 2, "group_schedule": case.get("schedule", "1f1b")},
            **case.get("config", {}),
        }
        engine, *_ = ds_al.initialize(model=module, config=config)
        replicas, replica = engine.topology.replicas, engine.topology.replica
        batches = iter(net.batches(12 * replicas)[replica::replicas])
        for _ in range(3):
            engine.train_batch(batches)
        losses = engine.gather_losses()
        held = net.batches(3, seed=5)
        found = engine.inference.evaluate(held, exit_confidence=[0.4], averaged=True)
        scores = [engine.predict(held[0][0], exit=exit).cpu() for exit in (1, 2)]
        early = engine.inference.predict_early(held[0][0], confidence=0.4)
        results.append((losses, found, scores, early, _state(engine.layers, {p: {} for p in module.parameters()})))
        engine.destroy()
    return results


CASES: list[dict[str, Any]] = [
    *({"objective": name} for name in ("contrast", "greedy", "decoded")),
    {"objective": "decoded", "schedule": "zb_h2"},
    {"config": {"bf16": {"enabled": True, "check_grad_overflow": False}}, "schedule": "zb_h1"},
    {"recomputed": 1, "schedule": "zb_h1"},
]


def test_objectives_precision_and_inference_do_not_depend_on_the_stages_of_a_group() -> None:
    (alone,) = run_ranks(f"{__name__}:measured", 1, cases=[{**case, "stages": 1} for case in CASES])
    ranks = run_ranks(f"{__name__}:measured", 4, cases=[{**case, "stages": 4} for case in CASES])
    for number, case in enumerate(CASES):
        losses, found, scores, early, weights = alone[number]
        state = {name: value for rank in ranks for name, value in rank[number][4].items()}
        assert [name for name in weights if not torch.equal(weights[name], state[name])] == [], case
        for rank in ranks:
            assert torch.equal(rank[number][0], losses), case
            assert rank[number][1] == found, case
            assert all(torch.equal(one, two) for one, two in zip(rank[number][2], scores, strict=True)), case
            assert all(torch.equal(one, two) for one, two in zip(rank[number][3], early, strict=True)), case


def resumed(folder: str, batches: tuple[int, int], al: dict[str, Any] | None = None) -> list[Any]:
    """Worker: trains some batches, from the latest checkpoint in the folder if there is one, and saves."""
    net = network("transformer", 2)
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "steps_per_print": None,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 10}},
        "associated_learning": {"steps_per_batch": 1, **(al or {})},
    }
    engine, *_ = ds_al.initialize(model=module, config=config)
    if batches[0]:
        engine.load_checkpoint(folder)
    stream = iter(net.batches(6 * 4)[4 * batches[0] :])
    for _ in range(*batches):
        engine.train_batch(stream)
    engine.save_checkpoint(folder, tag=f"after_{batches[1]}", asynchronous=batches[1] == 2)
    engine.flush()
    losses = engine.gather_losses()
    return [losses, _state(engine.layers, engine.optimizer.state)]


def test_a_checkpoint_of_parts_is_that_of_whole_layers(tmp_path: Path) -> None:
    """A layer's files do not depend on its stages, and training goes on on any number of them, bit for bit."""
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    for stages, batches in ((4, (0, 2)), (1, (2, 4)), (3, (4, 6))):
        by_default = {"steps_per_batch": None} if stages == 4 else {}  # one step per batch, where layers span stages
        many = run_ranks(f"{__name__}:resumed", stages, folder=str(parts), batches=batches, al=by_default)
        (one,) = run_ranks(f"{__name__}:resumed", 1, folder=str(alone), batches=batches)
        state = {name: value for _, weights in many for name, value in weights.items()}
        assert state.keys() == one[1].keys()
        assert [name for name in state if not torch.equal(state[name], one[1][name])] == []
        assert all(torch.equal(losses, one[0]) for losses, _ in many)
        names = [sorted(p.name for p in (each / f"after_{batches[1]}").glob("layer_*")) for each in (alone, parts)]
        assert names[0] == names[1]
        for name in names[0]:
            found, expected_ = (load_file(each / f"after_{batches[1]}" / name) for each in (parts, alone))
            assert found.keys() == expected_.keys()
            assert all(torch.equal(found[key], expected_[key]) for key in found), name


def test_another_default_of_steps_is_no_silent_change(tmp_path: Path) -> None:
    """K < P steps once per batch by default, K = P after every micro-batch."""
    by_default: dict[str, Any] = {"folder": str(tmp_path), "al": {"steps_per_batch": None}}
    run_ranks(f"{__name__}:resumed", 3, batches=(0, 1), **by_default)
    with pytest.raises(RankFailure, match="trained with a step after every batch, this job steps after every micro_ba"):
        run_ranks(f"{__name__}:resumed", 1, batches=(1, 2), **by_default)


def test_what_groups_cannot_honour_is_refused_by_name() -> None:
    cases = {
        "forward_first": {"associated_learning": {"method": "forward_first"}},
        "layer_gradient_clipping": {"associated_learning": {"layer_gradient_clipping": 1.0}},
        "compile": {"associated_learning": {"compile": {}}},
        "loss scales": {"bf16": {"enabled": True, "check_grad_overflow": True}},
    }
    for words in run_ranks(f"{__name__}:refused", 2, cases=cases):
        for name, message in words.items():
            assert name in message and "2 stages for 1 AL layers" in message, (name, message)


def beside_deepspeed(schedule: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Worker: one network by DeepSpeed's 1F1B and as one AL layer; pairs of weights of this rank."""
    torch.manual_seed(SEED)
    layers = [
        nn.Linear(12, 16),
        nn.Tanh(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ]
    same = copy.deepcopy(layers)
    x, size = torch.randn(8, 12), 8
    config = {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": 4,
        "steps_per_print": None,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    }
    one = ds_al.from_layers(layers, groups=[6], num_classes=4, example=x, objective="greedy", partition_method="cuts:2")
    twin = TwinModule(same, num_stages=2, loss_fn=nn.CrossEntropyLoss(), partition_method="cuts:2")
    ours, *_ = ds_al.initialize(model=one, config={**config, "associated_learning": {"group_schedule": schedule}})
    stock, *_ = ds_al.initialize(model=twin, config={**config, "associated_learning": {"method": "bp_1f1b"}})
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(size, 12, generator=generator), torch.randint(4, (size,), generator=generator))
               for _ in range(12)]  # fmt: skip
    for engine in (ours, stock):
        stream = iter(batches)
        for _ in range(3):
            engine.train_batch(stream)
    ours.flush()
    theirs = {name: value for name, value in stock.module.named_parameters()}
    (_, part) = ours.layers[0]
    mine = {f"{name.split('.')[1]}.{name.split('.')[2]}": value for name, value in part.f.named_parameters(prefix="f")}
    if part.ends:
        mine |= {f"6.{name}": value for name, value in part.h.named_parameters()}
    return {name: (value.detach(), theirs[name].detach()) for name, value in mine.items()}


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h2"])
def test_one_layer_on_two_stages_is_deepspeeds_1f1b(schedule: str) -> None:
    """K = 1 with ``greedy``, whose loss is the network's own: the bits of DeepSpeed's engine."""
    ranks = run_ranks(f"{__name__}:beside_deepspeed", 2, schedule=schedule)
    pairs = {name: pair for rank in ranks for name, pair in rank.items()}
    assert len(pairs) == 8
    assert [name for name, (ours, theirs) in pairs.items() if not torch.equal(ours, theirs)] == []


def test_stages_share_no_weight_of_a_layer() -> None:
    """Tied blocks on one stage train; on two, each would learn a copy."""
    shared, user = nn.Linear(12, 12), nn.Tanh()
    user.__dict__["other"] = (shared,)  # used without being listed, as another use of a tied module
    f = nn.Sequential(shared, nn.Tanh(), shared, user, nn.Linear(12, 12))
    layer = ALLayer(f, nn.Linear(12, 6), nn.Linear(4, 6), nn.Linear(6, 4))
    refuse_shared_by_runs(0, layer, [range(4), range(4, 5)])
    for cut, there in ((1, "f.2.weight"), (3, "f.3.weight")):
        with pytest.raises(ALConfigError, match=f"f.0.weight and {there} are one tensor.*learn a copy"):
            refuse_shared_by_runs(0, layer, [range(cut), range(cut, 5)])
