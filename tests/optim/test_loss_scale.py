"""The loss scale of a layer: how it moves, what it leaves out, and that it is the layer's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from torch import nn

from ds_al.config.precision import BF16Config, FP16Config, Precision
from ds_al.errors import ALLayerError
from ds_al.layer import ALLayer
from ds_al.optim.local import LocalOptimizer
from ds_al.optim.loss_scale import LayerScale
from ds_al.optim.masters import full_state, lower, stepped

FINITE, OVERFLOW = 1.0, float("inf")


@pytest.fixture(autouse=True)
def _first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's scaler asks for the rank, to print on the first one alone."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)


def scale_of(**options: Any) -> LayerScale:
    return LayerScale(3, Precision(torch.float16, FP16Config(enabled=True, **options)))


def steps(scale: LayerScale, *gradients: float) -> list[float]:
    """The scale after each of these."""
    after = []
    for value in gradients:
        scale.admits([torch.tensor([value])])
        after.append(scale.value)
    return after


def test_a_dynamic_scale_halves_after_overflows_and_doubles_after_a_window() -> None:
    scale = scale_of(initial_scale_power=4, loss_scale_window=2, hysteresis=1)
    assert scale.value == 16
    assert steps(scale, OVERFLOW, FINITE, FINITE, FINITE, OVERFLOW) == [8, 8, 8, 16, 8]
    assert scale.skipped == 2


def test_hysteresis_forgives_an_overflow() -> None:
    assert steps(scale_of(initial_scale_power=4, hysteresis=2), OVERFLOW, FINITE, OVERFLOW) == [16, 16, 8]
    again = scale_of(initial_scale_power=4, hysteresis=2, consecutive_hysteresis=True)
    assert steps(again, OVERFLOW, FINITE, OVERFLOW) == [16, 16, 16]


def test_a_fixed_scale_stays_and_still_leaves_overflows_out() -> None:
    scale = scale_of(loss_scale=128)
    assert steps(scale, FINITE, OVERFLOW, OVERFLOW) == [128, 128, 128] and scale.skipped == 2


def test_gradients_are_divided_by_the_scale() -> None:
    gradient = torch.tensor([16.0, -8.0])
    assert scale_of(initial_scale_power=4).admits([gradient]) and gradient.tolist() == [1.0, -0.5]


def test_an_overflow_at_the_smallest_scale_names_the_layer() -> None:
    scale = scale_of(initial_scale_power=1, min_loss_scale=1, hysteresis=2)
    assert steps(scale, OVERFLOW, OVERFLOW) == [2, 1]
    with pytest.raises(ALLayerError, match="AL layer 3: its gradients overflow float16 at the smallest loss scale, 1:"):
        steps(scale, OVERFLOW)


def test_a_scale_goes_on_from_its_state() -> None:
    one = scale_of(initial_scale_power=4, loss_scale_window=3, hysteresis=1)
    steps(one, FINITE, OVERFLOW, FINITE)
    two = scale_of(initial_scale_power=4, loss_scale_window=3, hysteresis=1)
    two.restore(one.state())
    rest = (FINITE, FINITE, FINITE, OVERFLOW, FINITE)
    assert two.skipped == 1 and steps(two, *rest) == steps(one, *rest)


def test_only_the_layer_that_overflows_leaves_its_step_out() -> None:
    """NaN stays in the gradients of one layer; its moments and weights are as they were, the other layer steps."""
    torch.manual_seed(0)
    layers = [ALLayer(*(nn.Linear(2, 2) for _ in "fbgh")) for _ in range(2)]
    precision = Precision(torch.bfloat16, BF16Config(enabled=True))
    lower(layers, torch.bfloat16, owned=lambda _: True, trained=lambda _: True)
    scales = {index: LayerScale(index, precision) for index in range(2)}
    optimizer = LocalOptimizer(
        list(enumerate(layers)), associated=torch.optim.Adam, autoencoder=torch.optim.Adam, clip=1.0, scales=scales
    )
    before = [{name: value.clone() for name, value in full_state(layer).items()} for layer in layers]
    for number, layer in enumerate(layers):
        x = torch.full((4, 2), float("nan") if number else 1.0, dtype=torch.bfloat16)
        sum(part(x).float().sum() for part in (layer.f, layer.b, layer.g, layer.h)).backward()  # type: ignore[union-attr]
        assert all(p.grad is None and stepped(p).grad.dtype is torch.float32 for p in layer.parameters())  # type: ignore[union-attr]
    optimizer.step()
    after = [full_state(layer) for layer in layers]
    assert all(torch.equal(before[1][name], value) for name, value in after[1].items())
    assert not any(torch.equal(before[0][name], value) for name, value in after[0].items())
    assert [scale.skipped for scale in scales.values()] == [0, 1]
    assert {parameter for parameter, state in optimizer.state.items() if state} == {
        stepped(p) for p in layers[0].parameters()
    }
