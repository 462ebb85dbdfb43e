"""ActivationMeter counts what autograd holds, and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from ds_al.trace import ActivationMeter

FLOAT = 4  # bytes


def test_counts_what_is_known_by_hand() -> None:
    layer = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    with ActivationMeter(exclude=layer.parameters()) as meter:
        out = layer(torch.randn(2, 3))
    assert out.requires_grad
    assert meter.current_tensors == 2  # the input of the linear map, and the output of ReLU
    assert meter.current_bytes == (2 * 3 + 2 * 5) * FLOAT
    assert (meter.peak_bytes, meter.peak_tensors) == (meter.current_bytes, meter.current_tensors)


def test_parameters_are_excluded() -> None:
    layer = nn.Linear(3, 5)
    x = torch.randn(2, 3, requires_grad=True)  # so that the weight is saved, too
    with ActivationMeter() as with_weight:
        kept = layer(x)
    with ActivationMeter(exclude=layer.parameters()) as without:
        also_kept = layer(x)
    assert kept.requires_grad and also_kept.requires_grad
    assert with_weight.current_bytes - without.current_bytes == 3 * 5 * FLOAT
    assert without.current_tensors == 1


def test_tensors_of_one_storage_count_once() -> None:
    x = torch.randn(8, requires_grad=True)
    with ActivationMeter() as meter:
        y = x.exp()  # saves its output
        z = y[:4] * y[4:]  # saves two views of it
    assert z.requires_grad
    assert (meter.current_tensors, meter.current_bytes) == (1, 8 * FLOAT)


def test_falls_to_zero_after_backward_and_keeps_the_peak() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with ActivationMeter(exclude=layer.parameters()) as meter:
        for _ in range(3):
            layer(torch.randn(2, 4)).sum().backward()
    assert (meter.current_bytes, meter.current_tensors) == (0, 0)
    assert (meter.peak_bytes, meter.peak_tensors) == (2 * 2 * 4 * FLOAT, 2)


def test_falls_to_zero_when_a_graph_is_dropped_after_the_context() -> None:
    with ActivationMeter() as meter:
        y = torch.randn(4, requires_grad=True).exp()
    assert meter.current_tensors == 1
    del y
    assert (meter.current_bytes, meter.current_tensors) == (0, 0)


def test_gradients_are_those_without_the_meter() -> None:
    layer, x = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 1)), torch.randn(6, 4)
    layer(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    with ActivationMeter(exclude=layer.parameters()):
        loss = layer(x).sum()
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(layer.parameters(), expected, strict=True))


def test_second_derivatives_pass_through() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    with ActivationMeter():
        (first,) = torch.autograd.grad(x**3, x, create_graph=True)
        (second,) = torch.autograd.grad(first, x)
    assert second.item() == 12.0
