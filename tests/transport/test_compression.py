"""Encoded messages: how far off they arrive, and that nothing is mistaken for something else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_al.config.associated_learning import al_config
from ds_al.config.base import BLOCK as CONFIG_BLOCK
from ds_al.errors import ALConfigError, ALTransportError
from ds_al.transport.compression import BLOCK, COMPRESSIONS, Int8Compression, quantize
from ds_al.transport.layout import Layout

REPORT = torch.tensor([1.0, float("nan"), 1e-3])  # unknown losses are NaN, and must not disturb anything
KINDS = ("activation", "labels", "mask", "bytes", "half", "double")


def tensor(kind: str, shape: list[int]) -> Tensor:
    if kind == "activation":
        return torch.randn(shape) * 10.0 ** torch.randint(-6, 6, (1,))
    dtype = {"labels": torch.int64, "mask": torch.bool, "bytes": torch.int8, "half": torch.float16}
    return torch.randint(0, 2, shape).to(dtype.get(kind, torch.float64))


MESSAGES = st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=6)


def bound(message_dtype: str, x: torch.Tensor) -> torch.Tensor:
    """The largest difference that each number of a float32 tensor may arrive with, in the shape of x."""
    if message_dtype == "fp32":
        return torch.zeros_like(x)
    if message_dtype == "bf16":  # below the smallest normal number, the last digit that bfloat16 has
        return (2.0**-8 * x.abs()).clamp_min(2.0**-133)
    scales = quantize(x)[1].repeat_interleave(BLOCK)[: x.numel()].view(x.shape)
    return scales * (0.5 / 127 + 2.0**-22) + torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("message_dtype", list(COMPRESSIONS))
@given(kinds=MESSAGES, seed=st.integers(0, 1000))
def test_a_message_arrives_within_its_bound_and_the_rest_as_it_is(
    message_dtype: str, kinds: list[tuple[str, list[int]]], seed: int
) -> None:
    torch.manual_seed(seed)
    wire = COMPRESSIONS[message_dtype]()
    message = tuple(tensor(*kind) for kind in kinds)
    *arrived, report = wire.decode(wire.encode((*message, REPORT)))
    assert torch.equal(report, REPORT) or torch.equal(report.nan_to_num(), REPORT.nan_to_num())
    assert [(x.shape, x.dtype) for x in arrived] == [(x.shape, x.dtype) for x in message]
    for sent, got in zip(message, arrived, strict=True):
        if sent.dtype is torch.float32:
            assert ((got - sent).abs() <= bound(message_dtype, sent)).all()
        else:
            assert torch.equal(got, sent)


NORMAL = {"width": 32, "allow_subnormal": False}


@given(st.lists(st.floats(-(2.0**100), 2.0**100, **NORMAL) | st.floats(-1, 1, **NORMAL), min_size=1, max_size=300))
def test_int8_is_within_half_a_step_of_its_block(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    got, _ = Int8Compression().decode(Int8Compression().encode((x, REPORT)))
    for start in range(0, len(x), BLOCK):
        block, arrived = x[start : start + BLOCK], got[start : start + BLOCK]
        step = block.abs().max() / 127
        assert ((arrived - block).abs() <= step * (0.5 + 1e-4) + 1e-37).all()
        largest = block.abs() == block.abs().max()
        assert torch.equal(arrived[largest], block[largest]) or step < 1e-37


def test_relative_errors_of_normal_numbers() -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    errors = {name: COMPRESSIONS[name]().relative_error(x) for name in COMPRESSIONS}
    assert errors["fp32"] == 0
    assert 2**-11 < errors["bf16"] < 2**-8
    assert 2**-9 < errors["int8"] < 2**-6
    assert COMPRESSIONS["int8"]().relative_error(torch.zeros(3)) == 0


def test_bytes_that_travel() -> None:
    x, labels = torch.randn(4, BLOCK), torch.zeros(4, dtype=torch.int64)
    sizes = {
        name: sum(t.nbytes for t in COMPRESSIONS[name]().encode((x, labels, REPORT))[:-2]) for name in COMPRESSIONS
    }
    assert sizes == {"fp32": 16 * BLOCK, "bf16": 8 * BLOCK, "int8": 4 * BLOCK + 16}


@pytest.mark.parametrize("message_dtype", list(COMPRESSIONS))
def test_one_hot_labels_and_a_table_of_ones_are_exact(message_dtype: str) -> None:
    wire, table = COMPRESSIONS[message_dtype](), torch.eye(200)
    arrived, _ = wire.decode(wire.encode((table, REPORT)))
    assert torch.equal(arrived, table)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_hidden(bad: float) -> None:
    x = torch.ones(3 * BLOCK)
    x[BLOCK + 1] = bad
    (arrived, _) = COMPRESSIONS["int8"]().decode(COMPRESSIONS["int8"]().encode((x, REPORT)))
    assert arrived[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.equal(arrived[:BLOCK], x[:BLOCK]) and torch.equal(arrived[2 * BLOCK :], x[2 * BLOCK :])
    (arrived, _) = COMPRESSIONS["bf16"]().decode(COMPRESSIONS["bf16"]().encode((x, REPORT)))
    assert torch.equal(arrived.nan_to_num(7.0), x.nan_to_num(7.0))


def test_encoding_is_the_same_every_time_and_keeps_its_input() -> None:
    x = torch.randn(7, 33).t()  # not contiguous
    before = x.clone()
    one, two = quantize(x), quantize(x.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and torch.equal(x, before)
    assert Layout.of(one).tensors == (((33, 7), torch.int8), ((2,), torch.float32))


def test_bfloat16_of_a_layer_is_refused_where_it_would_arrive_as_float32() -> None:
    with pytest.raises(ALTransportError, match="a layer passes bfloat16 on"):
        COMPRESSIONS["bf16"]().encode((torch.zeros(2, dtype=torch.bfloat16), REPORT))


def test_what_does_not_fit_the_method_is_refused() -> None:
    block = {"method": "bp_1f1b", "message_dtype": "bf16"}
    with pytest.raises(ALConfigError, match=r"associated_learning\.message_dtype.*DeepSpeed's own"):
        al_config({CONFIG_BLOCK: block})
    with pytest.raises(ALConfigError, match=r"associated_learning\.link.*bp_dp has no messages"):
        al_config({CONFIG_BLOCK: {"method": "bp_dp", "link": {"delay_ms": 1}}})
    with pytest.raises(ALConfigError, match="int8"):
        al_config({CONFIG_BLOCK: {"message_dtype": "int4"}})
