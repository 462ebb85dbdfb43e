"""The forward channel between two neighbouring stages.

    stage i                                             stage i + 1
    Sender: queue_depth slots      --- messages --->    Receiver: slots
      copy, isend, go on                                  one in use, one received ahead

A message is a tuple of tensors in one flat buffer. A slot is used again when its last message has left
(sender), or when the stage has finished with it (receiver), so nothing is allocated and nothing is copied
on arrival. The sender waits only when all its slots are on their way. Messages travel in one direction.

Both ends agree on the shapes once, through a header before the first message; with ``dynamic`` every
message has its own header. DeepSpeed's communication carries it all (gloo on CPU, NCCL on GPU, where
waiting and reuse are ordered on the device's stream and never block the host).
"""

from __future__ import annotations

import atexit
import time
import weakref
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_al.errors import ALTransportError
from ds_al.transport.layout import HEADER, Layout

_FULL = 1e-4  # seconds: a shorter wait found its slot free; gloo's transfers cannot be asked whether they are done


class _Slot:
    """A flat buffer and the transfer that uses it."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        self.tensors = layout.views(self.buffer)
        self.work: Any = None

    def fits(self, message: tuple[Tensor, ...]) -> bool:
        """Whether these tensors have the shapes and dtypes of this slot; they are copied as this slot lies."""
        return len(message) == len(self.tensors) and all(
            view.shape == tensor.shape and view.dtype == tensor.dtype
            for view, tensor in zip(self.tensors, message, strict=True)
        )


class _Channel:
    def __init__(
        self, peer: int, *, device: torch.device, dynamic: bool, stages: tuple[int, int], group: Any = None
    ) -> None:
        self.device, self.dynamic = device, dynamic
        # Transfers ask the group itself: the functions around it check per call what is settled here.
        self._group = dist.get_world_group() if group is None else group
        self._peer = torch.distributed.get_group_rank(self._group, peer)
        self.here, self.there = stages
        self.layout: Layout | None = None
        self.waited = 0.0
        """Seconds the host has waited for this channel."""
        self.messages = 0
        """Messages that have passed."""
        self.nbytes = 0
        """Bytes of those messages, headers included."""
        self.latest = (0.0, 0)
        """Seconds waited for the latest message, and its bytes."""
        self.found_full = 0
        """Of those messages, how many the sender had to hold back until a slot was free."""

    def _wait(self, work: Any, what: str) -> None:
        start = time.perf_counter()
        try:
            work.wait()
        except RuntimeError as error:
            raise ALTransportError(
                f"stage {self.here} lost stage {self.there} while waiting {what}, message {self.messages}. The "
                f"first traceback of another rank tells the cause. ({str(error).splitlines()[0]})"
            ) from None
        finally:
            self.waited += time.perf_counter() - start

    def reset(self) -> None:
        """Forgets the shapes."""
        raise NotImplementedError

    def _lost(self, error: RuntimeError) -> ALTransportError:
        return ALTransportError(
            f"stage {self.here} cannot reach stage {self.there}. The first traceback of another rank tells the "
            f"cause. ({str(error).splitlines()[0]})"
        )


_SENDERS: weakref.WeakSet[Sender] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    """A stage may be ahead of its successor when its script ends; its last messages must still leave."""
    for sender in list(_SENDERS):
        sender.flush()


class Sender(_Channel):
    """The sending end. What is on its way when the process ends still leaves.

    Args:
        peer: global rank of the next stage.
        queue_depth: messages that may be on their way at a time.
        device: where buffers lie.
        dynamic: every message carries its own shapes.
        stages: this stage and the peer's, for errors.
        group: process group; by default that of all ranks.
    """

    def __init__(
        self,
        peer: int,
        *,
        queue_depth: int,
        device: torch.device,
        dynamic: bool,
        stages: tuple[int, int],
        group: Any = None,
    ) -> None:
        super().__init__(peer, device=device, dynamic=dynamic, stages=stages, group=group)
        self.queue_depth = queue_depth
        self._slots: list[_Slot | None] = [None] * queue_depth
        self._headers: list[Any] = [None] * queue_depth
        _SENDERS.add(self)

    def send(self, message: tuple[Tensor, ...]) -> None:
        """Copies a message into a free slot and sends it on; waits only if no slot is free.

        Raises:
            ALTransportError: shapes differ from the first message's and the channel is not dynamic, or the
                next stage is gone.
        """
        before = self.waited
        index = self.messages % self.queue_depth
        slot = self._slots[index]
        if slot is not None and slot.work is not None:
            self._wait(slot.work, "for a free slot in its queue")
            self.found_full += self.waited - before > _FULL
            slot.work = None
        if slot is None or not slot.fits(message):
            slot = self._slots[index] = self._new_slot(message)
        if self.dynamic or self.layout is None:
            self._send_header(slot.layout, index)
        self.layout = slot.layout
        for view, tensor in zip(slot.tensors, message, strict=True):
            view.copy_(tensor)
        try:
            slot.work = self._group.send([slot.buffer], self._peer, 0)
        except RuntimeError as error:
            raise self._lost(error) from None
        self.messages += 1
        self.nbytes += slot.layout.nbytes
        self.latest = self.waited - before, slot.layout.nbytes

    def _new_slot(self, message: tuple[Tensor, ...]) -> _Slot:
        layout = Layout.of(message)
        if self.layout not in (None, layout) and not self.dynamic:
            raise ALTransportError(
                f"stage {self.here}: a message to stage {self.there} changed from [{self.layout}] to [{layout}]. "
                "Keep shapes constant, call engine.reset_activation_shape() on every rank when they change, or "
                "build the module with dynamic_shape=True"
            )
        return _Slot(layout, self.device)

    def _send_header(self, layout: Layout, index: int) -> None:
        if self._headers[index] is not None:
            self._wait(self._headers[index][1], "for a free slot in its queue")
        header = torch.tensor(layout.encode(), dtype=torch.int64, device=self.device)
        try:
            self._headers[index] = (header, self._group.send([header], self._peer, 0))
        except RuntimeError as error:
            raise self._lost(error) from None
        self.nbytes += header.nbytes

    def flush(self) -> None:
        """Waits until all messages have left. A process that ends earlier takes them with it."""
        for slot in self._slots:
            if slot is not None and slot.work is not None:
                self._wait(slot.work, "for its last messages to leave")
                slot.work = None
        for index, header in enumerate(self._headers):
            if header is not None:
                self._wait(header[1], "for its last messages to leave")
                self._headers[index] = None

    def reset(self) -> None:
        """Waits until all messages have left, and forgets the shapes."""
        self.flush()
        self.layout = None
        self._slots = [None] * self.queue_depth


class Receiver(_Channel):
    """The receiving end.

    Args:
        peer: global rank of the previous stage.
        slots: messages that it holds: the one in use, and those received ahead.
        device, dynamic, stages, group: as for :class:`Sender`.
    """

    def __init__(
        self,
        peer: int,
        *,
        device: torch.device,
        dynamic: bool,
        stages: tuple[int, int],
        group: Any = None,
        slots: int = 2,
    ) -> None:
        super().__init__(peer, device=device, dynamic=dynamic, stages=stages, group=group)
        self.slots = slots
        self._ring: list[_Slot] = []
        self._posted = 0
        self._expected = 0
        self._released = 0

    def expect(self, messages: int) -> None:
        """Says how many more messages will come, so that they are received ahead; never more than come."""
        self._expected += messages
        self._post_ahead()

    def receive(self) -> tuple[Tensor, ...]:
        """Waits for the next message and returns views of its buffer, valid until :meth:`release`.

        Raises:
            ALTransportError: the previous stage is gone.
        """
        before = self.waited
        if self.layout is None or self.dynamic:
            self._open(self._receive_header())
        slot = self._ring[self.messages % self.slots]
        self._wait(slot.work, "for its input")
        slot.work = None
        self.messages += 1
        self.nbytes += slot.layout.nbytes
        self.latest = self.waited - before, slot.layout.nbytes
        return slot.tensors

    def release(self) -> None:
        """Gives the oldest received message's buffer back, and receives the next message into it."""
        self._released += 1
        self._post_ahead()

    def reset(self) -> None:
        """Forgets the shapes. All expected messages must have been received."""
        if self._posted != self.messages:
            raise ALTransportError(
                f"stage {self.here}: shapes were reset while {self._posted - self.messages} messages were on "
                "their way: call reset_activation_shape() between batches, on every rank"
            )
        self.layout = None
        self._ring = []

    def _receive_header(self) -> Layout:
        header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
        try:
            self._wait(self._group.recv([header], self._peer, 0), "for its input")
        except RuntimeError as error:
            raise self._lost(error) from None
        self.nbytes += header.nbytes
        return Layout.decode(header.tolist())

    def _open(self, layout: Layout) -> None:
        """Takes the shapes of a header, and receives the message that follows it."""
        if self.layout != layout or not self._ring:
            self._ring = [_Slot(layout, self.device) for _ in range(self.slots)]
        self.layout = layout
        self._post(self.messages + 1)
        self._post_ahead()

    def _post_ahead(self) -> None:
        """Receives into all free slots, unless the next header has to say first what comes."""
        if self.layout is not None and not self.dynamic:
            self._post(min(self._expected, self._released + self.slots))

    def _post(self, limit: int) -> None:
        while self._posted < limit:
            slot = self._ring[self._posted % self.slots]
            try:
                slot.work = self._group.recv([slot.buffer], self._peer, 0)
            except RuntimeError as error:
                raise self._lost(error) from None
            self._posted += 1
