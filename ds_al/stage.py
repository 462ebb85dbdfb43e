"""The computation of one stage: forward, local losses and local backward of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ds_al.errors import ALError, ALLayerError
from ds_al.layer import ALLayer, seed_layer
from ds_al.optim.finite import FiniteCheck
from ds_al.optim.loss_scale import LayerScale
from ds_al.tensors import Activation, Target, stop_gradient
from ds_al.trace.recorder import Recording


@dataclass(slots=True)
class _Pass:
    """State that one layer keeps between its forward and its local backward."""

    index: int
    layer: ALLayer
    s_out: Activation
    t_out: Target
    t_in: Target


class LocalStage:
    """The AL layers of one stage, independent of neighbours and of the schedule.

    Args:
        layers: ``(index in the network, layer)``, in order.
        stage_id: number of the stage, for errors.
        base_seed: seeds all random draws of a layer, together with layer, micro-batch and pass.
        device: where the losses are summed.
        number: maps this stage's count of micro-batches to the number that seeds the draws of one.
        loss_scales: scale of the losses before backward, by index of the layer.
        recording: receives each layer's part of forward and backward while a recorder is set.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, ALLayer]],
        *,
        stage_id: int,
        base_seed: int,
        device: torch.device,
        number: Callable[[int], int] = int,
        loss_scales: Mapping[int, LayerScale] | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.layers = layers
        self.stage_id = stage_id
        self.base_seed = base_seed
        self.trained_micro_batches = 0
        """Micro-batches whose backward is done; numbers the random draws of the layers."""
        self._recording = recording or Recording()
        self._passes: list[_Pass] = []
        self._device = device
        self._number = number
        self._scales = loss_scales or {}
        self._gradient: dict[float, Tensor] = {}
        self._losses: list[Tensor] = []
        self.finite = FiniteCheck(layers, stage_id=stage_id, device=device, scaled=self._scales)

    def forward(self, s: Activation, t: Target) -> tuple[Activation, Target]:
        """Runs f and g of every layer, and keeps the graphs for the backward.

        Returns:
            ``(s, t)`` of the last layer, without a graph: the input of the next stage.

        Raises:
            ALLayerError: a layer raised, or returned something other than finite tensors.
        """
        recorder = self._recording.recorder
        for index, layer in self.layers:
            t_in, start = t, None if recorder is None else recorder.mark()
            try:
                self._seed(index, part=0)
                s_out, t_out = layer(s, t)
            except Exception as error:
                self._blame(error, layer, "forward")
            if recorder is not None:
                recorder.add_layer("ForwardPass", index, start, recorder.mark())
            self.finite.outputs(index, s_out, t_out, micro_batch=self.trained_micro_batches)
            self._passes.append(_Pass(index, layer, s_out, t_out, t_in))
            s, t = stop_gradient(s_out), stop_gradient(t_out)
        return s, t

    def backward(self, *, scale: float) -> None:
        """Computes both losses of every layer, accumulates ``scale`` times their gradients, and frees the graphs.

        Raises:
            ALLayerError: a layer raised, or a loss, gradient or weight is not finite.
        """
        passes, self._passes = self._passes, []
        recorder = self._recording.recorder
        for row, kept in enumerate(passes):
            start = None if recorder is None else recorder.mark()
            try:
                self._seed(kept.index, part=1)
                losses = kept.layer.local_losses(kept.s_out, kept.t_out, kept.t_in)
                learning = [loss for loss in losses if loss.requires_grad]
                if learning:
                    own = self._scales[kept.index].value * scale if self._scales else scale
                    torch.autograd.backward(learning, self._gradients(own, len(learning)))
            except Exception as error:
                self._blame(error, kept.layer, "local losses and backward")
            self.finite.before_step(kept.index, losses, micro_batch=self.trained_micro_batches)
            self._losses += [loss.detach() for loss in losses]
            passes[row] = None  # type: ignore[call-overload]  # frees this layer's graph and activations
            if recorder is not None:
                recorder.add_layer("BackwardPass", kept.index, start, recorder.mark())
        self.finite.after_backward(micro_batch=self.trained_micro_batches)
        self.trained_micro_batches += 1

    def _gradients(self, scale: float, count: int) -> list[Tensor] | None:
        """Returns the gradient of each loss: ``scale``, constructed once, or ``None`` for 1, which is cheaper."""
        if scale == 1:
            return None
        if scale not in self._gradient:  # few: loss scales are powers of 2
            self._gradient[scale] = torch.tensor(scale, device=self._device)
        return [self._gradient[scale]] * count

    def take_losses(self, micro_batches: int) -> Tensor:
        """Returns the means ``(layers, 2)`` of ``(A_i, E_i)`` over the micro-batches since the last call."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).view(-1, len(self.layers), 2).sum(dim=0) / micro_batches

    def _seed(self, layer: int, *, part: int) -> None:
        seed_layer(self.base_seed, layer=layer, step=self._number(self.trained_micro_batches), part=part)

    def _blame(self, error: Exception, layer: ALLayer, what: str) -> NoReturn:
        """Raises the error of a layer with stage, layer and micro-batch in its message."""
        if isinstance(error, ALError):
            raise type(error)(f"stage {self.stage_id}, micro-batch {self.trained_micro_batches}: {error}") from None
        raise ALLayerError(
            f"stage {self.stage_id}, {layer.label}, {what} of micro-batch {self.trained_micro_batches}: "
            f"{type(error).__name__}: {error}"
        ) from error
