"""Frozen blocks below all that train have no backward: AL layers of as even work hold more of them."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from ds_al.convert.hugging_face import layer_specs, twin_layers
from ds_al.convert.layers import layer_specs as specs_of_layers
from ds_al.errors import ALConfigError
from tests.support.hugging_face_models import CASES

TASK = "sequence-classification"


def sizes(*, frozen: tuple[int, ...], layers: int, embeddings: bool = True) -> list[int]:
    """Blocks of each AL layer of a BERT of four blocks, by work."""
    model = CASES["bert"].build()
    for part in (*([] if embeddings else [model.bert.embeddings]), *(model.bert.encoder.layer[i] for i in frozen)):
        part.requires_grad_(False)
    _, source = layer_specs(model, task=TASK, num_al_layers=layers, groups="by-work")
    twin = twin_layers(model, task=TASK, num_al_layers=layers, groups="by-work")
    assert len(twin) == layers + 1, "the head is a layer of its own"
    found: list[int] = source.description["groups"]
    return found


@pytest.mark.parametrize(
    ("frozen", "embeddings", "layers", "expected"),
    [
        ((0, 1), False, 2, [3, 1]),  # work 1, 1, 3, 3
        ((0, 1, 2), False, 2, [3, 1]),  # 1, 1, 1, 3
        ((2, 3), True, 2, [2, 2]),  # 3, 3, 2, 2: gradients pass through the upper ones
        ((0, 1), True, 2, [2, 2]),  # 3, 2, 3, 3: gradients reach the embeddings
        ((0, 1, 2, 3), True, 2, [2, 2]),  # 3, 2, 2, 2: the embeddings alone train
        ((0, 1), False, 4, [1, 1, 1, 1]),
        ((), True, 3, [1, 1, 2]),  # as without it
        ((0, 1, 2, 3), False, 3, [1, 1, 2]),
    ],
)
def test_layers_have_as_even_work_as_whole_blocks_allow(
    frozen: tuple[int, ...], embeddings: bool, layers: int, expected: list[int]
) -> None:
    assert sizes(frozen=frozen, layers=layers, embeddings=embeddings) == expected


def test_too_many_layers_and_other_words_are_refused() -> None:
    with pytest.raises(ALConfigError, match=r"num_al_layers=5: expected 1\.\.4"):
        sizes(frozen=(0,), layers=5)
    with pytest.raises(ALConfigError, match=r"groups='work': expected .*, or 'by-work'"):
        layer_specs(CASES["bert"].build(), task=TASK, groups="work")  # type: ignore[arg-type]
    with pytest.raises(ALConfigError, match=r"groups=array\(\[2, 2\]\): expected a list"):
        layer_specs(CASES["bert"].build(), task=TASK, groups=np.array([2, 2]))  # type: ignore[arg-type]
    with pytest.raises(ALConfigError, match=r"groups='by-work': expected a list of whole numbers, 1 or more in each"):
        specs_of_layers([nn.Linear(2, 2)], num_classes=2, example=None, groups="by-work")  # type: ignore[arg-type]
