"""Bridges of text networks: what an AL layer's sequence says about the code ``(B, K)``.

linear   what sums the sequence up, the masked mean or an LSTM's final state, then linear
block    masked means of every ``stride`` tokens, linear to a narrow width, one block of the network's own kind,
         masked mean, linear; the last layer's stays linear, as the twin's head is
"""

from __future__ import annotations

from typing import Literal

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.errors import ALConfigError
from ds_al.models.output import Output
from ds_al.models.sequence import masked_mean
from ds_al.models.targets import code_end
from ds_al.tensors import Activation

BridgeKind = Literal["linear", "block"]


def whole(s: Activation) -> Activation:
    """The ``reduce`` of a bridge that reads the whole activation."""
    return s


def pooled(s: Activation, stride: int) -> tuple[Tensor, Tensor]:
    """``(hidden (B, T, D), ..., mask (B, T))`` to masked means of every ``stride`` tokens.

    Windows start at the first token, so padding at the end adds windows of padding and changes no other.

    Returns:
        Hidden states ``(B, T / stride, D)``, T / stride rounded up, and a mask that is true where a window has a token.
    """
    hidden, mask = s[0], s[-1]
    if stride == 1:
        return hidden, mask
    missing = -mask.shape[1] % stride
    mask = nn.functional.pad(mask, (0, missing)).unflatten(1, (-1, stride))
    hidden = nn.functional.pad(hidden, (0, 0, 0, missing)).unflatten(1, (-1, stride))
    total = hidden.masked_fill(~mask.unsqueeze(3), 0.0).sum(dim=2)
    return total / mask.sum(dim=2).clamp(min=1).unsqueeze(2), mask.any(dim=2)


class BlockBridge(nn.Module):
    """One small block over a shortened sequence: ``(hidden (B, T, D), ..., mask (B, T)) -> (B, K)``.

    Args:
        in_features: D.
        width: that the block reads.
        block: makes hidden states of ``out_features`` from ``(hidden (B, T', width), mask (B, T'))``.
        out_features: that the block gives.
        stride: tokens per window, 1 for the whole sequence.
        code_width: K.
        code: where codes live, see :mod:`ds_al.models.targets`.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        block: LayerSpec,
        out_features: int,
        *,
        stride: int,
        code_width: int,
        code: str,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.narrow = nn.Linear(in_features, width)
        self.block = block.build()
        self.code = nn.Sequential(Output(out_features, code_width), code_end(code, code_width))

    def forward(self, s: Activation) -> Tensor:
        """Reads hidden states and mask; states of an LSTM are left aside."""
        hidden, mask = pooled(s, self.stride)
        # What a linear layer makes of padding is not 0, but no block reads it: the mask goes along.
        return self.code(masked_mean(self.block((self.narrow(hidden), mask))))


def check_bridge(bridge: str, *, width: float, stride: int) -> None:
    """Refuses options of a text bridge.

    Raises:
        ALConfigError: an option is unknown or out of range.
    """
    if bridge not in ("linear", "block"):
        raise ALConfigError(f"got bridge={bridge!r}: expected 'linear' or 'block'")
    if not width > 0:
        raise ALConfigError(f"got bridge_width={width}: expected a share of the network's width above 0, such as 0.5")
    if stride < 1:
        raise ALConfigError(f"got bridge_stride={stride}: expected 1 or more tokens")
