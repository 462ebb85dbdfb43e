"""The computation of one stage of a group: forward and backward of its part of an AL layer.

The graphs of several micro-batches are alive at a time (:mod:`ds_al.group_schedule`), each in a :class:`MicroBatch`.
Inside a group a message carries, beside activation and target, the state of the random number generators after the
sender's blocks: f draws from one stream of numbers from its first block to its last, however it is cut.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_al.compute.split import QueuedGradients, SplitBackward
from ds_al.errors import ALLayerError
from ds_al.group_schedule import Place
from ds_al.layer import seed_layer
from ds_al.partition.part import LayerPart
from ds_al.stage import LocalStage
from ds_al.tensors import Activation, Target, stop_gradient

Parts = tuple[Tensor, ...]


@dataclass(slots=True)
class MicroBatch:
    """A micro-batch on one stage of a group, from its arrival to the gradients of its weights.

    Attributes:
        s, t: ``(s, t)`` before this stage's blocks.
        context: what the previous stage of the group sends with them, see :func:`context_of`; ``None`` on the first.
        s_out, t_out: ``(s, t)`` after this stage's blocks.
        gradients: of the parts of ``s_out`` that learn; after the backward pass of the parts of ``s``.
        losses: both losses, on the last stage of the group.
        number: number of the micro-batch, counted from 0, which seeds the draws of the layer.
        queued: gradients of weights that are still to be computed, where the backward pass is split.
    """

    s: Activation
    t: Target
    context: Tensor | None = None
    s_out: Activation = ()
    t_out: Target = ()
    gradients: Parts = ()
    losses: Parts = ()
    number: int = 0
    queued: QueuedGradients = field(default_factory=QueuedGradients)


def context_of(s: Activation, device: torch.device) -> Tensor:
    """Returns what goes with ``s`` to the next stage of a group, as bytes.

    ::

        number of tensors of s | for each: whether it has a gradient | state of the generators
    """
    parts = _parts(s)
    flags = torch.tensor([len(parts), *(part.requires_grad for part in parts)], dtype=torch.uint8)
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat([flags, *states]).to(device)


class GroupStage(LocalStage):
    """One part of an AL layer, on one stage of the group that the layer spans.

    Args:
        index: index of the AL layer in the network.
        part: the blocks of this stage.
        place: place of the stage in its group.
        split: whether the gradients of weights are computed apart from those of the input.
        options: as for :class:`~ds_al.stage.LocalStage`.
    """

    def __init__(self, index: int, part: LayerPart, *, place: Place, split: bool, **options: object) -> None:
        super().__init__([(index, part)], **options)  # type: ignore[arg-type]
        self.index, self.part, self.place = index, part, place
        self._split = split and not place.is_first
        self._alive = 0  # micro-batches between their forward and the last of their gradients

    @property
    def next_micro_batch(self) -> int:
        """Number of the micro-batch whose forward is next, counted from 0."""
        return self.trained_micro_batches + self._alive

    def run_forward(self, batch: MicroBatch) -> None:
        """Runs this stage's blocks, and on the last stage of the group g; keeps the graph.

        Raises:
            ALLayerError: a block raised, or returned something other than finite tensors, or draws from generators
                whose states do not go with the activation.
        """
        batch.number = self.next_micro_batch
        self._alive += 1
        recorder = self._recording.recorder
        start = None if recorder is None else recorder.mark()
        if batch.context is None:
            self._seed_draws(batch.number, part=0)
        else:
            flags, states = _read(batch.context)
            _set_states(states)
            self._generators.seed_host()
            batch.s = _leaves(batch.s, flags)
        splitting = SplitBackward(batch.queued) if self._split else contextlib.nullcontext()
        try:
            with splitting:
                batch.s_out, batch.t_out = self.part(batch.s, batch.t)
            if self._fixed_shapes:
                self._check_shape(self.index, self.part, batch.s_out)
        except Exception as error:
            self._blame(error, self.part, "forward")
        if recorder is not None:
            recorder.add_layer("ForwardPass", self.index, start, recorder.mark())
        outputs = (batch.s_out, batch.t_out if self.part.ends else ())
        self.finite.outputs(self.index, *outputs, micro_batch=batch.number)
        self._end_pass()

    def _end_pass(self) -> None:
        self._generators.after_pass()
        if self._generators.layers_drew:
            raise ALLayerError(
                f"stage {self.stage_id}, {self.part.label}: f draws from Python's or numpy's generator, whose numbers "
                "would depend on where stages cut this layer: draw from torch's, or start at most as many stages as "
                "AL layers"
            )

    def message(self, batch: MicroBatch) -> tuple[Activation, Target]:
        """Returns ``(s, t)`` for the next stage, without graphs."""
        return stop_gradient(batch.s_out), stop_gradient(batch.t_out)

    def run_backward(self, batch: MicroBatch, *, scale: float) -> None:
        """Computes gradients of the input, and those of the weights that are not put off.

        On the last stage of the group it begins with the local losses, on all others with ``batch.gradients``.

        Args:
            scale: factor of the losses.
        """
        try:
            if self.place.is_last:
                self._backward_of_losses(batch, scale)
            else:
                learning = [part for part in _parts(batch.s_out) if part.requires_grad]
                if learning:
                    torch.autograd.backward(learning, list(batch.gradients))
        except Exception as error:
            self._blame(error, self.part, "backward")
        batch.s_out = batch.t_out = ()
        leaves = [part for part in _parts(batch.s) if part.is_leaf and part.requires_grad]
        batch.gradients = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)

    def run_weights(self, batch: MicroBatch) -> None:
        """Computes the gradients of weights that were put off, if any, and forgets the micro-batch.

        Raises:
            ALLayerError: a loss, gradient or weight is not finite.
        """
        batch.queued.compute()
        self.finite.before_step(self.index, batch.losses, micro_batch=batch.number)
        self.finite.after_backward(micro_batch=batch.number)
        batch.losses = ()
        batch.s = batch.t = ()
        self._alive -= 1
        self.trained_micro_batches += 1

    def _backward_of_losses(self, batch: MicroBatch, scale: float) -> None:
        self._seed_draws(batch.number, part=1)
        losses = self.part.local_losses(batch.s_out, batch.t_out, batch.t)
        learning = [loss for loss in losses if loss.requires_grad]
        if learning:
            own = self._scales[self.index].value * scale if self._scales else scale
            torch.autograd.backward(learning, self._gradients(own, len(learning)))
        batch.losses = tuple(loss.detach() for loss in losses)
        self._losses += batch.losses
        self._generators.after_pass()

    def take_losses(self, micro_batches: int) -> Tensor:
        """Returns the means of the losses ``(1, 2)``; ``(0, 2)`` on a stage that computes none."""
        return super().take_losses(micro_batches) if self.part.ends else torch.zeros(0, 2, device=self._device)

    def _seed_draws(self, number: int, *, part: int) -> None:
        seed_layer(self.base_seed, layer=self.index, step=self._number(number), part=part)
        self._generators.seed_host()


def _parts(value: Activation) -> Parts:
    return value if isinstance(value, tuple) else (value,)


def _read(context: Tensor) -> tuple[list[bool], Tensor]:
    """Inverts :func:`context_of`."""
    context = context.cpu()
    count = int(context[0])
    return [bool(flag) for flag in context[1 : 1 + count].tolist()], context[1 + count :]


def _set_states(states: Tensor) -> None:
    size = torch.get_rng_state().numel()
    torch.set_rng_state(states[:size].clone())
    if len(states) > size:
        torch.cuda.set_rng_state(states[size:].clone())


def _leaves(s: Activation, flags: list[bool]) -> Activation:
    """Returns ``s`` with leaves that collect gradients, where the sender's tensors have some."""
    if len(flags) != len(_parts(s)):
        raise ALLayerError(f"got {len(_parts(s))} tensors and {len(flags)} flags of gradients in a message of a group")
    leaves = tuple(
        part.detach().requires_grad_() if learns else part for part, learns in zip(_parts(s), flags, strict=True)
    )
    return leaves if isinstance(s, tuple) else leaves[0]
