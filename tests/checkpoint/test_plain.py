"""Nested values that go through JSON and a table of tensors come back as they were."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import ds_al
from ds_al.checkpoint.folder import read_tensors, verify, write_tensors
from ds_al.system.plain import Tensors, pack, unpack


def through(value: Any) -> Any:
    """There and back."""
    tensors: Tensors = {}
    packed = json.loads(json.dumps(pack(value, tensors, at="value")))
    return unpack(packed, tensors)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "none": None, "on": True, "inf": math.inf},
        {"milestones": Counter({7: 1, 12: 2}), "by number": {3: "x", 4: ["y", ("z",)]}},
        {"$tensor": "a name like ours"},
        [[], (), {}],
    ],
)
def test_values_come_back_with_their_types(value: Any) -> None:
    got = through(value)
    assert got == value and type(got) is type(value)
    if isinstance(value, dict):
        assert [type(v) for v in got.values()] == [type(v) for v in value.values()]


def test_tensors_and_numbers_of_numpy() -> None:
    value = {"steps": torch.tensor(3.0), "deep": [{"m": torch.arange(4)}], "number": np.float32(0.5)}
    got = through(value)
    assert torch.equal(got["steps"], value["steps"]) and torch.equal(got["deep"][0]["m"], torch.arange(4))
    assert got["number"] == 0.5 and type(got["number"]) is float


@pytest.mark.parametrize("value", [object(), lambda: 0, {"a": {"b": {1, 2}}}])
def test_what_has_no_safe_form_is_refused_by_its_place(value: Any) -> None:
    with pytest.raises(ds_al.ALCheckpointError, match=r"value.*cannot be saved"):
        pack(value, {}, at="value")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("torch.sparse_csr", torch.eye(2).to_sparse_csr()),
        ("nested", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        ("quantized", torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)),
    ],
)
def test_a_tensor_that_is_more_than_its_values_is_refused_by_its_place(kind: str, value: torch.Tensor) -> None:
    with pytest.raises(ds_al.ALCheckpointError, match=rf"at/0: a {kind} tensor cannot be saved"):
        pack([value], {}, at="at")


def test_a_file_keeps_bits_shared_memory_and_strides_apart(tmp_path: Any) -> None:
    shared = torch.randn(3, 4)
    tensors = {
        "a": shared,
        "b": shared.view(4, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "nan": torch.tensor([math.nan, -0.0]),
        "half": torch.randn(5).bfloat16(),
        "none": torch.zeros(0, 2),
    }
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    verify(tmp_path, [record], of="AL layer 5")
    got = read_tensors(tmp_path, record)
    for name, value in tensors.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape
        assert torch.equal(got[name].view(torch.uint8), value.contiguous().view(torch.uint8)), name
    assert record["tensors"]["b"] == ["float32", [4, 3]]
    (tmp_path / "x.safetensors").write_bytes(b"other")
    with pytest.raises(ds_al.ALCheckpointError, match=r"'x.safetensors' of AL layer 5.*has 5 bytes"):
        verify(tmp_path, [record], of="AL layer 5")
    assert not torch.isnan(got["a"]).any()  # read into memory of its own: the file may change
