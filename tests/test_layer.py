"""The algorithm in one process: its gradients by hand, and what must not reach what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_al.errors import ALConfigError, ALLayerError
from ds_al.layer import ALLayer, predict, seed_layer
from ds_al.objectives.mse import decode
from ds_al.tensors import stop_gradient

B, X, V, D, K = 5, 7, 3, 6, 4


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)


def linear_layer(x: int = X, d: int = D, v: int = V, **options: object) -> ALLayer:
    torch.manual_seed(0)
    return ALLayer(linear(x, d), linear(d, K), linear(v, K), linear(K, v), **options)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    s = torch.randn(B, X, dtype=torch.float64, generator=generator)
    labels = torch.randint(V, (B,), generator=generator)
    return s, nn.functional.one_hot(labels, V).double()


def test_gradients_equal_the_derivation_by_hand() -> None:
    """For linear f, b, g, h and mean squared errors, with S = X F', P = S B', T = Y G', R = T H':

    A = mean((P - T)^2)    dA/dB = 2/(BK) (P - T)' S     dA/dF = 2/(BK) ((P - T) B)' X
    E = mean((R - Y)^2)    dE/dH = 2/(BV) (R - Y)' T     dE/dG = 2/(BV) ((R - Y) H)' Y
    """
    layer, (x, y) = linear_layer(), batch()
    s_out, t_out = layer(x, y)
    associated, autoencoder = layer.local_losses(s_out, t_out, y)
    (associated + autoencoder).backward()
    f, b, g, h = (part.weight.detach() for part in (layer.f, layer.b, layer.g, layer.h))
    s, t = x @ f.T, y @ g.T
    p, r = s @ b.T, t @ h.T
    torch.testing.assert_close(associated.detach(), (p - t).square().mean())
    torch.testing.assert_close(autoencoder.detach(), (r - y).square().mean())
    torch.testing.assert_close(layer.b.weight.grad, 2 / (B * K) * (p - t).T @ s)
    torch.testing.assert_close(layer.f.weight.grad, 2 / (B * K) * ((p - t) @ b).T @ x)
    torch.testing.assert_close(layer.h.weight.grad, 2 / (B * V) * (r - y).T @ t)
    torch.testing.assert_close(layer.g.weight.grad, 2 / (B * V) * ((r - y) @ h).T @ y)


@pytest.mark.parametrize("part", ["f", "b", "g", "h"])
def test_gradients_equal_finite_differences(part: str) -> None:
    """Of A for f and b with the target held fixed, of E for g and h."""
    layer, (x, y) = linear_layer(autoencoder_loss="cross_entropy"), batch()
    s_out, t_out = layer(x, y)
    sum(layer.local_losses(s_out, t_out, y)).backward()
    weight = getattr(layer, part).weight
    target = t_out.detach()

    def loss() -> float:
        with torch.no_grad():
            if part in "fb":
                return float(layer.associated_loss(layer.b(layer.f(x)), target))
            return float(layer.autoencoder_loss(layer.h(layer.g(y)), y))

    step = 1e-6
    for index in range(weight.numel()):
        with torch.no_grad():
            weight.view(-1)[index] += step
            up = loss()
            weight.view(-1)[index] -= 2 * step
            down = loss()
            weight.view(-1)[index] += step
        assert float(weight.grad.view(-1)[index]) == pytest.approx((up - down) / (2 * step), abs=1e-7)


def two_layers() -> list[ALLayer]:
    torch.manual_seed(2)
    return [
        ALLayer(linear(X, D), linear(D, K), linear(V, K), linear(K, V)),
        ALLayer(linear(D, D), linear(D, K), linear(K, K), linear(K, K)),
    ]


def gradients(layers: list[ALLayer], *, scale: tuple[float, float] = (1.0, 1.0)) -> list[list[Tensor | None]]:
    """Gradients of both layers' losses, the losses of each layer multiplied by ``scale``."""
    s, t = batch()
    for layer, factor in zip(layers, scale, strict=True):
        layer.zero_grad()
        s_out, t_out = layer(s, t)
        (sum(layer.local_losses(s_out, t_out, t)) * factor).backward()
        s, t = stop_gradient(s_out), stop_gradient(t_out)
    return [[p.grad.clone() for p in layer.parameters()] for layer in layers]


def test_no_layer_learns_from_another_layers_loss() -> None:
    layers = two_layers()
    plain = gradients(layers)
    for changed, scale in enumerate([(3.0, 1.0), (1.0, 3.0)]):
        other = 1 - changed
        scaled = gradients(layers, scale=scale)
        assert all(torch.equal(a, b) for a, b in zip(plain[other], scaled[other], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(plain[changed], scaled[changed], strict=True))


def test_a_layers_gradients_do_not_depend_on_a_later_layers_weights() -> None:
    layers = two_layers()
    plain = gradients(layers)
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.add_(1.0)
    perturbed = gradients(layers)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], perturbed[0], strict=True))


def test_the_two_losses_train_disjoint_parameters() -> None:
    layer, (x, y) = linear_layer(), batch()
    s_out, t_out = layer(x, y)
    losses = layer.local_losses(s_out, t_out, y)
    losses.associated.backward()
    assert all(p.grad is not None for p in layer.associated_parameters())
    assert all(p.grad is None for p in layer.autoencoder_parameters())
    layer.zero_grad()
    losses.autoencoder.backward()
    assert all(p.grad is None for p in layer.associated_parameters())
    assert all(p.grad is not None for p in layer.autoencoder_parameters())


def test_target_gradient_lets_the_associated_loss_train_g() -> None:
    layer, (x, y) = linear_layer(target_gradient=True), batch()
    s_out, t_out = layer(x, y)
    layer.local_losses(s_out, t_out, y).associated.backward()
    assert layer.g.weight.grad is not None and layer.h.weight.grad is None


def test_inference_and_every_exit_are_the_functions_composed() -> None:
    one, two = two_layers()
    x, _ = batch()
    s_1 = one.f(x)
    assert torch.equal(predict([one, two], x, exit=1), one.h(one.b(s_1)))
    assert torch.equal(predict([one, two], x), one.h(two.h(two.b(two.f(s_1)))))
    assert torch.equal(decode([one.h, two.h], two.b(two.f(s_1))), predict([one, two], x))
    with pytest.raises(ValueError, match=r"exit=3: expected 1\.\.2"):
        predict([one, two], x, exit=3)


def test_tuples_travel_and_reduce_says_what_the_bridge_reads() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear(X, D)

        def forward(self, s: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.linear(s[0]), s[1]

    x, y = batch()
    mask = torch.arange(B) < 3
    layer = ALLayer(Masked(), linear(D, K), linear(V, K), linear(K, V), reduce=lambda s: s[0] * s[1][:, None])
    s_out, _ = layer((x, mask), y)
    assert torch.equal(layer.bridge(s_out)[3:], torch.zeros(2, K, dtype=torch.float64))
    detached = stop_gradient(s_out)
    assert isinstance(detached, tuple) and not detached[0].requires_grad and detached[1].dtype == torch.bool


def test_what_leaves_a_layer_has_no_graph_and_is_contiguous() -> None:
    value = torch.randn(3, 4, requires_grad=True).t() * 2
    cut = stop_gradient(value)
    assert isinstance(cut, Tensor) and cut.is_contiguous() and not cut.requires_grad
    assert torch.equal(cut, value)


class Returns(nn.Module):
    """Returns whatever it was given at birth."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, s: Tensor) -> object:
        return self.value


@pytest.mark.parametrize("value", [[torch.zeros(1)], None, (torch.zeros(1), 3), {"s": torch.zeros(1)}, ()])
def test_a_wrong_return_type_names_layer_and_function(value: object) -> None:
    layer = ALLayer(Returns(value), linear(D, K), linear(V, K), linear(K, V), name="third")
    with pytest.raises(ALLayerError, match="AL layer third: f returned"):
        layer(*batch())


def test_an_unknown_loss_names_the_known_ones() -> None:
    with pytest.raises(ALConfigError, match=r"unknown loss 'hinge'.*cross_entropy.*mse"):
        linear_layer(associated_loss="hinge")


def test_a_loss_may_be_a_callable() -> None:
    layer, (x, y) = linear_layer(associated_loss=lambda p, t: (p - t).abs().sum()), batch()
    s_out, t_out = layer(x, y)
    expected = (layer.b(s_out) - t_out).abs().sum()
    assert torch.equal(layer.local_losses(s_out, t_out, y).associated, expected)


def test_seeds_differ_by_layer_step_and_part() -> None:
    draws = set()
    for layer in range(4):
        for step in range(4):
            for part in range(2):
                seed_layer(7, layer=layer, step=step, part=part)
                draws.add(float(torch.rand(())))
    assert len(draws) == 32
