"""Asynchronous one-way channel between two neighbouring stages.

    stage i                                             stage i + 1
    Sender: queue_depth slots      --- messages --->    Receiver: slots
      copy, isend, return                                 one in use, one received ahead

A message is a tuple of tensors in one flat buffer. A slot is reused once its last message has been sent
(sender), or once the stage has released it (receiver), so no buffer is allocated per message and received
tensors are not copied. The sender waits only while all its slots are in flight.

Both ends agree on the shapes once, through a header before the first message; with ``dynamic`` every
message has its own header. Transfers use a process group of the two ranks alone (gloo on CPU; NCCL on GPU, where
they run on a stream of the group's own, and waiting and reuse are ordered on the device and never block the host).
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_al.errors import ALTransportError
from ds_al.parallel import presence
from ds_al.transport.checksum import changed, checksums
from ds_al.transport.layout import HEADER, Layout

_FULL = 1e-4  # seconds: after a shorter wait the slot counts as free; gloo cannot query whether a transfer is done


class _Slot:
    """A flat buffer and the transfer that uses it."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        self.tensors = layout.views(self.buffer)
        self.work: Any = None

    def fits(self, message: tuple[Tensor, ...]) -> bool:
        """Whether these tensors have the shapes and dtypes of this slot; memory formats may differ."""
        return len(message) == len(self.tensors) and all(
            view.shape == tensor.shape and view.dtype == tensor.dtype
            for view, tensor in zip(self.tensors, message, strict=True)
        )


class _Channel:
    """Common part of both ends: process group and counters."""

    def __init__(
        self, group: Any, *, device: torch.device, dynamic: bool, stages: tuple[int, int], checksum: bool = False
    ) -> None:
        self.device, self.dynamic, self.checksum = device, dynamic, checksum
        self._group, self._peer = group, 1 - group.rank()
        self.here, self.there = stages
        self.layout: Layout | None = None
        self.waited = 0.0
        """Seconds the host has waited for this channel."""
        self.messages = 0
        """Number of messages sent or received."""
        self.nbytes = 0
        """Bytes of those messages, headers included."""
        self.latest = (0.0, 0)
        """Seconds waited for the latest message, and its bytes."""
        self.found_full = 0
        """Number of those messages for which the sender had to wait for a free slot."""

    def _wait(self, work: Any, what: str) -> None:
        start = time.perf_counter()
        try:
            work.wait()
        except ALTransportError:
            raise  # of the stage's other border, which is made again meanwhile
        except RuntimeError as error:
            raise ALTransportError(
                f"stage {self.here} lost stage {self.there} while waiting {what}, message {self.messages}. The "
                f"first traceback of another rank shows the cause. ({str(error).splitlines()[0]})",
                lost=True,
            ) from None
        finally:
            self.waited += time.perf_counter() - start

    def reset(self) -> None:
        """Discards the agreed shapes."""
        raise NotImplementedError

    def _lost(self, error: RuntimeError) -> ALTransportError:
        return ALTransportError(
            f"stage {self.here} cannot reach stage {self.there}. The first traceback of another rank shows the "
            f"cause. ({str(error).splitlines()[0]})",
            lost=True,
        )


class Flushed(Protocol):
    """What has last messages to send when the process ends."""

    def flush(self) -> None:
        """Waits until all messages are sent."""


_SENDERS: weakref.WeakSet[Flushed] = weakref.WeakSet()


def flush_at_exit(sender: Flushed) -> None:
    """Sends the last messages of this sender before the process ends, as long as it is not destroyed before."""
    _SENDERS.add(sender)


@atexit.register
def _flush_all() -> None:
    """Sends the last messages of a stage that is ahead of its successor when its script ends.

    Where they cannot be sent, the exit code is 1: Python's own would be that of a script that is done.
    """
    try:
        for sender in list(_SENDERS):
            sender.flush()
    except ALTransportError as error:
        print(f"ALTransportError: {error} {presence.here().cause()}", file=sys.stderr, flush=True)
        os._exit(1)


class Sender(_Channel):
    """Sending end of a channel. Messages in flight are lost when the process ends, unless :func:`flush_at_exit`.

    Args:
        group: process group of this rank and the next stage's (:func:`ds_al.parallel.pairs.pair`).
        queue_depth: maximum number of messages in flight.
        device: device of the buffers.
        dynamic: whether every message has its own header with shapes.
        stages: index of this stage and of the peer's, for errors.
        checksum: whether every message contains its checksums (:mod:`ds_al.transport.checksum`), which the receiver
            compares; both ends agree on it.
    """

    def __init__(
        self,
        group: Any,
        *,
        queue_depth: int,
        device: torch.device,
        dynamic: bool,
        stages: tuple[int, int],
        checksum: bool = False,
    ) -> None:
        super().__init__(group, device=device, dynamic=dynamic, stages=stages, checksum=checksum)
        self.queue_depth = queue_depth
        self._slots: list[_Slot | None] = [None] * queue_depth
        self._headers: list[Any] = [None] * queue_depth

    def send(self, message: tuple[Tensor, ...]) -> None:
        """Copies a message into a free slot and sends it asynchronously; waits only if no slot is free.

        Raises:
            ALTransportError: shapes differ from the first message's and the channel is not dynamic, or the
                next stage has ended.
        """
        before = self.waited
        if self.checksum:
            message = (*message, checksums(message))
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
        """Waits until all messages are sent. If the process ends before, they are lost."""
        for slot in self._slots:
            if slot is not None and slot.work is not None:
                self._wait(slot.work, "for its last messages to leave")
                slot.work = None
        for index, header in enumerate(self._headers):
            if header is not None:
                self._wait(header[1], "for its last messages to leave")
                self._headers[index] = None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # so far only the stream waits, not the host

    def reset(self) -> None:
        """Waits until all messages are sent, and discards the agreed shapes."""
        self.flush()
        self.layout = None
        self._slots = [None] * self.queue_depth


class Receiver(_Channel):
    """Receiving end of a channel.

    Args:
        group: process group of this rank and the previous stage's.
        slots: number of buffers: one for the message in use, the others for messages received ahead.
        device, dynamic, stages, checksum: as for :class:`Sender`.
    """

    def __init__(
        self,
        group: Any,
        *,
        device: torch.device,
        dynamic: bool,
        stages: tuple[int, int],
        checksum: bool = False,
        slots: int = 2,
    ) -> None:
        super().__init__(group, device=device, dynamic=dynamic, stages=stages, checksum=checksum)
        self.slots = slots
        self._ring: list[_Slot] = []
        self._posted = 0
        self._expected = 0
        self._released = 0

    def expect(self, messages: int) -> None:
        """Announces how many more messages will arrive, so that exactly these are received ahead."""
        self._expected += messages
        self._post_ahead()

    def receive(self) -> tuple[Tensor, ...]:
        """Waits for the next message and returns views of its buffer, valid until :meth:`release`.

        Raises:
            ALTransportError: the previous stage has ended, or a checksum differs.
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
        return self._verified(slot.tensors) if self.checksum else slot.tensors

    def _verified(self, message: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns a message without its checksums, after comparing them."""
        *tensors, sent = message
        index = changed(tuple(tensors), sent)
        if index is not None:
            shape, dtype = list(tensors[index].shape), str(tensors[index].dtype).removeprefix("torch.")
            raise ALTransportError(
                f"stage {self.here}: message {self.messages - 1} from stage {self.there}, tensor {index} of "
                f"{len(tensors)}, {shape} {dtype}: got other bits than its checksum says were sent. A memory or a "
                "network between the two is faulty: check or replace both hosts, and resume from the last checkpoint"
            )
        return tuple(tensors)

    def release(self) -> None:
        """Releases the buffer of the oldest received message, and posts the next receive into it."""
        self._released += 1
        self._post_ahead()

    def reset(self) -> None:
        """Discards the agreed shapes. All expected messages must have been received."""
        if self._posted != self.messages:
            raise ALTransportError(
                f"stage {self.here}: shapes were reset while {self._posted - self.messages} messages were in "
                "flight: call reset_activation_shape() between batches, on every rank"
            )
        self.layout = None
        self._ring = []

    def _receive_header(self) -> Layout:
        header = torch.empty(HEADER, dtype=torch.int64, device=self.device)
        try:
            work = self._group.recv([header], self._peer, 0)
        except RuntimeError as error:
            raise self._lost(error) from None
        self._wait(work, "for its input")
        self.nbytes += header.nbytes
        try:
            return Layout.decode(header.tolist())
        except ALTransportError as error:
            raise ALTransportError(
                f"stage {self.here}, message {self.messages} from stage {self.there}: {error}"
            ) from None

    def _open(self, layout: Layout) -> None:
        """Adopts the shapes of a header, and posts the receive of its message."""
        if self.layout != layout or not self._ring:
            self._ring = [_Slot(layout, self.device) for _ in range(self.slots)]
        self.layout = layout
        self._post(self.messages + 1)
        self._post_ahead()

    def _post_ahead(self) -> None:
        """Posts receives into all free slots, unless a header has to arrive first."""
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
