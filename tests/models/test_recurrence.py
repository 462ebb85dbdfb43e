"""The LSTM that computes both directions together is torch's own over packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_al.models.lstm import _packed
from ds_al.models.recurrence import bidirectional_lstm

LENGTHS = torch.tensor([5, 1, 7, 4])


def _parts(run: Callable[..., Any], x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, then the gradients of all inputs and weights."""
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 8, batch_first=True, bidirectional=True).double()
    x = x.clone().requires_grad_()
    states = tuple(part.clone().requires_grad_() for part in states)
    hidden, (h, c) = run(lstm, x, LENGTHS, states or None)
    loss = hidden.square().sum() + h.pow(3).sum() + c.sin().sum()
    return [hidden, h, c, *torch.autograd.grad(loss, [x, *states, *lstm.parameters()])]


@pytest.mark.parametrize("starts", [False, True])
def test_outputs_and_gradients_are_those_of_packed_sequences(starts: bool) -> None:
    """With sequences that end before the batch's longest, and a longest that ends before the padding does."""
    torch.manual_seed(1)
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    states = (torch.randn(2, 4, 8).double(), torch.randn(2, 4, 8).double()) if starts else ()
    for got, expected in zip(_parts(bidirectional_lstm, x, states), _parts(_packed, x, states), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_accumulate() -> None:
    """Each bias has a gradient in memory of its own, which a second micro-batch adds to."""
    torch.manual_seed(3)
    lstm, x = nn.LSTM(6, 8, batch_first=True, bidirectional=True).double(), torch.randn(4, 9, 6, dtype=torch.float64)

    def loss() -> Tensor:
        return bidirectional_lstm(lstm, x, LENGTHS, None)[0].square().sum()

    once = torch.autograd.grad(loss(), list(lstm.parameters()))
    for _ in range(3):
        loss().backward()
    for parameter, gradient in zip(lstm.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * gradient)


def test_padding_is_read_by_neither_direction() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 9, 6, dtype=torch.float64)
    other = x.clone()
    other[torch.arange(9) >= LENGTHS[:, None]] = 1e3
    for got, expected in zip(_parts(bidirectional_lstm, other, ()), _parts(bidirectional_lstm, x, ()), strict=True):
        assert torch.equal(got, expected)
