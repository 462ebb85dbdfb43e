"""Bridges of text networks: auxiliary heads that map a sequence activation to a code ``(B, K)``.

linear   a summary of the sequence (the masked mean or an LSTM's final state), then linear
block    masked means of every ``stride`` tokens, linear to a narrow width, one block of the network's own kind,
         masked mean, linear; the bridge of the last layer stays linear, like the twin's head
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
    """Returns the whole activation: the ``reduce`` of bridges that need all of it."""
    return s


def pooled(s: Activation, stride: int) -> tuple[Tensor, Tensor]:
    """Maps ``(hidden (B, T, D), ..., mask (B, T))`` to masked means of every ``stride`` tokens.

    Windows start at the first token, so padding at the end adds windows of padding and changes no other window.

    Returns:
        Hidden states ``(B, T / stride, D)``, with T / stride rounded up, and a mask that is true for windows with a
        token.
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
        width: input width of the block.
        block: maps ``(hidden (B, T', width), mask (B, T'))`` to hidden states of ``out_features``.
        out_features: output width of the block.
        stride: tokens per window, 1 for the whole sequence.
        code_width: K.
        code: set of codes, see :mod:`ds_al.models.targets`.
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
        """Uses hidden states and mask; states of an LSTM are ignored."""
        hidden, mask = pooled(s, self.stride)
        # The linear layer maps padding to non-zero values, but the block ignores them by the mask.
        return self.code(masked_mean(self.block((self.narrow(hidden), mask))))


def check_bridge(bridge: str, *, width: float, stride: int) -> None:
    """Checks the options of a text bridge.

    Raises:
        ALConfigError: an option is unknown or out of range.
    """
    if bridge not in ("linear", "block"):
        raise ALConfigError(f"got bridge={bridge!r}: expected 'linear' or 'block'")
    if not width > 0:
        raise ALConfigError(f"got bridge_width={width}: expected a share of the network's width above 0, such as 0.5")
    if stride < 1:
        raise ALConfigError(f"got bridge_stride={stride}: expected 1 or more tokens")
