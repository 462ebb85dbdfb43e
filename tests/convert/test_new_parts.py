"""New parts train first, frozen stages stay as they are: bit for bit as in a loop in one process."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ds_al
from ds_al.convert.hugging_face import layer_specs
from ds_al.convert.new_parts import groups
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from ds_al.layer import seed_layer
from ds_al.optim.held import Held, mark_pretrained, pretrained_weights
from ds_al.tensors import stop_gradient
from tests.convert.test_training import MICRO_BATCHES, built, state, texts, weights
from tests.support.engines import SEED, State, different, engine_config, merge
from tests.support.hugging_face_models import CASES

TASK = {"task": "sequence-classification", "objective": "greedy", "base_seed": SEED}
FIRST = MICRO_BATCHES * 8 + 1
"""Samples: a batch and one more, so new parts train alone in two of the three batches."""
LR, NEW_LR = 3e-3, 1e-2


def frozen_bert(*, frozen: bool) -> Any:
    """A BERT of four blocks; if frozen, without trained weights in embeddings and the first two blocks."""
    model = CASES["bert"].build()
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:2]) if frozen else ():
        part.requires_grad_(False)
    return model


def engine_of(layers: int, *, frozen: bool = False, first: int = FIRST) -> ds_al.ALPipelineEngine:
    options = {**TASK, "dynamic_shape": layers == 1}
    module = ds_al.from_pretrained(frozen_bert(frozen=frozen), num_al_layers=layers, new_parts_first=first, **options)
    config = engine_config(micro_batches=MICRO_BATCHES, params={"lr": LR, "torch_adam": True})
    parameters = ds_al.convert.parameter_groups(module, lr=LR, new_lr=NEW_LR)
    engine: ds_al.ALPipelineEngine = ds_al.initialize(model=module, config=config, model_parameters=parameters)[0]
    return engine


def trained(folder: str) -> dict[str, Any]:
    """Worker: weights after a run, after one that stopped while weights rested, and after others."""
    found: dict[str, Any] = {}
    for name, layers, frozen in (("two", 2, False), ("one over both", 1, False), ("frozen", 2, True)):
        engine = engine_of(layers, frozen=frozen)
        batches = iter(texts())
        engine.train_batch(batches)
        engine.save_checkpoint(f"{folder}/{name}")
        for _ in range(2):
            engine.train_batch(batches)
        found[name] = weights(engine)
        again = engine_of(layers, frozen=frozen)
        again.load_checkpoint(f"{folder}/{name}")
        rest = islice(texts(), MICRO_BATCHES, None)
        for _ in range(2):
            again.train_batch(rest)
        found[f"{name}, resumed"] = weights(again)
    found["written"] = ds_al.export(again, f"{folder}/plain")
    try:
        engine_of(2).repartition([0, 1, 2])
    except ALConfigError as error:
        found["moved"] = str(error)
    try:
        ds_al.from_pretrained(CASES["bert"].build(), num_al_layers=1, new_parts_first=1, **TASK)
    except ALConfigError as error:
        found["spans"] = str(error)
    return found


def alone(layers: int, *, frozen: bool = False) -> State:
    """The same as a loop over layers in one process. A layer over several stages steps once per batch."""
    count = MICRO_BATCHES if layers == 1 else 1
    model = frozen_bert(frozen=frozen)
    whole = built(layer_specs(model, **{k: v for k, v in TASK.items() if k != "base_seed"}, num_al_layers=layers)[0])
    held = [w for layer in whole for w in pretrained_weights(layer) if w.requires_grad]
    optimizers = [torch.optim.AdamW(groups(layer.train(), lr=LR, new_lr=NEW_LR), fused=True) for layer in whole]
    for step, (x, labels) in enumerate(texts()):
        for weight in held:
            weight.requires_grad_(step // MICRO_BATCHES * MICRO_BATCHES * 8 >= FIRST)
        s: Any = x
        for index, layer in enumerate(whole):
            seed_layer(SEED, layer=index, step=step, part=0)
            s_out = layer.f(s)
            seed_layer(SEED, layer=index, step=step, part=1)
            (torch.nn.functional.cross_entropy(layer.h(layer.bridge(s_out)), labels) / count).backward()
            if (step + 1) % count == 0:
                optimizers[index].step()
                optimizers[index].zero_grad()
            s = stop_gradient(s_out)
    return state(whole)


@pytest.mark.distributed
def test_new_parts_first_and_frozen_stages_are_exact_and_resume(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:trained", 2, folder=str(tmp_path))
    for name, layers, frozen in (("two", 2, False), ("one over both", 1, False), ("frozen", 2, True)):
        wanted = alone(layers, frozen=frozen)
        for run in (name, f"{name}, resumed"):
            assert different(merge([rank[run] for rank in ranks]), wanted) == [], run
    before = frozen_bert(frozen=True).state_dict()
    after = load_file(tmp_path / "plain" / "model.safetensors")
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert {
        n for n in after if n.startswith(("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"))
    } <= same
    assert not any(name.startswith("bert.encoder.layer.3") for name in same - {n for n in same if "key.bias" in n})
    assert ranks[0]["written"] == "classifier"
    assert "layers cannot change their stage with new_parts_first" in ranks[0]["moved"]
    assert "for an AL layer on several stages: expected dynamic_shape=True" in ranks[0]["spans"]


def test_a_weight_that_is_frozen_before_the_first_batch_stays_frozen() -> None:
    """It was once trained with the others, when they had rested."""
    layer = torch.nn.Linear(2, 2)
    mark_pretrained(layer)
    held = Held([layer], samples=4)
    layer.bias.requires_grad_(False)
    trains = []
    for samples in (0, 2, 4):
        held.before_batch(samples)
        trains.append((layer.weight.requires_grad, layer.bias.requires_grad))
    assert trains == [(False, False), (False, False), (True, False)]


def test_groups_part_what_is_pretrained_from_what_is_new() -> None:
    model = CASES["bert"].build()
    specs, _ = layer_specs(model, task="sequence-classification", num_al_layers=2, objective="contrast")
    network = torch.nn.ModuleList(copy.deepcopy(built(specs)))
    own, new = groups(network, lr=1.0, new_lr=2.0)
    names = {parameter: name for name, parameter in network.named_parameters()}
    assert {names[w].split(".")[1] for w in own["params"]} == {"f", "b"} and own["lr"] == 1.0
    assert {names[w] for w in own["params"] if ".b." in names[w]} == {
        "1.b.body.pooler.dense.weight",
        "1.b.body.pooler.dense.bias",
    }
    assert {names[w].split(".")[1] for w in new["params"]} == {"b", "g", "h"} and new["name"] == "new"
    assert len(own["params"]) + len(new["params"]) == len(names)
    mark_pretrained(network)
    assert [group["name"] for group in groups(network, lr=1.0, new_lr=2.0)] == ["pretrained"]


@pytest.mark.parametrize("wrong", [-1, 0.5, True, "512"])
def test_samples_are_a_whole_number(wrong: Any) -> None:
    with pytest.raises(ALConfigError, match="expected a number of samples"):
        ds_al.from_pretrained(CASES["bert"].build(), num_al_layers=2, new_parts_first=wrong, **TASK)
