"""One stage: numbers that are not finite are found on every device, and name layer, function and micro-batch."""

from __future__ import annotations

import pytest
import torch

from ds_al.errors import ALLayerError
from ds_al.optim import finite
from ds_al.stage import LocalStage
from tests.support.networks import NETWORKS

NAN_IN_G = r"stage 0, AL layer Block, micro-batch 1, function g: the output of g holds nan"


class Late:
    """Numbers that a GPU has not copied to the host yet."""

    arrived = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def is_there(self) -> bool:
        return self.arrived

    def wait(self) -> torch.Tensor:
        return self.tensor


def make_stage(*, late: bool = False) -> LocalStage:
    """Two layers; with ``late`` as on a GPU, whose host does not wait."""
    layers = NETWORKS["mlp"].build(7)[:2]
    stage = LocalStage(list(enumerate(layers)), stage_id=0, base_seed=7, device=torch.device("cpu"))
    stage.finite._waits = not late
    return stage


def train(stage: LocalStage, micro_batches: int) -> None:
    for x, labels in NETWORKS["mlp"].batches(micro_batches):
        stage.forward(x, torch.nn.functional.one_hot(labels, 4).float())
        stage.backward(scale=1.0)


def spoil(stage: LocalStage) -> None:
    with torch.no_grad():
        stage.layers[1][1].g.weight[0, 0] = float("nan")


def test_where_the_host_waits_it_is_found_before_the_output_leaves() -> None:
    stage = make_stage()
    train(stage, 1)
    spoil(stage)
    with pytest.raises(ALLayerError, match=r"micro-batch 1, function g: weight g\.weight holds nan"):
        train(stage, 1)


def test_where_the_host_does_not_wait_it_is_found_once_the_numbers_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such numbers once were found by nobody: the check was for the CPU alone."""
    monkeypatch.setattr(finite, "HostCopy", Late)
    stage = make_stage(late=True)
    train(stage, 1)
    spoil(stage)
    train(stage, 2)
    monkeypatch.setattr(Late, "arrived", True)
    with pytest.raises(ALLayerError, match=NAN_IN_G):
        train(stage, 1)


def test_the_host_waits_for_the_numbers_of_eight_micro_batches_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "HostCopy", Late)
    stage = make_stage(late=True)
    train(stage, 1)
    spoil(stage)
    train(stage, finite.BEHIND)
    with pytest.raises(ALLayerError, match=NAN_IN_G):
        train(stage, 1)


def test_a_save_and_the_end_wait_for_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "HostCopy", Late)
    stage = make_stage(late=True)
    train(stage, 1)
    spoil(stage)
    train(stage, 1)
    with pytest.raises(ALLayerError, match=NAN_IN_G):
        stage.finite.settle()


def test_a_sparse_gradient_without_entries_has_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A maximum norm over no number is an error of torch."""
    monkeypatch.setattr(finite, "HostCopy", Late)
    stage = make_stage(late=True)
    weight = stage.layers[1][1].g.weight
    indices, values = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, weight.shape[1])
    weight.grad = torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=True)
    losses = [torch.zeros(()), torch.zeros(())]
    stage.finite.before_step(1, losses, micro_batch=1)
    weight.grad = None
    stage.finite.settle()


@pytest.mark.cuda
def test_on_a_gpu_the_host_does_not_wait() -> None:
    layers = [layer.to("cuda") for layer in NETWORKS["mlp"].build(7)[:2]]
    stage = LocalStage(list(enumerate(layers)), stage_id=0, base_seed=7, device=torch.device("cuda"))
    ((x, labels),) = NETWORKS["mlp"].batches(1)
    x, t = x.to("cuda"), torch.nn.functional.one_hot(labels, 4).float().to("cuda")
    stage.forward(x, t)
    stage.backward(scale=1.0)
    spoil(stage)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage.forward(x, t)
        stage.backward(scale=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ALLayerError, match=NAN_IN_G):
        stage.finite.settle()
