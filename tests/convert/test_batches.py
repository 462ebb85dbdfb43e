"""Batches of transformers: each key gives the scores that the model itself gives, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_al.convert import batch_fn
from ds_al.convert.hugging_face import layer_specs
from ds_al.errors import ALDataError
from ds_al.layer import predict
from tests.convert.test_hugging_face import EXACT, built
from tests.support.hugging_face_models import CASES, LM, PAD, Case

TEXT = [name for name, case in CASES.items() if case.task != "image-classification"]
DECODERS = ("gpt2", "llama", "qwen2")


def network(case: Case, model: Any) -> Any:
    return built(layer_specs(model, task=case.task, num_al_layers=2, objective="greedy")[0])


def scores_of_both(case: Case, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of the AL network for the batch, and of the model."""
    x, _ = batch_fn({**inputs, "labels": torch.zeros(1)})
    with torch.no_grad():
        return predict(network(case, model), x), model(**inputs).logits


def close(name: str, found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found, wanted) if name in EXACT else torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.uint8, torch.float32])
@pytest.mark.parametrize("name", TEXT)
def test_a_mask_of_any_type_hides_the_same(name: str, kind: torch.dtype) -> None:
    case = CASES[name]
    inputs = case.inputs()
    found, wanted = scores_of_both(case, case.build(), {**inputs, "attention_mask": inputs["attention_mask"].to(kind)})
    assert close(name, found, wanted)


@pytest.mark.parametrize("name", TEXT)
def test_a_row_without_tokens_is_as_in_the_model(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    inputs["attention_mask"][2] = 0
    inputs["input_ids"][2] = PAD
    found, wanted = scores_of_both(case, case.build(), inputs)
    assert close(name, found, wanted)


def test_token_types_do_not_take_the_place_of_a_missing_mask() -> None:
    case = CASES["bert"]
    inputs = case.inputs("none")
    del inputs["attention_mask"]
    found, wanted = scores_of_both(case, case.build(), inputs)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_without_a_padding_token_reads_the_last_token_of_the_mask(name: str, side: str) -> None:
    case = CASES[name]
    model = case.build(pad_token_id=None)
    layers = network(case, model)
    ids, mask = case.inputs(side)["input_ids"], case.inputs(side)["attention_mask"]
    alone = ids[1:2, :4] if side == "right" else ids[1:2]
    seen = None if side == "right" else mask[1:2]
    with torch.no_grad():
        wanted = model(alone, attention_mask=seen).logits
    torch.testing.assert_close(predict(layers, (ids, mask))[1:2], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(predict(layers, alone if side == "right" else (alone, seen)), wanted)
    with pytest.raises(ALDataError, match=r"model without a padding token.*give \(ids, mask\)"):
        predict(layers, ids)


@pytest.mark.parametrize("name", [name for name in TEXT if CASES[name].task == LM])
@pytest.mark.parametrize("ends", [PAD, [2, PAD]])
def test_a_padding_token_that_ends_texts_hides_none_of_them(name: str, ends: Any) -> None:
    """As in transformers, where ids alone are all visible."""
    case = CASES[name]
    model = case.build(eos_token_id=ends)
    ids = case.inputs("none")["input_ids"]
    ids[:, 3] = PAD
    found, wanted = scores_of_both(case, model, {"input_ids": ids})
    assert torch.equal(found, wanted)


def test_values_of_none_are_left_out_and_labels_kept() -> None:
    labels = torch.tensor([1, 2, 3])
    inputs = CASES["llama"].inputs()
    x, found = batch_fn({**inputs, "position_ids": None, "labels": labels})
    assert found is labels and x == tuple(inputs.values())
