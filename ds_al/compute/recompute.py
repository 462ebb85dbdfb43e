"""Activation checkpointing inside a layer: f keeps the inputs of its segments alone, and recomputes them in backward.

    f = segment_1 .. segment_n      forward keeps the input of each segment, and no activations inside it
    backward of segment_j           recomputes segment_j from its input, then backpropagates through it

The second run uses the random numbers and the buffers of the first, so weights and buffers (a batch norm's running
mean) are bit-identical.

Built on ``torch.utils.checkpoint``. DeepSpeed's own function is not used: its settings are global to the process, not
per layer; it partitions activations over the model parallel group, which in a pipeline contains all stages, so that
they would wait for each other; and :class:`~ds_al.trace.ActivationMeter` does not see the tensors it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_al.lending import Lender
from ds_al.tensors import Activation


class Recomputed:
    """Runs ``f`` with activation checkpointing: only the inputs of its segments are kept for backward.

    Args:
        f: an ``nn.Sequential``, whose children are its blocks, or any other module, which is one block.
        interval: number of blocks per segment, at least 1.
        copies_inputs: whether segments get copies of their inputs in every call, see :mod:`ds_al.lending`.
    """

    def __init__(self, f: nn.Module, *, interval: int, copies_inputs: bool = False) -> None:
        # A subclass may override forward, and then is one block.
        blocks = list(f) if isinstance(f, nn.Sequential) and type(f).forward is nn.Sequential.forward else [f]
        self.segments: Sequence[nn.Module] = [
            blocks[i] if interval == 1 or len(blocks) == 1 else nn.Sequential(*blocks[i : i + interval])
            for i in range(0, len(blocks), interval)
        ]
        """Segments, called in sequence; each runs twice."""
        self._lenders = [Lender("f", module=segment, always_copies=copies_inputs) for segment in self.segments]
        self._always = torch.empty(0, requires_grad=True)

    def __call__(self, s: Activation) -> Activation:
        """Returns ``f(s)``."""
        for segment, lend in zip(self.segments, self._lenders, strict=True):
            s = self._run(segment, lend, s)
        return s

    def _run(self, segment: nn.Module, lend: Lender, s: Activation) -> Activation:
        parts = s if isinstance(s, tuple) else (s,)
        learns = any(p.requires_grad for p in segment.parameters()) or any(part.requires_grad for part in parts)
        if not torch.is_grad_enabled() or not learns:
            return lend(segment, s)
        before = {name: buffer.clone() for name, buffer in segment.named_buffers()}

        def run(_: Tensor, *parts: Tensor) -> Activation:
            given = parts if isinstance(s, tuple) else parts[0]
            if not torch.is_grad_enabled():  # the first run
                return lend(segment, given)
            if not before:  # no buffers that the second run could change
                return lend(segment, given, again=True)
            return lend(lambda s: torch.func.functional_call(segment, before, (s,)), given, again=True)

        # The reentrant form requires an input with a gradient, which x and inputs from another layer lack: hence an
        # additional one without elements. In its second run autograd saves the tensors, so the meter can count them.
        return checkpoint(run, self._always, *parts, use_reentrant=True)
