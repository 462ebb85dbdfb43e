"""Channels that survive the death of the process at their other end.

::

    RecoverableSender                                                  RecoverableReceiver
      message k, log ---> Sender (or SlowSender)  --->  Receiver (or SlowReceiver) ---> message k
                                   \\_____ group of one generation _____/

Messages are numbered, through all processes: message k of training is that of micro-batch k. Where the other process is
lost, the :class:`~ds_al.transport.border.Border` makes new groups, and each end a new channel inside of them. The
receiver tells how many messages it has taken, and the sender goes on from there out of its log. A sender that begins
at the restart point of its stage does not send what the receiver has had, and logs it all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from ds_al.errors import ALTransportError
from ds_al.transport.border import Border, End
from ds_al.transport.channel import Receiver, Sender
from ds_al.transport.log import Entry

Message = tuple[Tensor, ...]


class _Loss:
    """Context that keeps why the other process is lost, and no traceback: it would keep the broken group open."""

    reason = ""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, ALTransportError) or not error.lost:
            return False
        self.reason = str(error)
        return True


class RecoverableSender(End):
    """Sending end, with the interface of :class:`~ds_al.transport.channel.Sender`.

    Args:
        border: what it is added to.
        kind: of its messages.
        make: makes a sender of a process group.
        first: number of the first message of this process; ``None`` where message k is that of micro-batch k.
    """

    def __init__(self, border: Border, kind: str, *, make: Callable[[Any], Sender], first: int | None = None) -> None:
        self.kind, self._border, self._make = kind, border, make
        self._is_per_micro_batch = first is None
        self._next = border.start if first is None else first  # number of the next message of this stage
        self._due = self._next  # number of the message that the receiver needs next
        self._resets = 0
        self._inner: Sender | None = None
        self._inner_resets = 0
        self._loss = _Loss()
        self.waited = 0.0
        self.latest = (0.0, 0)
        self._past = [0, 0, 0]
        border.add(self)

    @property
    def messages(self) -> int:
        """Number of messages sent, those that were sent again included."""
        return self._past[0] + (self._inner.messages if self._inner is not None else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of those messages."""
        return self._past[1] + (self._inner.nbytes if self._inner is not None else 0)

    @property
    def found_full(self) -> int:
        """Number of those messages for which the sender had to wait for a free slot."""
        return self._past[2] + (self._inner.found_full if self._inner is not None else 0)

    def send(self, message: Message) -> None:
        """Logs a message, and sends it unless the receiver has had it; waits if the log is full, no slot is free, or
        the other process is lost.

        Raises:
            ALConfigError: the log is too small.
            ALTransportError: as of a sender, except where the other process is lost and comes again.
        """
        border, number, resets = self._border, self._next, self._resets
        if self._is_per_micro_batch:
            border.micro_batch = number
        waited = border.log.append(
            self.kind, message, number=number, micro_batch=border.micro_batch, shapes=resets, idle=border.attend_both
        )
        self._next += 1
        if number >= self._due:
            with self._loss:
                waited += self._pass_on(number, resets, message)
            if self._loss.reason:
                waited += border.reform(self._loss.reason)
        if self._is_per_micro_batch:
            border.micro_batch = number + 1
        self.waited += waited
        self.latest = waited, self._channel.latest[1]

    def flush(self) -> None:
        """Waits until all messages are sent."""
        while True:
            with self._loss:
                self._channel.flush()
            if not self._loss.reason:
                return
            self.waited += self._border.reform(self._loss.reason)

    def reset(self) -> None:
        """Discards the agreed shapes, before the next message."""
        self._resets += 1

    def attach(self, group: Any, *, taken: int) -> None:
        """Goes on in a new group, with the message that the receiver needs next."""
        self._inner, self._due, self._inner_resets = self._make(group), taken, -1
        self._loss = _Loss()

    def detach(self) -> None:
        """Closes the channel."""
        if self._inner is not None:
            self._past = [self.messages, self.nbytes, self.found_full]
            self._inner = None

    def resend(self, entry: Entry, message: Message) -> None:
        """Sends a message of the log."""
        self._pass_on(entry.number, entry.shapes, message)

    @property
    def _channel(self) -> Sender:
        assert self._inner is not None, "the border has not been formed"
        return self._inner

    def _pass_on(self, number: int, resets: int, message: Message) -> float:
        """Sends a message through the channel; returns the seconds for which that has waited."""
        if number != self._due:
            raise ALTransportError(
                f"the log of messages ({self.kind}) goes on with {number}, and their receiver needs {self._due}: a "
                "stage must not restart before the stage that sends to it"
            )
        if self._inner_resets not in (-1, resets):
            self._channel.reset()
        self._inner_resets = resets
        self._channel.send(message)
        self._due += 1
        return self._channel.latest[0]


class RecoverableReceiver(End):
    """Receiving end, with the interface of :class:`~ds_al.transport.channel.Receiver`.

    Args:
        border, kind, first: as for :class:`RecoverableSender`.
        make: makes a receiver of a process group.
    """

    def __init__(self, border: Border, kind: str, *, make: Callable[[Any], Receiver], first: int | None = None) -> None:
        self.kind, self._border, self._make = kind, border, make
        self._taken = border.start if first is None else first
        self._expected = self._taken
        self._held = self._held_before = 0  # messages not released, of this channel and of those before
        self._inner: Receiver | None = None
        self._loss = _Loss()
        self.waited = 0.0
        self.latest = (0.0, 0)
        self._past = [0, 0]
        border.add(self)

    @property
    def messages(self) -> int:
        """Number of messages received."""
        return self._past[0] + (self._inner.messages if self._inner is not None else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of those messages."""
        return self._past[1] + (self._inner.nbytes if self._inner is not None else 0)

    def expect(self, messages: int) -> None:
        """Announces how many more messages will arrive."""
        self._expected += messages
        with self._loss:
            self._channel.expect(messages)

    def receive(self) -> Message:
        """Waits for the next message, and for the other process where it is lost.

        Raises:
            ALTransportError: as of a receiver, except where the other process is lost and comes again.
        """
        waited = 0.0
        while True:
            if self._loss.reason:
                waited += self._border.reform(self._loss.reason)
            with self._loss:
                message = self._channel.receive()
            if not self._loss.reason:
                break
        self._taken += 1
        self._held += 1
        waited += self._channel.latest[0]
        self.waited += waited
        self.latest = waited, self._channel.latest[1]
        return message

    def release(self) -> None:
        """Releases the oldest received message."""
        if self._held_before:
            self._held_before -= 1
            return
        self._held -= 1
        with self._loss:
            self._channel.release()

    def reset(self) -> None:
        """Discards the agreed shapes. All expected messages must have been received."""
        self._channel.reset()

    def announced(self) -> int:
        """Number of messages that this stage has taken, in this process and those before it."""
        return self._taken

    def attach(self, group: Any, *, taken: int) -> None:
        """Goes on in a new group. Messages of the old one that are in use stay valid."""
        self._inner, self._loss = self._make(group), _Loss()
        self._inner.expect(self._expected - self._taken)

    def detach(self) -> None:
        """Closes the channel."""
        if self._inner is not None:
            self._past = [self.messages, self.nbytes]
            self._held_before, self._held = self._held_before + self._held, 0
            self._inner = None

    @property
    def _channel(self) -> Receiver:
        assert self._inner is not None, "the border has not been formed"
        return self._inner


class RenewedSender(End):
    """Sending end for messages that are not sent again: in new groups they begin anew, and a loss is an error.

    Args:
        border, kind, make: as for :class:`RecoverableSender`.
    """

    def __init__(self, border: Border, kind: str, *, make: Callable[[Any], Sender]) -> None:
        self.kind, self._make = kind, make
        self._inner: Sender | None = None
        border.add(self)

    def send(self, message: Message) -> None:
        """Sends a message."""
        assert self._inner is not None
        self._inner.send(message)

    def attach(self, group: Any, *, taken: int) -> None:
        """Begins anew."""
        self._inner = self._make(group)

    def detach(self) -> None:
        """Closes the channel."""
        self._inner = None


class RenewedReceiver(End):
    """Receiving end for messages that are not sent again.

    Args:
        border, kind, make: as for :class:`RecoverableReceiver`.
    """

    def __init__(self, border: Border, kind: str, *, make: Callable[[Any], Receiver]) -> None:
        self.kind, self._make = kind, make
        self._inner: Receiver | None = None
        border.add(self)

    @property
    def _channel(self) -> Receiver:
        assert self._inner is not None, "the border has not been formed"
        return self._inner

    def expect(self, messages: int) -> None:
        """Announces how many more messages will arrive."""
        self._channel.expect(messages)

    def receive(self) -> Message:
        """Waits for the next message."""
        return self._channel.receive()

    def release(self) -> None:
        """Releases the oldest received message."""
        self._channel.release()

    def attach(self, group: Any, *, taken: int) -> None:
        """Begins anew."""
        self._inner = self._make(group)

    def detach(self) -> None:
        """Closes the channel."""
        self._inner = None
