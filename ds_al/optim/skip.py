"""Steps of a layer that are left out: those on numbers that are NaN or infinite.

A layer decides by itself, without other layers or stages: its gradients alone say so. Where an output or a loss of a
micro-batch is not finite, :class:`~ds_al.optim.finite.FiniteCheck` sets the gradients to NaN, so that their mean over
data parallel replicas tells all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ds_al.optim.finite import not_finite


class LayerSkip:
    """Leaves out the steps of one layer on gradients that are not finite.

    Args:
        layer: index of the layer, for errors.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.skipped = 0
        """Number of skipped steps."""

    @property
    def value(self) -> float:
        """Factor of the losses until the next step."""
        return 1.0

    def admits(self, gradients: Sequence[Tensor], *, agree: Callable[[bool], bool] | None = None) -> bool:
        """Returns whether all gradients are finite, so that the layer can step; counts a step that it cannot take.

        Args:
            agree: returns whether the gradients of all parts of the layer are finite, of those of this stage.
        """
        values = (gradient._values() if gradient.is_sparse else gradient for gradient in gradients)
        finite = all(not_finite(value) is None for value in values)
        finite = finite if agree is None else agree(finite)
        self.skipped += not finite
        return finite

    def state(self) -> dict[str, Any]:
        """Returns the state for :meth:`restore`, as numbers."""
        return {"skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a state returned by :meth:`state`."""
        self.skipped = state["skipped"]
