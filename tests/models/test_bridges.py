"""Bridges of vision networks and size presets: what their options change, and what they cost."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from ds_al.errors import ALConfigError
from ds_al.experiment.recipes import RECIPES
from ds_al.models import PRESETS, build_al, build_twin
from ds_al.models.cost import NetworkCost, model_cost
from ds_al.models.vision import ResidualBlock
from tests.support.model_cases import CASES, CLASSES, al_layers, build

IMAGES: dict[str, Any] = {"in_shape": (3, 16, 16), "num_classes": 10}
TEXTS: dict[str, Any] = {"vocab_size": 100, "num_classes": 4}


@functools.cache
def cost(name: str, **options: Any) -> NetworkCost:
    return model_cost(name, shape=(8, 3, 16, 16), **{**IMAGES, **options})


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


def test_a_narrow_bridge_costs_less_than_the_network_it_mimics() -> None:
    layers = build(build_al("vgg", in_shape=(1, 28, 28), num_classes=10))
    later = sum(p.numel() for layer in layers[1:] for p in layer.f.parameters())
    assert sum(p.numel() for p in layers[0].b.parameters()) < later / 2


@pytest.mark.parametrize("name", ["vgg", "resnet"])
@pytest.mark.parametrize(
    "cheaper",
    [{"bridge_width": 0.25}, {"bridge_depth": 1}, {"bridge_depthwise": True}, {"bridge_depth": 0}],
    ids=str,
)
def test_each_option_makes_bridges_cheaper_and_leaves_the_network(name: str, cheaper: dict[str, Any]) -> None:
    plain, other = cost(name), cost(name, **cheaper)
    assert other.bridge_share < plain.bridge_share < cost(name, bridge_pool_first=False).bridge_share
    assert other.flops()["f"] == plain.flops()["f"] and other.twin == plain.twin
    assert other.parameters()["b"] < plain.parameters()["b"]


def test_the_bridge_share_is_the_part_of_rho_that_bridges_are() -> None:
    found = cost("vgg")
    flops = found.flops()
    assert found.bridge_share == pytest.approx(flops["b"] / flops["twin"])
    assert found.rho == pytest.approx(sum(flops[key] for key in "fbgh") / flops["twin"])


def test_a_residual_bridge_has_one_block_per_stage_to_come_strided_like_it() -> None:
    layers = build(build_al("resnet", widths=(4, 8, 12), num_layers=6, bridge_width=0.5, **IMAGES))
    blocks = [[part for part in layer.b.modules() if isinstance(part, ResidualBlock)] for layer in layers]
    # After block 1 of a stage, what is left of it counts as one to come, and is not strided any more.
    assert [len(each) for each in blocks] == [3, 2, 2, 1, 1, 0]
    strides = [[convolutions(block)[0].stride[0] for block in each] for each in blocks]
    assert strides == [[1, 2, 2], [2, 2], [1, 2], [2], [1], []]
    assert [[convolutions(block)[0].out_channels for block in each] for each in blocks[:2]] == [[2, 4, 6], [4, 6]]


def test_a_bridge_of_depth_n_copies_the_next_n_stages_alone() -> None:
    for depth, want in ((None, [2, 1, 0]), (1, [1, 1, 0]), (0, [0, 0, 0])):
        layers = al_layers(CASES["vgg"], bridge_depth=depth)
        assert [len(convolutions(layer.b)) for layer in layers] == want


def test_the_last_bridge_is_the_twins_head() -> None:
    for key in ("vgg", "resnet"):
        bridge = al_layers(CASES[key])[-1].b
        assert not convolutions(bridge) and isinstance(bridge[0][0], nn.AdaptiveAvgPool2d)


def test_a_depthwise_bridge_looks_at_one_channel_at_a_time() -> None:
    spatial = [each for each in convolutions(al_layers(CASES["vgg depthwise"])[0].b) if each.kernel_size == (3, 3)]
    assert spatial and all(each.groups == each.in_channels for each in spatial)


@pytest.mark.parametrize("residual", [False, True])
def test_a_map_pooled_by_its_average_sends_a_gradient_to_all_of_it(residual: bool) -> None:
    shares = {}
    for pool in ("max", "average"):
        options = {"bridge_pool": pool, "bridge_residual": residual}
        bridge = build(build_al("vgg", blocks=((8, "M"), (8,)), **options, **IMAGES))[0].b
        s = torch.rand(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        bridge(s).square().sum().backward()
        shares[pool] = s.grad.ne(0).float().mean().item()
    assert shares["max"] <= 0.25 and shares["average"] > 0.9


def test_bridges_without_muon_leave_it_to_the_network() -> None:
    def by_muon(part: nn.Module) -> list[bool]:
        return [getattr(p, "use_muon", True) for p in part.parameters() if p.dim() > 1]

    for options, want in (({}, {True, False}), ({"bridge_muon": False}, {False})):  # what ends a bridge never is
        layer = build(build_al("resnet", **options, **IMAGES))[0]
        assert set(by_muon(layer.b)) == want and all(by_muon(layer.f))


@pytest.mark.parametrize("residual", [False, True])
def test_bridges_have_the_networks_norm(residual: bool) -> None:
    for layer in build(build_al("resnet", norm="group", bridge_residual=residual, **IMAGES)):
        assert not [part for part in layer.modules() if isinstance(part, nn.BatchNorm2d)]


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ALConfigError, match=r"bridge_pool='mean'.*'max' or 'average'"):
        build_al("vgg", bridge_pool="mean", **IMAGES)


def test_published_vision_codes_are_sigmoids_read_by_mean_squared_error() -> None:
    for key in ("vgg published", "resnet published"):
        for layer in al_layers(CASES[key]):
            assert [type(part[-1]) for part in (layer.b, layer.g, layer.h)] == [nn.Sigmoid] * 3
            assert layer.autoencoder_loss.__name__ == "mse"


def test_every_preset_makes_both_forms() -> None:
    assert all("small" in presets for presets in PRESETS.values())
    for name, presets in PRESETS.items():
        data = TEXTS if name in ("lstm", "transformer") else IMAGES
        for preset in presets:
            blocks = 8 if preset == "deep" else 4
            assert len(build_al(name, preset=preset, **data)) == blocks
            assert len(build_twin(name, preset=preset, **data)) in (blocks, blocks + 1)


@pytest.mark.parametrize("name", ["vgg", "resnet", "transformer"])
def test_eight_blocks_are_one_two_four_and_eight_layers_with_the_recipe(name: str) -> None:
    """K = 1 with ``greedy`` is back-propagation: one layer of all blocks, whose loss is the network's own."""
    data = TEXTS if name == "transformer" else IMAGES
    for recipe in (RECIPES["ours"][name]["al_options"], {"objective": "greedy"}):
        counts = [len(build_al(name, preset="deep", num_layers=k, **data, **recipe)) for k in (1, 2, 4, 8)]
        assert counts == [1, 2, 4, 8]
    (whole,) = build(build_al(name, preset="deep", num_layers=1, objective="greedy", **data))
    assert sum(p.numel() for p in whole.f.parameters()) == sum(
        p.numel() for layer in build(build_al(name, preset="deep", **data)) for p in layer.f.parameters()
    )
    assert isinstance(whole.g, nn.Identity)


def test_the_published_networks_have_their_published_sizes() -> None:
    data: dict[str, Any] = {"preset": "paper", "in_shape": (3, 32, 32), "num_classes": 200}
    with torch.device("meta"):
        layers = {name: [spec.build() for spec in build_al(name, **data)] for name in ("vgg", "resnet")}
        head = build_twin("vgg", **data)[-1].build()

    def count(name: str, part: str) -> int:
        return sum(p.numel() for layer in layers[name] for p in getattr(layer, part).parameters())

    assert (head[1].in_features, head[1].out_features) == (2048, 2500)
    assert count("vgg", "f") == pytest.approx(6.8e6, rel=0.01)
    assert count("vgg", "b") == pytest.approx(111e6, rel=0.01)
    assert count("resnet", "f") == pytest.approx(11.17e6, rel=0.01)


def test_published_texts_read_labels_by_cross_entropy_through_a_tanh() -> None:
    for name in ("lstm", "transformer"):
        layers = build(build_al(name, preset="paper", width=24, **TEXTS))
        assert [type(layer.h[-1]) for layer in layers] == [nn.Tanh] + [nn.Identity] * 3
        assert {type(part[-1]) for layer in layers for part in (layer.b, layer.g)} == {nn.Tanh}
        assert [layer.autoencoder_loss.__name__ for layer in layers] == ["cross_entropy", "mse", "mse", "mse"]
        assert layers[0].g[0].out_features == 128


def test_options_override_a_preset_and_unknown_presets_are_refused() -> None:
    with torch.device("meta"):
        layer = build_al("resnet", preset="paper", code_width=9, **IMAGES)[0].build()
    assert layer.g[0].out_features == 9
    for make in (build_al, build_twin):
        known = r"preset='huge' for 'vgg': expected one of \['deep', 'paper', 'small'\]"
        with pytest.raises(ALConfigError, match=known):
            make("vgg", preset="huge", **IMAGES)
    with pytest.raises(ALConfigError, match=r"preset='paper' for 'mlp': expected one of \['small'\]"):
        build_al("mlp", preset="paper", in_shape=(4,), num_classes=CLASSES)
