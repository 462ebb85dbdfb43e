"""Recipes fill in what a config leaves out, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_al.errors import ALConfigError
from ds_al.experiment.recipes import RECIPES, with_recipe
from ds_al.models.cost import model_cost

IMAGES: dict[str, Any] = {"shape": (8, 3, 32, 32), "in_shape": (3, 32, 32), "num_classes": 10}
TEXTS: dict[str, Any] = {"shape": (8, 64), "dtype": torch.int64, "vocab_size": 1000, "num_classes": 4}


def config(model: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"experiment": {"name": "x", "recipe": "ours", "model": model}, **more}


def test_a_config_without_recipe_stays_as_it_is() -> None:
    plain = {"optimizer": {"type": "AdamW"}, "experiment": {"model": {"name": "vgg"}}}
    assert with_recipe(plain) == plain and with_recipe({}) == {}


def test_what_is_left_out_is_filled_in_once() -> None:
    given = config({"name": "vgg"})
    full = with_recipe(given)
    assert full["optimizer"] == RECIPES["ours"]["vgg"]["optimizer"]
    assert full["experiment"]["model"]["al_options"] == RECIPES["ours"]["vgg"]["al_options"]
    assert with_recipe(full) == full
    assert given == config({"name": "vgg"})


def test_what_the_config_says_itself_stays() -> None:
    own = {"bridge_width": 0.1, "num_layers": 2, "objective": {"refresh_every": 3}}
    full = with_recipe(config({"name": "vgg", "al_options": own}, optimizer={"type": "SGD"}))
    options = full["experiment"]["model"]["al_options"]
    assert full["optimizer"] == {"type": "SGD"}
    assert (options["bridge_width"], options["num_layers"], options["bridge"]) == (0.1, 2, "mimic")
    assert options["objective"] == {**RECIPES["ours"]["vgg"]["al_options"]["objective"], "refresh_every": 3}


def test_the_twin_is_trained_with_the_recipes_label_smoothing() -> None:
    objective = RECIPES["ours"]["vgg"]["al_options"]["objective"]
    twin = {"associated_learning": {"method": "bp_1f1b"}}
    assert with_recipe(config({"name": "vgg"}, **twin))["experiment"]["label_smoothing"] == objective["label_smoothing"]
    assert "label_smoothing" not in with_recipe(config({"name": "vgg"}))["experiment"]
    own = {"experiment": {"recipe": "ours", "label_smoothing": 0.0, "model": {"name": "vgg"}}, **twin}
    assert with_recipe(own)["experiment"]["label_smoothing"] == 0.0


@pytest.mark.parametrize("objective", ["greedy", {"name": "greedy"}])
def test_another_objective_takes_none_of_its_options(objective: Any) -> None:
    full = with_recipe(config({"name": "vgg", "al_options": {"objective": objective}}))
    assert full["experiment"]["model"]["al_options"]["objective"] == {"name": "greedy"}


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ({}, 0.03), ({"preset": "small"}, 0.03), ({"num_blocks": 4}, 0.03),
        ({"preset": "deep"}, 0.01), ({"preset": "small", "num_blocks": 6}, 0.01),
        ({"preset": "deep", "num_blocks": 2}, 0.03),
    ],
)  # fmt: skip
def test_a_transformer_of_many_blocks_has_a_lower_rate(options: dict[str, Any], lr: float) -> None:
    """At 0.03 a layer of eight blocks once stayed at chance, without a word."""
    full = with_recipe(config({"name": "transformer", "options": options}))
    assert full["optimizer"]["params"]["lr"] == lr
    own = {"type": "AdamW", "params": {"lr": 0.5}}
    assert with_recipe(config({"name": "transformer", "options": options}, optimizer=own))["optimizer"] == own


def test_mistakes_are_named() -> None:
    with pytest.raises(ALConfigError, match="'theirs': expected one of ours, many_classes"):
        with_recipe({"experiment": {"recipe": "theirs", "model": {"name": "vgg"}}})
    with pytest.raises(ALConfigError, match="got model 'unet'"):
        with_recipe(config({"name": "unet"}))


@pytest.mark.parametrize("layers", [2, 4])
def test_that_for_many_classes_costs_as_much_as_the_twin(layers: int) -> None:
    full = with_recipe({"experiment": {"name": "x", "recipe": "many_classes", "model": {"name": "vgg"}}})
    options = full["experiment"]["model"]["al_options"]
    assert (options["objective"]["name"], options["bridge_width"]) == ("greedy", 0.75)
    costs = model_cost("vgg", preset="small", num_layers=layers, **options, **{**IMAGES, "num_classes": 100})
    assert costs.rho <= 1.01


@pytest.mark.parametrize("model", ["vgg", "resnet", "transformer", "lstm"])
@pytest.mark.parametrize("layers", [2, 4])
def test_ours_costs_at_most_a_tenth_more_than_the_twin(model: str, layers: int) -> None:
    options = with_recipe(config({"name": model}))["experiment"]["model"]["al_options"]
    data = IMAGES if model in ("vgg", "resnet") else TEXTS
    assert model_cost(model, preset="small", num_layers=layers, **options, **data).rho <= 1.10
