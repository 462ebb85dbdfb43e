"""Schedules inside a group: the G stages that one AL layer spans, with exact back-propagation between them.

Gradients flow back inside a group and nothing flows back between groups. A stage steps as soon as its own gradients of
the M micro-batches of a step are accumulated, and begins the next M at once: no barrier and no drain. All schedules
take the micro-batches in order, forward and backward, so they accumulate gradients in the same order.

Diagrams: G = 2, M = 4, time from left to right, a column of a forward pass. ``F`` forward, ``b`` backward of twice its
length, ``I`` and ``W`` its two halves: the gradients of the input and of the weights. The optimizer step takes no time.
``f``, ``b_in``, ``b_w`` and ``u`` are the times of F, I, W and the step; ``s`` is a stage's position in its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    BufferOpInstruction,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    SendActivation,
    SendGrad,
)

from ds_al.errors import ALConfigError
from ds_al.schedule import Step


class BackwardInput(BufferOpInstruction):
    """The part of the backward pass that the previous stage waits for: gradients of the input."""


class BackwardWeight(BufferOpInstruction):
    """The rest of the backward pass: gradients of the weights."""


class Place(NamedTuple):
    """A stage's place in the pipeline and in its group.

    Attributes:
        stage, stages: index of the stage in the pipeline, and number of stages, P.
        position, size: index of the stage in its group, s, and number of stages of the group, G.
    """

    stage: int
    stages: int
    position: int
    size: int

    @property
    def group(self) -> range:
        """The stages of the group."""
        start = self.stage - self.position
        return range(start, start + self.size)

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage of its group, which sends no gradients."""
        return self.position == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage of its group, which computes the local losses."""
        return self.position == self.size - 1


class GroupSchedule(PipeSchedule):
    """Base of the schedules inside a group: forward passes run :attr:`ahead` of backward passes.

    Args:
        micro_batches: micro-batches per batch.
        place: place of the stage.
        steps_per_batch: optimizer steps per batch, which divides ``micro_batches``; M is their quotient.
    """

    def __init__(self, micro_batches: int, place: Place, steps_per_batch: int = 1) -> None:
        super().__init__(micro_batches, place.stages, place.stage)
        self.place = place
        self.micro_batches_per_step = micro_batches // steps_per_batch
        self.ahead = min(self.forward_passes_ahead(), self.micro_batches_per_step - 1)

    def forward_passes_ahead(self) -> int:
        """Number of forward passes before the first backward pass, beside its own."""
        raise NotImplementedError

    def delay(self) -> int:
        """Number of micro-batches by which ``W`` is behind ``I``."""
        return 0

    def num_pipe_buffers(self) -> int:
        """Number of micro-batches whose graphs are alive at a time."""
        return min(self.ahead + 1 + self.delay(), self.micro_batches_per_step)

    def steps(self) -> Iterator[Step]:
        """Yields the instructions of a batch: as many optimizer steps, of M micro-batches each."""
        for _ in range(self.micro_batches // self.micro_batches_per_step):
            yield from self._optimizer_step()

    def _optimizer_step(self) -> Iterator[Step]:
        count = self.micro_batches_per_step
        for m in range(self.ahead):
            yield self._forward(m)
        for m in range(count):
            forward = self._forward(m + self.ahead) if m + self.ahead < count else []
            yield [*forward, *self._backward(m)]
        yield [*self._rest(), OptimizerStep()]

    def _forward(self, m: int) -> Step:
        buffer = m % self.num_pipe_buffers()
        source = LoadMicroBatch if self.is_first_stage else RecvActivation
        send = [] if self.is_last_stage else [SendActivation(buffer_id=buffer)]
        return [source(buffer_id=buffer), ForwardPass(buffer_id=buffer), *send]

    def _backward(self, m: int) -> Step:
        buffer = m % self.num_pipe_buffers()
        gradient = [] if self.place.is_last else [RecvGrad(buffer_id=buffer)]
        send = [] if self.place.is_first else [SendGrad(buffer_id=buffer)]
        return [*gradient, BackwardPass(buffer_id=buffer), *send]

    def _rest(self) -> Step:
        """What remains before the optimizer step."""
        return []


class OneForwardOneBackward(GroupSchedule):
    """``1f1b``: period ``(M + G - 1)(f + b) + u``, of which ``(G - 1)(f + b)`` idle; ``min(G - s, M)`` graphs.

    ::

        s = 0   F0 F1 .  .  b0 b0 F2 b1 b1 F3 b2 b2 .  b3 b3|F0
        s = 1   .  F0 b0 b0 F1 b1 b1 F2 b2 b2 F3 b3 b3 .  . |.  F0
    """

    def forward_passes_ahead(self) -> int:
        """As many as there are later stages in the group."""
        return self.place.size - 1 - self.place.position


class ZeroBubbleH1(GroupSchedule):
    """``zb_h1``: idle ``(G - 1)(f + b_in - b_w)`` per period; at most G graphs.

    A stage sends the gradient of its input before it computes those of its weights, which are ``s`` micro-batches
    behind. The first stage of a group sends no gradient, and does not split. Source: Qi et al., "Zero bubble pipeline
    parallelism", ICLR 2024, figure 2.

    ::

        s = 0   F0 F1 .  b0 b0 F2 b1 b1 F3 b2 b2 b3 b3|F0 F1
        s = 1   .  F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3|.  F0
    """

    def forward_passes_ahead(self) -> int:
        """As many as there are later stages in the group."""
        return self.place.size - 1 - self.place.position

    def delay(self) -> int:
        """s micro-batches."""
        return min(self.place.position, self.micro_batches_per_step - 1)

    def _backward(self, m: int) -> Step:
        if self.place.is_first:
            return super()._backward(m)
        buffer = m % self.num_pipe_buffers()
        gradient = [] if self.place.is_last else [RecvGrad(buffer_id=buffer)]
        now = [*gradient, BackwardInput(buffer_id=buffer), SendGrad(buffer_id=buffer)]
        return now if m < self.delay() else [*now, self._weights(m - self.delay())]

    def _rest(self) -> Step:
        count = self.micro_batches_per_step
        return [] if self.place.is_first else [self._weights(m) for m in range(count - self.delay(), count)]

    def _weights(self, m: int) -> BackwardWeight:
        return BackwardWeight(buffer_id=m % self.num_pipe_buffers())


class ZeroBubbleH2(ZeroBubbleH1):
    """``zb_h2``: no idle time where stages take equal times, ``f = b_in = b_w`` and ``M >= 2G - 1``; at most ``2G - 1``
    graphs. Source: as :class:`ZeroBubbleH1`, figure 3.

    ::

        s = 0   F0 F1 F2 b0 b0 F3 b1 b1 b2 b2 b3 b3|F0 F1 F2
        s = 1   .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3|F0 ..
    """

    def forward_passes_ahead(self) -> int:
        """Twice as many as there are later stages in the group."""
        return 2 * (self.place.size - 1 - self.place.position)

    def delay(self) -> int:
        """2s micro-batches."""
        return min(2 * self.place.position, self.micro_batches_per_step - 1)


GROUP_SCHEDULES: dict[str, type[GroupSchedule]] = {
    "1f1b": OneForwardOneBackward,
    "zb_h1": ZeroBubbleH1,
    "zb_h2": ZeroBubbleH2,
}


def group_seconds(
    schedule: str,
    *,
    size: int,
    micro_batches: int,
    forward: float,
    halves: tuple[float, float],
    step: float = 0.0,
) -> float:
    """Returns the period of a group of equal stages, from one optimizer step to the next.

    No schedule with whole backward passes has a shorter period than ``1f1b``: between two steps the signal has to go
    down and up the group once more. A split backward pass fills that gap with the gradients of weights put off.

    Args:
        schedule: a name of :data:`GROUP_SCHEDULES`.
        size: number of stages of the group, G.
        micro_batches: micro-batches per step, M.
        forward: seconds of a forward pass, f.
        halves: seconds of a backward pass for the input and for the weights, b_in and b_w.
        step: seconds of an optimizer step, u.
    """
    for_input, for_weights = halves
    busy = micro_batches * (forward + for_input + for_weights) + step
    gap = (size - 1) * (forward + for_input)
    if schedule == "1f1b":
        return busy + gap + (size - 1) * for_weights
    deferred = group_graphs(schedule, size=size, micro_batches=micro_batches)
    return busy + max(0.0, gap + for_weights - deferred * for_weights)


def group_graphs(schedule: str, *, size: int, micro_batches: int) -> int:
    """Returns the largest number of micro-batches whose graphs a stage of a group holds; arguments as above."""
    return min({"1f1b": size, "zb_h1": size, "zb_h2": 2 * size - 1}[schedule], micro_batches)


def fastest(*, size: int, micro_batches: int, graphs: int | None = None, together: bool = False) -> str:
    """Returns the schedule with the shortest period at ``f = b_in = b_w``; of equal ones, that with the fewest graphs.

    Args:
        size, micro_batches: as for :func:`group_seconds`.
        graphs: the most micro-batches whose graphs a stage may hold.
        together: whether the stages step together, which leaves no time between steps to fill: then ``1f1b``.

    Raises:
        ALConfigError: every schedule holds more graphs.
    """
    held = {name: group_graphs(name, size=size, micro_batches=micro_batches) for name in GROUP_SCHEDULES}
    fitting = [name for name in GROUP_SCHEDULES if graphs is None or held[name] <= graphs]
    if not fitting:
        raise ALConfigError(
            f'"group_graphs": got {graphs}: a stage of a group of {size} stages holds the graphs of at least '
            f"{min(held.values())} of {micro_batches} micro-batches: raise it, or use activation checkpointing, fewer "
            "micro-batches per step, or fewer stages"
        )
    period = {
        name: group_seconds(name, size=size, micro_batches=micro_batches, forward=1.0, halves=(1.0, 1.0))
        for name in fitting
    }
    return "1f1b" if together or size == 1 else min(fitting, key=lambda name: (period[name], held[name]))
