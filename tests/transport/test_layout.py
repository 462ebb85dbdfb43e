"""Messages: their layout survives the header, and each tensor lies where torch itself would put it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_al.errors import ALTransportError
from ds_al.tensors import dense
from ds_al.transport.layout import Layout

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
TENSORS = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES)), min_size=1, max_size=8)


def tensors(kinds: list[tuple[list[int], torch.dtype]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randint(0, 2, shape).to(dtype) for shape, dtype in kinds)


@given(TENSORS)
def test_a_layout_survives_its_header(kinds: list[tuple[list[int], torch.dtype]]) -> None:
    layout = Layout.of(tensors(kinds))
    numbers = layout.encode()
    assert len(numbers) == len(Layout.of((torch.zeros(1),)).encode())  # both ends know the size of a header
    assert Layout.decode(torch.tensor(numbers).tolist()) == layout


@given(TENSORS, st.sampled_from([64, 512]))
def test_a_flat_buffer_holds_every_tensor_apart_and_aligned(
    kinds: list[tuple[list[int], torch.dtype]], alignment: int
) -> None:
    """To 64 bytes on a CPU, to 512 on a GPU, as torch's allocators do."""
    message = tensors(kinds)
    layout = replace(Layout.of(message), alignment=alignment)
    assert Layout.decode(layout.encode()) == layout
    buffer = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    views = layout.views(buffer)
    for view, tensor in zip(views, message, strict=True):
        assert (view.shape, view.dtype, view.is_contiguous()) == (tensor.shape, tensor.dtype, True)
        view.copy_(tensor)
        assert not view.numel() or (view.data_ptr() - buffer.data_ptr()) % alignment == 0
    for view, tensor in zip(views, message, strict=True):  # after all were written, so none lies upon another
        assert torch.equal(view, tensor)


def test_a_map_with_channels_last_arrives_with_channels_last() -> None:
    """Turned around for its way and back, it cost a network of convolutions some percent of its time. A map of one
    pixel keeps its strides, by which oneDNN chooses its kernels."""
    first = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    pixel = torch.nn.functional.max_pool2d(first.to(memory_format=torch.channels_last), (4, 5))
    message = (
        first.to(memory_format=torch.channels_last), first, torch.ones(2, 1, 4, 5), torch.ones(3),
        pixel, torch.ones(2, 3, 1, 1), torch.ones(2, 1, 1, 1),
    )  # fmt: skip
    layout = Layout.decode(torch.tensor(Layout.of(message).encode()).tolist())
    assert layout == Layout.of(message) and layout.channels_last == (True, *3 * [False], True, False, False)
    views = layout.views(torch.empty(layout.nbytes, dtype=torch.uint8))
    for view, tensor in zip(views, message, strict=True):
        view.copy_(tensor)
        assert torch.equal(view, tensor) and view.stride() == tensor.stride()


def test_what_does_not_lie_densely_is_made_contiguous() -> None:
    map_ = torch.ones(2, 6, 4, 4).to(memory_format=torch.channels_last)
    assert dense(map_) is map_ and dense(map_[:, ::2]).is_contiguous() and dense(torch.ones(4, 3).t()).is_contiguous()


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(ALTransportError, match=r"dtype torch\.float8_e4m3fn cannot be sent"):
        Layout.of((torch.zeros(1, dtype=torch.float8_e4m3fn),)).encode()
    with pytest.raises(ALTransportError, match="a message of 60 tensors needs a header of 182 numbers, at most 127"):
        Layout.of(tuple(torch.zeros(2) for _ in range(60))).encode()


def test_a_layout_reads_well() -> None:
    assert str(Layout.of((torch.zeros(2, 3), torch.ones(4, dtype=torch.bool)))) == "[2, 3] float32, [4] bool"
