"""One stage: losses that are not finite are found on every device, and name their layer."""

from __future__ import annotations

import pytest
import torch

from ds_al import stage as stage_module
from ds_al.errors import ALLayerError
from ds_al.stage import LocalStage
from tests.support.networks import NETWORKS

NAN = torch.tensor([[0.5, 0.25], [float("nan"), 0.5]])
FINE = torch.ones(2, 2)


def make_stage() -> LocalStage:
    layers = NETWORKS["mlp"].build(7)[:2]
    return LocalStage(list(enumerate(layers)), stage_id=0, base_seed=7, device=torch.device("cpu"))


def test_a_loss_that_is_not_finite_names_its_layer_at_once() -> None:
    with pytest.raises(ALLayerError, match=r"stage 0, AL layer Block: the associated loss is nan up to micro-batch 0"):
        make_stage().check_finite(NAN)


class Late:
    """Numbers that a GPU has not copied to the host yet."""

    arrived = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def is_there(self) -> bool:
        return self.arrived

    def wait(self) -> torch.Tensor:
        return self.tensor


def test_where_the_host_does_not_wait_it_is_found_once_the_numbers_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU such losses once were found by nobody: the check was for the CPU alone."""
    monkeypatch.setattr(stage_module, "HostCopy", Late)
    stage = make_stage()
    stage.check_finite(NAN)
    stage.trained_micro_batches = 4
    stage.check_finite(FINE)
    monkeypatch.setattr(Late, "arrived", True)
    with pytest.raises(ALLayerError, match="the associated loss is nan up to micro-batch 0"):
        stage.check_finite(FINE)


def test_the_end_waits_for_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "HostCopy", Late)
    stage = make_stage()
    stage.check_finite(FINE)
    stage.check_finite(NAN)
    with pytest.raises(ALLayerError, match="is nan"):
        stage.check_finite(wait=True)


@pytest.mark.cuda
def test_on_a_gpu_the_host_does_not_wait() -> None:
    stage = make_stage()
    with torch.cuda.device(0):
        losses = NAN.to("cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            stage._unchecked.append((stage_module.HostCopy(losses), 0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ALLayerError, match="is nan"):
        stage.check_finite(wait=True)
