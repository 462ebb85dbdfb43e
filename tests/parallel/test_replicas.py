"""Data parallel copies of a pipeline: two stages, twice, train as one process does on all micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_al
from ds_al.data import ShuffledLoader
from ds_al.data.loader import loader_of
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from tests.support import reference
from tests.support.blocks import Experts
from tests.support.engines import MICRO_BATCHES, SEED, State, different, engine_config, engine_state, merge
from tests.support.networks import NETWORKS, Network
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

METHODS = ("streaming", "sequential")
BATCHES, COPIES = 3, 2


def trained() -> dict[str, Any]:
    """Worker: weights by method, which copy and stage this is, losses; then with a data set, and what is refused."""
    found: dict[str, Any] = {}
    data = NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES * COPIES)
    for method in METHODS:
        engine = make_engine(method=method)
        mine = iter(data[engine.replicas.index :: COPIES])
        for _ in range(BATCHES):
            engine.train_batch(mine)
        found[method] = engine_state(engine)
        found["losses"] = engine.gather_losses()
    found["place"] = engine.replicas.index, engine.stage_id
    found["samples"] = engine.global_samples
    found["accuracy"] = engine.evaluate(data[:4])["accuracy"]

    engine = make_engine(training_data=samples())
    for _ in range(BATCHES):
        engine.train_batch()
    found["data set"] = engine_state(engine)
    engine = make_engine(layers=expert_layers(), unused_parameters=["0.f.experts.2.*"])
    mine = iter(expert_batches()[engine.replicas.index :: COPIES])
    for _ in range(BATCHES):
        engine.train_batch(mine)
    found["experts"] = engine_state(engine)
    if engine.is_first_stage():
        loader = ShuffledLoader(samples(), batch_size=8, seed=0, share=(1 - engine.replicas.index, COPIES))
        with pytest.raises(ALConfigError, match="every replica of the pipeline would train on the same"):
            loader_of(loader, batch_size=8, seed=0, collate_fn=None, share=(engine.replicas.index, COPIES))
    return found


def make_engine(training_data: Any = None, layers: Any = None, **al: Any) -> ds_al.ALPipelineEngine:
    module = ds_al.ALPipelineModule(layers or NETWORKS["mlp"].layers(), num_classes=4, base_seed=SEED, num_stages=2)
    return ds_al.initialize(model=module, config=engine_config(**al), training_data=training_data)[0]


class ThreeExperts(Experts):
    """Experts of unequal size, of which the third is never used."""

    def __init__(self) -> None:
        super().__init__(12, 16)
        self.experts.append(nn.Linear(12, 16))


def expert_layers() -> list[ds_al.ALLayerSpec]:
    layers = NETWORKS["mlp"].layers()
    layers[0].parts["f"] = ThreeExperts
    return layers


def expert_batches() -> list[Any]:
    """Micro-batches of which every second one, which the second replica gets, goes to the second expert."""
    batches = NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES * COPIES)
    for number, (x, _) in enumerate(batches):
        x[0, 0] = 1.0 if number % 2 else -1.0
    return batches


def samples() -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(*NETWORKS["mlp"].batches(1, size=20 * 8)[0])


def in_sequence(batches: list[Any], layers: list[ALLayer] | None = None) -> State:
    layers = layers or NETWORKS["mlp"].build(SEED)
    optimizers = reference.train(
        layers,
        batches,
        num_classes=4,
        make_optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
        base_seed=SEED,
        accumulate=COPIES,
    )
    return reference.state(layers, optimizers)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(f"{__name__}:trained", 2 * COPIES)


def test_two_copies_of_two_stages_train_as_one_process_does_on_all_micro_batches(ranks: list[dict[str, Any]]) -> None:
    """Halves of gradients are exact, so with two copies even the bits agree."""
    assert sorted(rank["place"] for rank in ranks) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    count = BATCHES * MICRO_BATCHES * COPIES
    loader = ShuffledLoader(samples(), batch_size=8, seed=SEED)
    expected = dict.fromkeys(METHODS, in_sequence(NETWORKS["mlp"].batches(count)))
    expected["data set"] = in_sequence([next(loader) for _ in range(count)])
    for name, state in expected.items():
        for copy in range(COPIES):
            own = merge([rank[name] for rank in ranks if rank["place"][0] == copy])
            assert different(own, state) == [], (name, copy)
    for rank in ranks:
        assert rank["samples"] == count * 8
        assert torch.equal(rank["losses"], ranks[0]["losses"]) and rank["losses"].shape == (BATCHES, 4, 2)
        assert rank["accuracy"] == ranks[0]["accuracy"]


def test_replicas_that_use_different_experts_train_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    """A gradient of one replica alone is halved; an expert that none uses does not decay."""
    network = Network(expert_layers, NETWORKS["mlp"].make_input)
    layers = network.build(SEED)
    before = {name: value.clone() for name, value in layers[0].f.experts[2].state_dict().items()}
    expected = in_sequence(expert_batches(), layers)
    for copy in range(COPIES):
        own = merge([rank["experts"] for rank in ranks if rank["place"][0] == copy])
        assert different(own, expected) == [], copy
        assert all(torch.equal(own[f"0.f.experts.2.{name}"], value) for name, value in before.items())
