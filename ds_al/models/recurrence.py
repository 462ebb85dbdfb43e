"""Bidirectional LSTM over padded sequences whose backward pass is linear in their length.

torch's LSTM over packed sequences slices its input with ``narrow`` at every step. On CPUs the backward pass of each
slice fills a gradient of the whole sequence, so its time is quadratic in the length. Here the sequence is unbound into
steps once, and both directions are computed together at each step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

States = tuple[Tensor, Tensor]


def bidirectional_lstm(lstm: nn.LSTM, x: Tensor, lengths: Tensor, start: States | None) -> tuple[Tensor, States]:
    """Computes ``lstm`` on sequences packed by length, equal up to rounding.

    Args:
        lstm: holds the weights; one layer, bidirectional, batch first.
        x: ``(B, T, F)``, padded at the end.
        lengths: ``(B,)``, int64, each from 1 to T.
        start: ``(h, c)``, each ``(2, B, D)``; ``None`` for zeros.

    Returns:
        The hidden states ``(B, T, 2 D)``, 0 at padding, and the final ``(h, c)``.
    """
    w_ih, w_hh, b_ih, b_hh = (
        [getattr(lstm, f"{name}_l0{side}") for side in ("", "_reverse")]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    # Added before they are stacked: otherwise autograd would give both biases one memory for their gradients.
    bias = torch.stack([b_ih[0] + b_hh[0], b_ih[1] + b_hh[1]])
    batch, steps, _ = x.shape
    time = torch.arange(steps, device=x.device)
    order = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)  # reverses; padding stays last
    both = torch.stack([x, _at(x, order)]).flatten(1, 2)
    inputs = torch.baddbmm(bias.unsqueeze(1), both, torch.stack(w_ih).transpose(1, 2)).unflatten(1, (batch, steps))

    h, c = start if start is not None else 2 * (x.new_zeros(2, batch, lstm.hidden_size),)
    recurrent = torch.stack(w_hh).transpose(1, 2).contiguous()
    hs, cs = [], []
    for at_t in inputs.unbind(2):
        i, f, g, o = torch.baddbmm(at_t, h, recurrent).chunk(4, dim=2)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hs.append(h)
        cs.append(c)

    all_h = torch.stack(hs, dim=2)
    last = (lengths - 1).view(1, batch, 1, 1).expand(2, batch, 1, lstm.hidden_size)
    final = (states.gather(2, last).squeeze(2) for states in (all_h, torch.stack(cs, dim=2)))
    hidden = torch.cat([all_h[0], _at(all_h[1], order)], dim=2)
    return hidden.masked_fill((time >= lengths[:, None]).unsqueeze(2), 0.0), tuple(final)  # type: ignore[return-value]


def _at(x: Tensor, order: Tensor) -> Tensor:
    """Reorders ``(B, T, F)`` along T by the indices ``(B, T)``."""
    return x.gather(1, order.unsqueeze(2).expand_as(x))
