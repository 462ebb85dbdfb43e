"""Activation checkpointing inside a layer: f keeps the inputs of its segments, and its local backward runs them again.

    f = segment_1 .. segment_n      forward keeps s before each segment, and none of what the segment computes inside
    backward of segment_j           runs segment_j again from what was kept, then goes back through it

The second run draws the random numbers of the first and reads the buffers that the first one read, so neither weights
nor buffers (a batch norm's running mean) change in any bit.

Built on ``torch.utils.checkpoint``. DeepSpeed's own function is not used: its settings are the process's, not a
layer's; what it partitions it spreads over the model parallel group, which in a pipeline is all stages, so that
they would wait for each other; and what it keeps is not seen by :class:`~ds_al.trace.ActivationMeter`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_al.tensors import Activation


class Recomputed:
    """Runs ``f`` so that only the inputs of its segments are kept for backward.

    Args:
        f: a chain (``nn.Sequential``), whose children are its blocks, or any other module, which is one block.
        interval: blocks of a segment, at least 1.
    """

    def __init__(self, f: nn.Module, *, interval: int) -> None:
        # A subclass may do more than call its children one after another.
        blocks = list(f) if isinstance(f, nn.Sequential) and type(f).forward is nn.Sequential.forward else [f]
        self.segments: Sequence[nn.Module] = [
            blocks[i] if interval == 1 or len(blocks) == 1 else nn.Sequential(*blocks[i : i + interval])
            for i in range(0, len(blocks), interval)
        ]
        """Modules, called one after another; each runs twice."""
        self._always = torch.empty(0, requires_grad=True)

    def __call__(self, s: Activation) -> Activation:
        """``f(s)``."""
        for segment in self.segments:
            s = self._run(segment, s)
        return s

    def _run(self, segment: nn.Module, s: Activation) -> Activation:
        parts = s if isinstance(s, tuple) else (s,)
        learns = any(p.requires_grad for p in segment.parameters()) or any(part.requires_grad for part in parts)
        if not torch.is_grad_enabled() or not learns:
            return segment(s)
        before = {name: buffer.clone() for name, buffer in segment.named_buffers()}

        def run(_: Tensor, *parts: Tensor) -> Activation:
            given = parts if isinstance(s, tuple) else parts[0]
            if not torch.is_grad_enabled() or not before:  # the first run, or nothing that it may change
                return segment(given)
            return torch.func.functional_call(segment, before, (given,))

        # The reentrant form wants an input with a gradient, which x and what comes from another layer do not have:
        # hence one more, without elements. In its second run the saved tensors are autograd's own and can be counted.
        return checkpoint(run, self._always, *parts, use_reentrant=True)
