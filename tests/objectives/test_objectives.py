"""What each objective computes and trains, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer, predict
from ds_al.objectives import (
    OBJECTIVES,
    Contrast,
    Decoded,
    Greedy,
    Mse,
    NextToken,
    Objective,
    Readout,
    TokenCodes,
    resolve,
)

B, V, K = 5, 3, 4


def layer(objective: Any, *, first: bool = True, **options: Any) -> ALLayer:
    torch.manual_seed(0)
    width = V if first else K
    h = nn.Linear(K, V) if resolve(objective).trains_decoder else nn.Linear(K, width)
    g = nn.Identity() if resolve(objective).trains_decoder else nn.Linear(width, K)
    return ALLayer(nn.Linear(6, 6), nn.Linear(6, K), g, h, objective=objective, **options)


def passed(one: ALLayer) -> tuple[Any, Any, Any, torch.Tensor]:
    labels = torch.tensor([0, 2, 1, 1, 0])
    t = one.objective.first_target(labels, F.one_hot(labels, V).float())
    s_out, t_out = one(torch.randn(B, 6), t)
    return s_out, t_out, t, labels


@pytest.mark.parametrize("name", ["mse", "contrast", "decoded", "greedy"])
def test_associated_loss_trains_its_own_parameters_alone(name: str) -> None:
    one = layer(name)
    s_out, t_out, t, _ = passed(one)
    one.local_losses(s_out, t_out, t).associated.backward()
    trained = {n for n, p in one.named_parameters() if p.grad is not None}
    own = {"f.weight", "f.bias", "b.weight", "b.bias"}
    with_decoder = own | {"h.weight", "h.bias"}
    assert trained == {"mse": own, "contrast": own, "decoded": own, "greedy": with_decoder}[name]
    associated = {id(p) for p in one.associated_parameters()}
    autoencoder = {id(p) for p in one.autoencoder_parameters()}
    assert not associated & autoencoder
    assert associated | autoencoder == {id(p) for p in one.parameters()}


def test_a_frozen_own_decoder_gets_no_gradient_from_the_associated_loss() -> None:
    live, frozen = layer({"name": "decoded", "own_decoder": "live"}), layer("decoded")
    losses = []
    for one in (live, frozen):
        torch.manual_seed(1)
        s_out, t_out, t, _ = passed(one)
        losses.append(one.local_losses(s_out, t_out, t).associated)
        losses[-1].backward()
    assert losses[0] == losses[1]
    assert live.h.weight.grad is not None and frozen.h.weight.grad is None
    assert torch.equal(live.f.weight.grad, frozen.f.weight.grad)


def test_contrast_is_the_cross_entropy_of_cosines_to_the_codes_of_all_classes() -> None:
    one = layer({"name": "contrast", "temperature": 0.5})
    s_out, t_out, t, labels = passed(one)
    code, codes = one.b(s_out), one.g(torch.eye(V))
    cosines = torch.stack([F.cosine_similarity(code, codes[v].expand_as(code)) for v in range(V)], dim=1)
    losses = one.local_losses(s_out, t_out, t)
    assert losses.associated.item() == pytest.approx(F.cross_entropy(cosines / 0.5, labels).item(), abs=1e-6)
    assert losses.autoencoder.item() == pytest.approx(F.mse_loss(one.h(codes), torch.eye(V)).item(), abs=1e-6)


def test_contrast_can_learn_its_temperature() -> None:
    one = layer({"name": "contrast", "temperature": 0.5, "learned_temperature": True})
    s_out, t_out, t, _ = passed(one)
    one.local_losses(s_out, t_out, t).associated.backward()
    assert one.objective.log_temperature.grad is not None
    assert any(p is one.objective.log_temperature for p in one.associated_parameters())
    assert not list(layer("contrast").objective.parameters())


def test_contrast_predicts_the_nearest_code_or_through_the_decoders() -> None:
    nearest = [layer("contrast"), layer("contrast", first=False)]
    decoded = [
        layer({"name": "contrast", "exit": "decode"}),
        layer({"name": "contrast", "exit": "decode"}, first=False),
    ]
    x = torch.randn(B, 6)
    code = nearest[1].b(nearest[1].f(nearest[0].f(x)))
    codes = nearest[1].g(nearest[0].g(torch.eye(V)))
    want = torch.stack([F.cosine_similarity(code, codes[v].expand_as(code)) for v in range(V)], dim=1) / 0.1
    assert torch.allclose(predict(nearest, x, num_classes=V), want, atol=1e-5)
    assert torch.allclose(predict(decoded, x), nearest[0].h(nearest[1].h(code)), atol=1e-6)
    with pytest.raises(ValueError, match="num_classes"):
        predict(nearest, x)


def test_decoded_reads_its_code_through_the_copies_of_earlier_decoders() -> None:
    one = layer("decoded", first=False)
    copy = nn.Linear(K, V)
    one.objective.earlier = [copy]
    labels = torch.tensor([0, 2, 1, 1, 0])
    s_out, t_out = one(torch.randn(B, 6), (labels, torch.randn(B, K)))
    associated = one.objective.associated_loss(one, s_out, t_out)
    assert associated.item() == pytest.approx(F.cross_entropy(copy(one.h(one.b(s_out))), labels).item(), abs=1e-6)
    assert not any("earlier" in name for name, _ in one.named_parameters())


def test_greedy_has_no_target_side() -> None:
    one = layer("greedy")
    s_out, t_out, t, labels = passed(one)
    losses = one.local_losses(s_out, t_out, t)
    assert losses.associated == F.cross_entropy(one.h(one.b(s_out)), labels)
    assert losses.autoencoder == 0 and not losses.autoencoder.requires_grad
    assert torch.equal(t_out, labels)


@pytest.mark.parametrize("name", ["contrast", "decoded", "greedy"])
def test_label_smoothing_spreads_a_share_of_the_label_over_all_classes(name: str) -> None:
    def loss(smoothing: float) -> float:
        torch.manual_seed(0)
        one = layer({"name": name, "label_smoothing": smoothing})
        s_out, t_out, t, _ = passed(one)
        return one.local_losses(s_out, t_out, t).associated.item()

    torch.manual_seed(0)
    one = layer(name)
    s_out, t_out, _, labels = passed(one)
    table = t_out[1] if name == "contrast" else None
    log = one.objective.scores(one, s_out, earlier=[], table=table).log_softmax(dim=1)
    smooth = 0.7 * F.one_hot(labels, V) + 0.3 / V
    assert loss(0.3) == pytest.approx(-(smooth * log).sum(dim=1).mean().item(), abs=1e-5)
    assert loss(0.0) == pytest.approx(F.nll_loss(log, labels).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("contrastive", ["contrastive", "mse, contrast, decoded, greedy"]),
        ({"name": "contrast", "tau": 1}, ["no option 'tau'", "temperature"]),
        ({"name": "mse", "tau": 1}, ["no option 'tau'", "none"]),
        ({"name": "contrast", "temperature": 0}, ["temperature=0"]),
        ({"name": "contrast", "exit": "far"}, ["exit='far'"]),
        ({"name": "contrast", "label_smoothing": 1.0}, ["label_smoothing=1.0", "less than 1"]),
        ({"name": "decoded", "label_smoothing": -0.1}, ["label_smoothing=-0.1"]),
        ({"name": "greedy", "label_smoothing": 2}, ["label_smoothing=2"]),
        ({"name": "mse", "label_smoothing": 0.1}, ["no option 'label_smoothing'"]),
        ({"name": "decoded", "own_decoder": "cold"}, ["own_decoder='cold'"]),
        ({"name": "decoded", "refresh_every": 0}, ["refresh_every=0"]),
        ({"name": "readout", "refresh_every": 0}, ["readout", "refresh_every=0"]),
        ({"name": "next_token", "token_share": 0}, ["next_token", "token_share=0"]),
        ({"name": "next_token", "token_share": True}, ["next_token", "token_share=True"]),
        ({"name": "readout", "token_share": 1.5}, ["token_share=1.5"]),
        ({"name": "next_token", "vocabulary_share": 0}, ["next_token", "vocabulary_share=0"]),
        ({"name": "readout", "vocabulary_share": "half"}, ["vocabulary_share='half'"]),
        ({"name": "next_token", "last_layer": 1}, ["last_layer=1", "expected a bool"]),
        ({"name": "token_codes", "codes": "all"}, ["codes='all'", "'both'"]),
        ({"name": "token_codes", "negatives": -1}, ["negatives=-1"]),
    ],
)
def test_wrong_objectives_are_refused_by_name(objective: Any, words: list[str]) -> None:
    with pytest.raises(ALConfigError) as error:
        resolve(objective)
    assert all(word in str(error.value) for word in words), error.value


def test_every_layer_has_a_copy_of_an_objective_of_ones_own() -> None:
    class Mine(Mse):
        pass

    mine = Mine()
    one, two = layer(mine).objective, layer(mine).objective
    assert type(one) is type(two) is Mine and len({id(mine), id(one), id(two)}) == 3
    assert isinstance(mine, Objective)
    kinds = [Mse, Contrast, Decoded, Greedy, NextToken, Readout, TokenCodes]
    assert [type(resolve(name)) for name in OBJECTIVES] == kinds
