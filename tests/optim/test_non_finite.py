"""Numbers that are not finite, by policy: with "skip" a layer leaves out its own step, the same on any partition."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_al
from ds_al.config.associated_learning import al_config
from ds_al.config.settings import Settings
from ds_al.errors import ALConfigError, ALLayerError
from ds_al.experiment.summary import skipped_steps
from ds_al.optim.finite import FiniteCheck
from tests.support.engines import SEED, State, different, engine_config, engine_state, make_engine, merge
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks

BAD, LAYER = (5, 6), 2
"""Micro-batches in which the third of four layers returns or learns from numbers that are not finite."""


def spike(f: nn.Module, where: str, bad: Sequence[int] = BAD) -> None:
    """Makes what a function returns infinite in some micro-batches, or its gradient."""
    count = itertools.count()

    def after(module: nn.Module, inputs: Any, x: torch.Tensor) -> torch.Tensor:
        if not module.training or next(count) not in bad:
            return x
        if where == "gradient" and x.requires_grad:
            x.register_hook(lambda gradient: gradient * torch.inf)
        return x * torch.inf if where == "output" else x

    f.register_forward_hook(after)


def train(
    network: str,
    *,
    where: str,
    micro_batches: int = 1,
    stages: int | None = None,
    total: int = 12,
    bad: Sequence[int] = BAD,
    **al: Any,
) -> tuple[State, list[State], Any]:
    """Worker: the state at the end, the states around the bad micro-batches, and the steps that were left out."""
    net = NETWORKS[network]
    options = {} if stages is None else {"num_stages": stages}
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED, **options)
    for index, layer in module.local_layers:
        if index == LAYER:
            spike(layer.f, where, bad)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(micro_batches=micro_batches, **al))
    engine.reset_stats()
    batches, around = itertools.cycle(net.batches(12)), list[State]()
    for number in range(total // micro_batches // engine.replicas.count):
        if number in (BAD[0], BAD[-1] + 1):
            around.append(engine_state(engine))
        engine.train_batch(batches)
    engine.flush()
    return engine_state(engine), around, skipped_steps(engine.gather(engine.stats().skipped))


@pytest.mark.distributed
@pytest.mark.parametrize(("network", "where"), [("vgg", "output"), ("mlp", "gradient")])
def test_a_layer_leaves_out_its_own_step_and_the_same_ones_on_any_partition(network: str, where: str) -> None:
    expected, (before, after), skipped = run_ranks(f"{__name__}:train", 1, network=network, where=where, **SKIP)[0]
    count = len(BAD)
    # An output that is not finite goes on to the last layer; a gradient stays where it is.
    assert skipped == {"skipped_steps": [0, 0, count, count if where == "output" else 0]}
    changed = {name.split(".")[0] for name in different(before, after)}
    assert changed == ({"0", "1"} if where == "output" else {"0", "1", "3"}), "buffers and counts of steps included"
    assert all(value.isfinite().all() for value in expected.values() if value.is_floating_point())
    states, _, found = zip(*run_ranks(f"{__name__}:train", 2, network=network, where=where, **SKIP), strict=True)
    assert different(merge(list(states)), expected) == [] and found[0] == skipped


SKIP = {"non_finite": "skip"}


@pytest.mark.distributed
def test_steps_over_several_micro_batches_are_left_out_as_one() -> None:
    ranks = run_ranks(f"{__name__}:train", 4, network="mlp", where="output", micro_batches=4, **SKIP, steps_per_batch=2)
    assert ranks[0][2] == {"skipped_steps": [0, 0, 2, 2]}  # micro-batch 5 is in the third step, 6 in the fourth


@pytest.mark.distributed
def test_replicas_leave_out_the_same_step() -> None:
    """One replica alone meets the number: its gradients carry it to the other one."""
    ranks = run_ranks(f"{__name__}:train", 2, network="mlp", where="output", stages=1, **SKIP)
    assert ranks[0][2] == ranks[1][2] == {"skipped_steps": [0, 0, 1, 1]}
    assert different(ranks[0][0], ranks[1][0]) == []


def stop(folder: str, *, where: str, batches: int = 40) -> tuple[str, int, State, State]:
    """Worker: the error, the batch and the state where all ranks stop, and the state that was saved."""
    one = make_engine(micro_batches=1, non_finite="save_and_stop")
    one.stops.save = lambda: one.save_checkpoint(folder) and folder
    for index, layer in one.layers:
        if index == LAYER:
            spike(layer.f, where, BAD[:1])
    data = itertools.cycle(NETWORKS["mlp"].batches(12))
    with pytest.raises(ALLayerError) as error:
        for _ in range(batches):
            one.train_batch(data)
        one.gather_losses()
    two = make_engine(micro_batches=1)
    two.load_checkpoint(folder)
    return str(error.value), one.global_samples, engine_state(one), engine_state(two)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "where"), [(1, "output"), (3, "gradient")])
def test_all_ranks_stop_after_one_batch_and_save_what_skipping_leaves(ranks: int, where: str, tmp_path: Path) -> None:
    told, samples, states, saved = zip(
        *run_ranks(f"{__name__}:stop", ranks, folder=str(tmp_path), where=where), strict=True
    )
    assert len(set(told)) == len(set(samples)) == 1
    of = "the gradient of" if where == "gradient" else "the output of f"
    assert re.search(
        rf"AL layer 2.*micro-batch 5, function f: {of}.*all ranks stop after batch \d+, .*{tmp_path}", told[0]
    )
    batches = samples[0] // len(NETWORKS["mlp"].batches(1)[0][1])
    assert batches == 6 if ranks == 1 else batches > 6
    assert different(merge(list(states)), merge(list(saved))) == []
    skipped = run_ranks(f"{__name__}:train", 1, network="mlp", where=where, total=batches, bad=BAD[:1], **SKIP)[0][0]
    assert different(skipped, merge(list(saved))) == []


@pytest.mark.distributed
def test_a_number_of_the_last_batch_stops_the_next_joint_call(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:stop", 2, folder=str(tmp_path), where="output", batches=6)
    assert all("all ranks stop after batch 6" in told for told, *_ in ranks)


def test_an_error_is_the_default() -> None:
    with pytest.raises(ALLayerError, match=r"AL layer 2.*micro-batch 5, function f: the output of f holds -?inf"):
        train("mlp", where="output")


def test_a_weight_that_is_not_finite_raises_under_any_policy() -> None:
    net = NETWORKS["mlp"]
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(**SKIP))
    with torch.no_grad():
        next(engine.layers[1][1].b.parameters()).fill_(torch.nan)
    with pytest.raises(ALLayerError, match=r"weight b\S* holds nan"):
        engine.train_batch(iter(net.batches(4)))


class Unread(nn.Module):
    """Has a weight of which one number shows in no output, as the row of a token that does not occur."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight[0]


@pytest.mark.parametrize("saves", [False, True])
def test_a_weight_that_shows_nowhere_is_found_within_eight_micro_batches_or_before_a_save(saves: bool) -> None:
    net = NETWORKS["mlp"]
    module = ds_al.ALPipelineModule(net.layers(), num_classes=net.classes, base_seed=SEED)
    unread = Unread()
    module.local_layers[1][1].f = nn.Sequential(module.local_layers[1][1].f, unread)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(micro_batches=1))
    batches = iter(net.batches(16))
    engine.train_batch(batches)
    with torch.no_grad():
        unread.weight[1] = torch.inf
    for _ in range(7):  # micro-batches 1 to 7
        engine.train_batch(batches)
    with pytest.raises(ALLayerError, match=r"weight f\S* holds (nan|inf)"):
        engine.flush() if saves else engine.train_batch(batches)


def test_what_cannot_skip_is_refused() -> None:
    base = {"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "SGD"}, "associated_learning": SKIP}
    with pytest.raises(ALConfigError, match=r"non_finite.*skip.*with fp16"):
        Settings.of({**base, "fp16": {"enabled": True}}, is_al=True)
    with pytest.raises(ALConfigError, match=r"non_finite.*back-propagation"):
        al_config({"associated_learning": {**SKIP, "method": "bp_1f1b"}})
    with pytest.raises(ALConfigError, match=r"non_finite.*on a GPU"):
        FiniteCheck([], stage_id=0, device=torch.device("cuda"), skips=True)
    with pytest.raises(ALConfigError, match=r"non_finite.*save_and_stop.*on a GPU"):
        FiniteCheck([], stage_id=0, device=torch.device("cuda"), skips=True, found=lambda *_: None)
