"""The computation of one stage: forward, local losses and local backward of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ds_al.errors import ALLayerError
from ds_al.layer import ALLayer, located, seed_layer
from ds_al.optim.finite import FiniteCheck
from ds_al.optim.skip import LayerSkip
from ds_al.system.generators import Generators
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
    buffers: list[Tensor]
    """Copies of the layer's buffers before the forward, where a micro-batch may have to be undone."""


class LocalStage:
    """The AL layers of one stage, independent of neighbours and of the schedule.

    Args:
        layers: ``(index in the network, layer)``, in order.
        stage_id: number of the stage, for errors.
        base_seed: seeds all random draws of a layer, together with layer, micro-batch and pass.
        device: where the losses are summed.
        number: maps this stage's count of micro-batches to the number that seeds the draws of one.
        loss_scales: scale of the losses before backward, by index of the layer.
        skips: whether numbers that are not finite leave out the layer's step, and raise no error.
        found: called with each of them, see :class:`~ds_al.optim.finite.FiniteCheck`.
        fixed_shapes: whether what a layer returns must keep its shapes and types, since a next stage receives it.
        generators: the user's generators, which layers draw from with seeds of their own.
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
        loss_scales: Mapping[int, LayerSkip] | None = None,
        skips: bool = False,
        found: Callable[[int, int, str], None] | None = None,
        fixed_shapes: bool = False,
        generators: Generators | None = None,
        recording: Recording | None = None,
    ) -> None:
        self.layers = layers
        self.stage_id = stage_id
        self.base_seed = base_seed
        self.trained_micro_batches = 0
        """Micro-batches whose backward is done; numbers the random draws of the layers."""
        self._fixed_shapes = fixed_shapes
        self._shapes: dict[int, list[tuple[tuple[int, ...], torch.dtype]]] = {}
        self._generators = generators or Generators()
        self._recording = recording or Recording()
        self._passes: list[_Pass] = []
        self._device = device
        self._number = number
        self._scales = loss_scales or {}
        self._gradient: dict[float, Tensor] = {}
        self._losses: list[Tensor] = []
        self.finite = FiniteCheck(
            layers, stage_id=stage_id, device=device, scaled=self._scales, skips=skips, found=found
        )

    @property
    def next_micro_batch(self) -> int:
        """Number of the micro-batch whose forward is next, counted from 0."""
        return self.trained_micro_batches

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
            buffers = self.finite.buffers(layer)
            try:
                self._seed(index, part=0)
                s_out, t_out = layer(s, t)
                if self._fixed_shapes:
                    self._check_shape(index, layer, s_out)
            except Exception as error:
                self._blame(error, layer, "forward")
            if recorder is not None:
                recorder.add_layer("ForwardPass", index, start, recorder.mark())
            self.finite.outputs(index, s_out, t_out, micro_batch=self.trained_micro_batches)
            self._passes.append(_Pass(index, layer, s_out, t_out, t_in, buffers))
            s, t = stop_gradient(s_out), stop_gradient(t_out)
        self._generators.after_pass()
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
            self.finite.before_step(kept.index, losses, micro_batch=self.trained_micro_batches, buffers=kept.buffers)
            self._losses += [loss.detach() for loss in losses]
            passes[row] = None  # type: ignore[call-overload]  # frees this layer's graph and activations
            if recorder is not None:
                recorder.add_layer("BackwardPass", kept.index, start, recorder.mark())
        self._generators.after_pass()
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
        self._generators.seed_host()

    def _blame(self, error: Exception, layer: ALLayer, what: str) -> NoReturn:
        """Raises the error of a layer with stage, layer and micro-batch in its message."""
        what = f"{what} of micro-batch {self.trained_micro_batches}"
        raise located(error, layer, stage=self.stage_id, what=what) from error

    def _check_shape(self, index: int, layer: ALLayer, s_out: Activation) -> None:
        """Checks that a layer returns the same shapes and types as before."""
        shapes = [(tuple(part.shape), part.dtype) for part in (s_out if isinstance(s_out, tuple) else (s_out,))]
        former = self._shapes.setdefault(index, shapes)
        if shapes != former:
            raise ALLayerError(
                f"{layer.label}: f returned {_describe(shapes)} after {_describe(former)}; expected the same in every "
                "micro-batch, since messages to the next stage have one form. Call engine.reset_activation_shape() on "
                "every rank when it changes, or build the module with dynamic_shape=True"
            )

    def reset_shapes(self) -> None:
        """Accepts new shapes from the next micro-batch on."""
        self._shapes.clear()


def _describe(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return " and ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in shapes)
