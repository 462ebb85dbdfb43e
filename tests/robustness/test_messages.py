"""Messages between stages: what cannot be sent, bits that change on the way, neighbours that are gone."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_al.config.associated_learning import al_config
from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError, ALTransportError
from ds_al.transport.channel import Receiver, Sender
from ds_al.transport.compression import COMPRESSIONS
from tests.support.engines import MICRO_BATCHES, engine_state, make_engine
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks
from tests.support.robustness import Case, Kind, by_name, meet

HERE = "tests/robustness/test_messages.py"
LINKS = "tests/transport"
KINDS = [
    Kind(
        section="Messages",
        name="a bit that changes on the way, with `message_checksum`",
        outcome="refused",
        what="The receiver names the stages, the message and the tensor, and does not train on it.",
        tests=(f"{HERE}::test_a_bit_that_changes_on_the_way", f"{HERE}::test_nothing_is_trained_on_a_changed_message"),
    ),
    Kind(
        section="Messages",
        name="a bit of a header that changes on the way",
        outcome="refused",
        what="Headers always have a checksum: the receiver names the stages and the message.",
        tests=(f"{HERE}::test_a_bit_that_changes_on_the_way",),
    ),
    Kind(
        section="Messages",
        name="a bit that changes on the way, without `message_checksum`",
        outcome="left",
        what="It is not noticed beyond the checksums of the network itself, unless a loss becomes NaN or infinite.",
        tests=(f"{HERE}::test_without_checksums_the_bits_arrive_as_they_are",),
    ),
    Kind(
        section="Messages",
        name="numbers of any dtype, shape and memory format, NaN and infinity included",
        outcome="honoured",
        what="They arrive bit for bit, with checksums and without.",
        tests=(f"{HERE}::test_what_is_sent_arrives", f"{LINKS}/test_layout.py::test_a_layout_survives_its_header"),
    ),
    Kind(
        section="Messages",
        name="a tensor that changes its shape or dtype",
        outcome="refused",
        what="The sender names both shapes and the remedies; `dynamic_shape=True` honours it.",
        tests=(
            f"{HERE}::test_what_cannot_be_sent",
            f"{LINKS}/test_channel.py::test_a_changed_shape_is_named_with_its_remedies",
        ),
    ),
    Kind(
        section="Messages",
        name="too many tensors, or a dtype that has no code",
        outcome="refused",
        what="The sender names what it got and what fits.",
        tests=(f"{HERE}::test_what_cannot_be_sent",),
    ),
    Kind(
        section="Messages",
        name="a neighbour that ends in the middle of training",
        outcome="refused",
        what="The rank that failed is named first; its neighbours name the stage they lost.",
        tests=("tests/test_waiting.py::test_a_stage_that_raises_ends_the_job_and_is_named_first",),
    ),
]


class Wire:
    """A process group of two ranks in one process: what one end sends, the other one receives, with one bit changed.

    Args:
        flip: number of the transfer, byte and bit to change; ``None`` changes nothing.
    """

    def __init__(self, flip: tuple[int, int, int] | None = None) -> None:
        self._flip, self._sent, self._under_way = flip, 0, deque[Tensor]()

    def end(self, number: int) -> Any:
        """One of the two ranks."""
        return _End(self, number)

    def send(self, tensor: Tensor) -> None:
        data = tensor.clone().view(torch.uint8)
        if self._flip is not None and self._flip[0] == self._sent:
            data[self._flip[1]] ^= 1 << self._flip[2]
        self._sent += 1
        self._under_way.append(data.view(tensor.dtype))

    def receive(self, tensor: Tensor) -> None:
        tensor.copy_(self._under_way.popleft())


class _End:
    def __init__(self, wire: Wire, number: int) -> None:
        self._wire, self._number, self._buffer = wire, number, torch.empty(0)

    def rank(self) -> int:
        return self._number

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Done:
        self._wire.send(tensors[0])
        return _Done()

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Done:
        return _Done(self._wire, tensors[0])


class _Done:
    def __init__(self, wire: Wire | None = None, tensor: Tensor | None = None) -> None:
        self._wire, self._tensor = wire, tensor

    def wait(self) -> None:
        if self._wire is not None and self._tensor is not None:
            self._wire.receive(self._tensor)


def passed(messages: list[tuple[Tensor, ...]], **options: Any) -> list[tuple[Tensor, ...]]:
    """What arrives of messages from stage 0 to stage 1."""
    wire = Wire(options.pop("flip", None))
    common: dict[str, Any] = {"device": torch.device("cpu"), "dynamic": False, "checksum": True, **options}
    sender = Sender(wire.end(0), queue_depth=2, stages=(0, 1), **common)
    receiver = Receiver(wire.end(1), slots=2, stages=(1, 0), **common)
    receiver.expect(len(messages))
    arrived = []
    for message in messages:
        sender.send(message)
        arrived.append(tuple(tensor.clone() for tensor in receiver.receive()))
        receiver.release()
    return arrived


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    one, two = (torch.view_as_real(x) if x.is_complex() else x for x in (one, two))
    bits = [x.contiguous().flatten().view(torch.uint8) for x in (one, two)]
    return one.dtype is two.dtype and one.shape == two.shape and torch.equal(*bits)


NUMBERS = torch.tensor([1.0, -0.0, float("nan"), float("inf"), 1e-3, -7.25])
DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "complex64": torch.complex64, "complex128": torch.complex128, "int64": torch.int64, "int32": torch.int32,
    "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
TENSORS = {name: NUMBERS.nan_to_num(2.0, 3.0).abs().to(dtype) for name, dtype in DTYPES.items()}
TENSORS |= {name: NUMBERS.to(DTYPES[name]) for name in ("float32", "float64", "float16", "bfloat16")}
TENSORS |= {
    "no number": torch.zeros(3, 0),
    "a scalar": torch.tensor(1.5),
    "a map with channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a transposed matrix": torch.randn(4, 3).t(),
    "conjugated numbers": torch.randn(3, dtype=torch.complex64).conj(),
    "numbers with the sign aside": torch.randn(3, dtype=torch.complex64).conj().imag,
    "a large tensor": torch.randn(300, 300),
}


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("name", list(TENSORS))
def test_what_is_sent_arrives(name: str, checksum: bool) -> None:
    tensor = TENSORS[name]
    messages = [(tensor, torch.ones(2)), (tensor, torch.zeros(2)), (tensor, torch.ones(2))]
    for dynamic in (False, True):
        for sent, got in zip(messages, passed(messages, checksum=checksum, dynamic=dynamic), strict=True):
            assert all(same(one.resolve_conj().resolve_neg(), two) for one, two in zip(sent, got, strict=True))


# Of each message the transfers are: header (the first one, or each if dynamic), then the tensors in one buffer. A
# tensor starts at a multiple of 64 bytes; bytes of a number come lowest first.
PLACES = {
    "the sign of a number": (1, 3, 7),
    "its highest exponent bit": (1, 3, 6),
    "its lowest exponent bit": (1, 2, 7),
    "the lowest bit of its fraction": (1, 0, 0),
    "its last number": (1, 4 * 5 + 1, 2),
}
FLIPS = [
    *(
        Case(
            name=f"{where}, tensor {number} of a message",
            given={"message": (torch.ones(6), torch.ones(6), torch.arange(6.0)), "flip": (1, 64 * number + byte, bit)},
            message=rf"stage 1: message 0 from stage 0, tensor {number} of 3, \[6\] float32: got other bits",
        )
        for where, (_, byte, bit) in PLACES.items()
        for number in range(3)
    ),
    *(
        Case(
            name=f"bit {bit} of {name}",
            given={"message": (torch.ones(2), TENSORS[name]), "flip": (1, 64 + (bit // 8), bit % 8)},
            message=rf"message 0 from stage 0, tensor 1 of 2, .* {name}: got other bits",
        )
        for name, dtype in DTYPES.items()
        for bit in (0, 8 * dtype.itemsize - 1)
        if dtype is not torch.bool or bit == 0
    ),
    *(
        Case(
            name=f"a message compressed as {name}",
            given={"message": COMPRESSIONS[name]().encode((torch.randn(200), torch.ones(3))), "flip": (1, 5, bit)},
            message=r"message 0 from stage 0, tensor 0 of \d, \[200\] \w+: got other bits",
        )
        for name in COMPRESSIONS
        for bit in (0, 7)
    ),
    Case(
        name="the checksum itself",
        given={"message": (torch.ones(6),), "flip": (1, 64, 3)},
        message="message 0 from stage 0, tensor 0 of 1",
    ),
    *(
        Case(
            name=f"message {number} of a static channel",
            given={"message": (torch.ones(6),), "flip": (1 + number, 2, 2), "count": 5},
            message=f"stage 1: message {number} from stage 0, tensor 0 of 1",
        )
        for number in (1, 4)
    ),
    Case(
        name="a later message whose shapes are announced",
        given={"message": (torch.ones(6),), "flip": (2 * 3 + 1, 2, 2), "count": 5, "dynamic": True},
        message="stage 1: message 3 from stage 0, tensor 0 of 1",
    ),
    *(
        Case(
            name=f"{what}, checksum {'on' if checksum else 'off'}",
            given={"message": (torch.ones(6),), "flip": (0, byte, bit), "checksum": checksum},
            message="stage 1, message 0 from stage 0: got a header with other bits than were sent",
        )
        for what, byte, bit in (
            ("the number of tensors", 0, 1), ("the dtype", 8, 2), ("the number of dimensions", 16, 0),
            ("a size in the header", 24, 5), ("the sign of a size", 31, 7), ("the unused end of a header", 1000, 0),
        )
        for checksum in (False, True)
    ),
    Case(
        name="a header in the middle of a dynamic channel",
        given={"message": (torch.ones(6),), "flip": (4, 24, 1), "count": 4, "dynamic": True, "checksum": False},
        message="stage 1, message 2 from stage 0: got a header with other bits",
    ),
]  # fmt: skip


@by_name(FLIPS)
def test_a_bit_that_changes_on_the_way(case: Case) -> None:
    options = dict(case.given)
    messages = [options.pop("message")] * options.pop("count", 1)
    meet(case, lambda: passed(messages, **options), seconds=10)


def test_without_checksums_the_bits_arrive_as_they_are() -> None:
    ((got,),) = passed([(torch.ones(6),)], flip=(1, 3, 7), checksum=False)
    assert got.tolist() == [-1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


REFUSED = [
    Case(
        name="a second message of another shape",
        given=[(torch.ones(2, 3),), (torch.ones(2, 4),)],
        message=r"stage 0: a message to stage 1 changed from \[\[2, 3\] float32.* to \[\[2, 4\] float32.*dynamic_shape",
    ),
    Case(
        name="a second message of another dtype",
        given=[(torch.ones(2),), (torch.ones(2, dtype=torch.float64),)],
        message=r"changed from \[\[2\] float32.* to \[\[2\] float64",
    ),
    Case(
        name="a second message with one tensor more",
        given=[(torch.ones(2),), (torch.ones(2), torch.ones(2))],
        message=r"changed from \[\[2\] float32.* to \[\[2\] float32, \[2\] float32",
    ),
    Case(
        name="60 tensors",
        given=[tuple(torch.ones(2) for _ in range(60))],
        message=r"a message of 6\d tensors needs a header of \d+ numbers, at most 127 fit: pass fewer",
    ),
    Case(
        name="a tensor of 130 dimensions in all",
        given=[tuple(torch.ones([1] * 40) for _ in range(4))],
        message="needs a header of",
    ),
    Case(
        name="float8",
        given=[(torch.zeros(2).to(torch.float8_e4m3fn),)],
        message=r"dtype torch\.float8_e4m3fn cannot be sent between stages: use one of",
    ),
    Case(
        name="uint16",
        given=[(torch.zeros(2).to(torch.uint16),)],
        message=r"dtype torch\.uint16 cannot be sent",
    ),
]


CASES = [*FLIPS, *REFUSED]


@pytest.mark.parametrize("checksum", [False, True])
@by_name(REFUSED)
def test_what_cannot_be_sent(case: Case, checksum: bool) -> None:
    meet(case, lambda: passed(case.given, checksum=checksum), seconds=10)


def test_a_checksum_of_messages_that_are_not_ours_is_refused() -> None:
    with pytest.raises(ALConfigError, match=r"associated_learning\.message_checksum.*DeepSpeed's own: expected false"):
        al_config({BLOCK: {"method": "bp_1f1b", "message_checksum": True}})


LAST = 2 * MICRO_BATCHES - 1


def planted() -> list[Any]:
    """Worker: trains without and with checksums, then so that the second number of the last message changes its sign.

    Returns:
        Of each run the weights, the error, and the micro-batches trained before it.
    """
    send, changes, sent = dist.ProcessGroupGloo.send, False, 0

    def sending(group: Any, tensors: list[Tensor], peer: int, tag: int) -> Any:
        nonlocal sent
        sent += 1
        if changes and sent == LAST + 2:  # the first transfer is the header
            tensors[0][7] ^= 1 << 7
        return send(group, tensors, peer, tag)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.ProcessGroupGloo, "send", sending)
        for checksum, flip in ((False, False), (True, False), (False, True), (True, True)):
            engine = make_engine("mlp", message_checksum=checksum)
            changes = flip
            batches, error, sent = iter(NETWORKS["mlp"].batches(2 * MICRO_BATCHES)), "", 0
            try:
                for _ in range(2):
                    engine.train_batch(batches)
                engine.flush()
            except ALTransportError as caught:
                error = str(caught)
            found.append((engine_state(engine), error, engine.stage.trained_micro_batches))
    return found


@pytest.mark.distributed
def test_nothing_is_trained_on_a_changed_message() -> None:
    (_, (plain, *_)), (_, (checked, *_)), (_, (changed, *unnoticed)), ((_, *first), (_, error, trained)) = zip(
        *run_ranks(f"{__name__}:planted", 2), strict=True
    )
    assert plain.keys() == checked.keys() and all(torch.equal(plain[name], checked[name]) for name in plain)
    assert unnoticed == ["", LAST + 1] and any(not torch.equal(plain[name], changed[name]) for name in plain)
    assert first == ["", LAST + 1] and trained == LAST
    assert f"stage 1: message {LAST} from stage 0, tensor 0 of 3, [8, 16] float32: got other bits" in error
