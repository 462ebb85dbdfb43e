"""What a run's model is told of its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ds_al.data import load_data, load_vision
from ds_al.errors import ALConfigError, ALDataError
from ds_al.experiment.inputs import DataFacts
from ds_al.models import build_al, build_twin
from ds_al.models.cost import network_cost
from tests.support.parquet_files import config, write_texts

IMAGES = DataFacts.of(load_vision("fashion-mnist-small"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataFacts:
    folder: Path = write_texts(tmp_path_factory.mktemp("texts"))
    return DataFacts.of(load_data(config(folder, max_length=12, padding="longest"), seed=0))


def test_models_get_the_options_that_they_take(texts: DataFacts) -> None:
    assert IMAGES.options("vgg") == {"num_classes": 10, "in_shape": (1, 28, 28)}
    common = {"num_classes": 3, "vocab_size": texts.vocab_size, "padding_id": 0}
    assert texts.options("lstm") == common
    assert texts.options("transformer") == {**common, "max_length": 12}
    assert (IMAGES.dtype, texts.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_cost_of_a_model_of_texts_is_counted(texts: DataFacts, model: str) -> None:
    al, twin = (build(model, **texts.options(model)) for build in (build_al, build_twin))
    cost = network_cost(al, twin, shape=(2, *texts.shape), num_classes=3, dtype=texts.dtype)
    assert cost.twin.flops > 0 and 0.5 < cost.rho < 2  # below 1 where detached inputs save more than bridges cost


def test_a_model_that_cannot_read_the_data_is_refused_with_those_that_can(texts: DataFacts) -> None:
    with pytest.raises(ALConfigError, match=r"'vgg' does not read text.*\['lstm', 'transformer'\]"):
        texts.options("vgg")
    with pytest.raises(ALConfigError, match=r"'lstm' does not read images.*'mlp'.*'vgg'"):
        IMAGES.options("lstm")


def test_an_empty_part_is_refused_before_training() -> None:
    splits = load_vision("fashion-mnist-small", validation_fraction=0.0)
    with pytest.raises(ALDataError, match=r"the validation part is empty.*raise experiment\.data\.validation_fraction"):
        DataFacts.of(splits)
    splits = dataclasses.replace(load_vision("fashion-mnist-small"), test=splits.validation)
    with pytest.raises(ALDataError, match="the test part is empty"):
        DataFacts.of(splits)
