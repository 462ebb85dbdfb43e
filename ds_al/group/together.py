"""What the stages of a group tell each other before they step, with ``"group_step": "together"``.

    stage 0  -- own -->  stage 1  -- own of 0, 1 -->  stage 2     through the group
             <-- all --           <------ all ------               and back

A norm over a layer, and whether its gradients overflow, need the gradients of all its stages. Values are joined in the
order of the stages, and each stage reduces all of them itself: the bits do not depend on where a layer is cut.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ds_al.transport.neighbours import Links


class Together:
    """The exchange of one stage with the others of its group.

    Args:
        links: channels of the stage.
        device: device of the values.
    """

    def __init__(self, links: Links, *, device: torch.device) -> None:
        self._up, self._down, self._device = links.together, links.together_back, device
        self._waited = 0.0

    def take_waited(self) -> float:
        """Returns the seconds waited for the other stages since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def finite(self, own: bool) -> bool:
        """Returns whether the gradients of all stages are finite; waits for them."""
        return bool(self._joined(torch.tensor([float(own)], device=self._device)).all())

    def norms(self, own: Tensor) -> Tensor:
        """Returns the norms ``(n,)`` of the gradients of all stages, in their order; waits for them."""
        return self._joined(own)

    def _joined(self, own: Tensor) -> Tensor:
        start = time.perf_counter()
        values = torch.cat([own.new_ones(1), own])  # a message is never empty
        if self._up.receiver is not None:
            values = torch.cat([self._up.receiver.receive()[0], own])
            self._up.receiver.release()
        if self._up.sender is not None:
            self._up.sender.send((values,))
        if self._down.receiver is not None:
            values = self._down.receiver.receive()[0].clone()
            self._down.receiver.release()
        if self._down.sender is not None:
            self._down.sender.send((values,))
        self._waited += time.perf_counter() - start
        return values[1:]
