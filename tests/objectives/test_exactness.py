"""Every objective is exact: any partition and schedule leaves the bits of its formula in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_al
from ds_al.launch.ranks import run_ranks
from ds_al.layer import predict
from ds_al.models import build_al
from tests.support import reference_objectives
from tests.support.engines import SEED, State, different, engine_config, merge
from tests.support.networks import NETWORKS, Network, tokens

pytestmark = pytest.mark.distributed

STEPS, MICRO_BATCHES, LR = 20, 4, 3e-3
OBJECTIVES: dict[str, dict[str, Any]] = {
    "contrast": {"name": "contrast", "temperature": 0.2, "learned_temperature": True, "label_smoothing": 0.1},
    "decoded": {"name": "decoded", "refresh_every": 3, "own_decoder": "live"},
    "decoded, frozen": {"name": "decoded", "refresh_every": 7, "label_smoothing": 0.2},
    "greedy": {"name": "greedy", "label_smoothing": 0.1},
}


def network(objective: dict[str, Any], kind: str) -> Network:
    """A small network whose layers have this objective."""
    if kind == "transformer":
        sizes = {"vocab_size": 20, "width": 8, "heads": 2, "feed_forward": 12, "dropout": 0.2}
        return Network(lambda: build_al(kind, num_classes=4, code_width=6, objective=objective, **sizes), tokens)
    sizes = {"in_shape": (12,), "widths": (16,) * 4, "dropout": 0.2, "bridge_hidden": 8}
    make = NETWORKS["mlp"].make_input
    return Network(lambda: build_al("mlp", num_classes=4, code_width=6, objective=objective, **sizes), make)


def trained(
    objective: dict[str, Any],
    kind: str,
    methods: list[str],
    scores: bool = False,
    keys: dict[str, Any] | None = None,
) -> list[State]:
    """Worker: weights after training, method after method; with the scores of every exit, if asked for."""
    results = []
    for method in methods:
        net = network(objective, kind)
        module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED)
        config = engine_config(
            micro_batches=MICRO_BATCHES, method=method, params={"lr": LR, "torch_adam": True}, keys=keys
        )
        engine, *_ = ds_al.initialize(model=module, config=config)
        batches = iter(net.batches(STEPS))
        for _ in range(STEPS // MICRO_BATCHES):
            engine.train_batch(batches)
        state = {f"{i}.{name}": v.clone() for i, layer in engine.layers for name, v in layer.state_dict().items()}
        if scores and engine.is_first_stage():
            state |= {f"exit {exit}": engine.predict(samples(net), exit=exit) for exit in range(1, 5)}
        elif scores:
            for exit in range(1, 5):
                engine.predict(None, exit=exit)
        engine.flush()
        results.append(state)
    return results


def samples(net: Network) -> Any:
    """Inputs that are not trained on."""
    return net.batches(1, seed=5)[0][0]


def expected(objective: dict[str, Any], kind: str) -> State:
    """The same by the plain loop."""
    net = network(objective, kind)
    layers = net.build(SEED)
    options = {key: value for key, value in objective.items() if key not in ("name", "learned_temperature")}
    reference_objectives.train(
        objective["name"], layers, net.batches(STEPS), num_classes=4, base_seed=SEED, lr=LR, **options
    )
    state: State = {f"{i}.{name}": v for i, layer in enumerate(layers) for name, v in layer.state_dict().items()}
    for layer in layers:
        layer.eval()
    return state | {f"exit {e}": predict(layers, samples(net), exit=e, num_classes=4) for e in range(1, 5)}


@pytest.mark.parametrize(("name", "stages", "kind"), [
    ("contrast", 3, "mlp"), ("decoded", 4, "transformer"), ("decoded, frozen", 2, "mlp"), ("greedy", 2, "transformer"),
])  # fmt: skip
def test_any_schedule_leaves_the_bits_of_the_formula(name: str, stages: int, kind: str) -> None:
    methods = ["streaming", "forward_first", "parallel_backward", "sequential"]
    want = expected(OBJECTIVES[name], kind)
    ranks = run_ranks(
        f"{__name__}:trained", stages, objective=OBJECTIVES[name], kind=kind, methods=methods, scores=True
    )
    for number, method in enumerate(methods):
        assert different(merge([rank[number] for rank in ranks]), want) == [], method


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_full_matrix(name: str, stages: int, kind: str) -> None:
    want = expected(OBJECTIVES[name], kind)
    ranks = run_ranks(
        f"{__name__}:trained", stages, objective=OBJECTIVES[name], kind=kind, methods=["streaming"], scores=True
    )
    assert different(merge([rank[0] for rank in ranks]), want) == []


def resumed(folder: str, save: bool) -> State:
    """Worker: trains 5 batches; or saves after 2 and goes on in a second job, between two refreshes of the copies."""
    net = network(OBJECTIVES["decoded"], "mlp")
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED)
    config = engine_config(micro_batches=MICRO_BATCHES, params={"lr": LR, "torch_adam": True})
    engine, *_ = ds_al.initialize(model=module, config=config)
    batches = net.batches(STEPS)
    done = 0 if save else 2
    if not save:
        engine.load_checkpoint(folder)
    stream = iter(batches[done * MICRO_BATCHES :])
    for batch in range(done, 2 if save else 5):
        engine.train_batch(stream)
        assert batch < 5
    if save:
        engine.save_checkpoint(folder)
    engine.flush()
    return {f"{i}.{name}": value.clone() for i, layer in engine.layers for name, value in layer.state_dict().items()}


def test_copies_of_decoders_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    """Micro-batch 8 lies between two refreshes, so the copies are older than the decoders that are saved."""
    run_ranks(f"{__name__}:resumed", 2, folder=str(tmp_path), save=True)
    got = merge(run_ranks(f"{__name__}:resumed", 2, folder=str(tmp_path), save=False))
    want = expected(OBJECTIVES["decoded"], "mlp")
    assert different(got, {name: value for name, value in want.items() if not name.startswith("exit")}) == []


def evaluated(objective: dict[str, Any]) -> dict[str, Any]:
    """Worker: accuracy at every exit after some training on labels that the input tells."""
    net = network(objective, "mlp")
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED)
    config = engine_config(micro_batches=MICRO_BATCHES, params={"lr": 0.01, "torch_adam": True})
    engine, *_ = ds_al.initialize(model=module, config=config)
    stream = iter([told(x) for x, _ in net.batches(60 * MICRO_BATCHES)])
    for _ in range(60):
        engine.train_batch(stream)
    return engine.evaluate([told(x) for x, _ in net.batches(10, seed=9)])


def told(x: Tensor) -> tuple[Tensor, Tensor]:
    """A label that is one of four numbers' place in the input."""
    return x, x[:, :4].argmax(dim=1)


@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES.values(), {"name": "contrast", "exit": "decode"}],
    ids=[*OBJECTIVES, "contrast, decoded"],
)
def test_every_objective_learns_and_scores_every_exit(objective: dict[str, Any]) -> None:
    first, second = run_ranks(f"{__name__}:evaluated", 2, objective=objective)
    assert first == second and first["samples"] == 80
    assert len(first["accuracy"]) == 4
    # Chance is 0.25. Codes of 4 classes alone teach the decoders little of what a bridge may say.
    assert min(first["accuracy"]) > (0.3 if objective.get("exit") == "decode" else 0.6), first
    assert all(torch.isfinite(torch.tensor(first["loss"])))


def in_bf16() -> list[State]:
    """Worker: every objective, in bfloat16."""
    keys = {"bf16": {"enabled": True}}
    return [state for each in OBJECTIVES.values() for state in trained(each, "mlp", ["streaming"], True, keys)]


def test_in_bf16_no_objective_depends_on_the_partition() -> None:
    """Decoders and code tables travel in bfloat16, too; losses and scores are float32."""
    (alone,), two = run_ranks(f"{__name__}:in_bf16", 1), run_ranks(f"{__name__}:in_bf16", 2)
    for number, name in enumerate(OBJECTIVES):
        assert different(merge([rank[number] for rank in two]), alone[number]) == [], name
        assert alone[number]["exit 4"].dtype is torch.float32 and alone[number]["exit 4"].isfinite().all()
