"""A PipelineModule's layer list becomes AL layers: the same blocks and weights, the classifier at its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime import utils as ds_utils
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.convert.layers import layer_specs
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer, predict
from ds_al.models import build_twin
from ds_al.tensors import stop_gradient
from tests.support.learning import accuracies, learn

V, SEED = 5, 7


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def cnn() -> list[Any]:
    return [
        LayerSpec(nn.Conv2d, 1, 4, 3, padding=1),
        LayerSpec(nn.BatchNorm2d, 4),
        torch.relu,
        LayerSpec(nn.MaxPool2d, 2),
        LayerSpec(nn.Conv2d, 4, 6, 3, padding=1),
        nn.ReLU(),
        LayerSpec(nn.Conv2d, 6, 8, 3, stride=2, padding=1),
        F.relu,
        LayerSpec(nn.AdaptiveAvgPool2d, 1),
        flat,
        LayerSpec(nn.Linear, 8, V),
    ]


def mlp() -> list[Any]:
    layers: list[Any] = [lambda x: x.flatten(1)]
    for a, b in ((12, 16), (16, 16), (16, 16)):
        layers += [LayerSpec(nn.Linear, a, b), nn.Tanh()]
    return [*layers, nn.Sequential(nn.LayerNorm(16), nn.Dropout(0.1), nn.Linear(16, V))]


def text() -> list[Any]:
    return build_twin("transformer", vocab_size=30, num_classes=V, width=8, heads=2, num_blocks=4, feed_forward=12)


def ids() -> Tensor:
    ids = torch.randint(1, 30, (3, 6))
    ids[1, 3:] = 0
    return ids


LISTS: dict[str, tuple[Any, Any]] = {
    "cnn": (cnn, lambda: torch.randn(3, 1, 8, 8)),
    "mlp": (mlp, lambda: torch.randn(3, 3, 4)),
    "text": (text, ids),
}
OBJECTIVES = ["mse", "contrast", "decoded", "greedy"]


def built(specs: list[Any], seed: int = SEED) -> list[ALLayer]:
    layers = []
    for index, spec in enumerate(specs):
        ds_utils.set_random_seed(seed + index)
        layers.append(spec.build().eval())
    return layers


def plain(layers: list[Any], x: Any) -> Tensor:
    """What PipelineModule(layers, seed_layers=True, base_seed=SEED) makes of x."""
    for index, layer in enumerate(layers):
        ds_utils.set_random_seed(SEED + index)
        module = layer.build().eval() if isinstance(layer, LayerSpec) else layer
        x = module.eval()(x) if isinstance(module, nn.Module) else module(x)
    return x


@pytest.mark.parametrize("name", list(LISTS))
@pytest.mark.parametrize("num_al_layers", [1, 2, 3])
def test_greedy_starts_as_the_very_network(name: str, num_al_layers: int) -> None:
    make, inputs = LISTS[name]
    torch.manual_seed(0)
    layers, x = make(), inputs()
    specs = layer_specs(
        layers, num_classes=V, example=x, num_al_layers=num_al_layers, objective="greedy", base_seed=SEED
    )
    assert len(specs) == num_al_layers
    with torch.no_grad():
        assert torch.equal(predict(built(specs), x), plain(layers, x))


@pytest.mark.parametrize("name", list(LISTS))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_layer_learns(name: str, objective: str) -> None:
    make, inputs = LISTS[name]
    x = inputs()
    specs = layer_specs(make(), num_classes=V, example=x, num_al_layers=3, objective=objective, code_width=6)
    layers = built(specs)
    labels = torch.tensor([0, 3, 1])
    s: Any = x
    t: Any = layers[0].objective.first_target(labels, F.one_hot(labels, V).float())
    for index, layer in enumerate(layers):
        layer.objective.earlier = [earlier.h for earlier in layers[:index]]
        s_out, t_out = layer.train()(s, t)
        losses = layer.local_losses(s_out, t_out, t)
        torch.autograd.backward([loss for loss in losses if loss.requires_grad])
        assert all(p.grad is not None for p in layer.associated_parameters()), index
        s, t = stop_gradient(s_out), stop_gradient(t_out)
    layers = [layer.eval() for layer in layers]
    assert all(predict(layers, x, exit=e, num_classes=V).shape == (3, V) for e in (1, 2, 3))


def test_modules_are_taken_over_and_stay_whole() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, V)))
    x = torch.randn(2, 4)
    before = net(x)
    specs = layer_specs(list(net), num_classes=V, example=x, num_al_layers=2, objective="greedy")
    layers = built(specs)
    assert layers[0].f[0] is net[0] and layers[1].h is net[4][0]
    assert torch.equal(predict(layers, x), before) and torch.equal(net(x), before)
    mse = built(layer_specs(list(net), num_classes=V, example=x, num_al_layers=2, objective="mse"))
    assert predict(mse, x).shape == (2, V) and torch.equal(net(x), before)


def test_groups_are_balanced_by_parameters_or_given() -> None:
    layers: list[Any] = [
        nn.Linear(4, 100),
        nn.ReLU(),
        nn.Linear(100, 4),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
        nn.Linear(4, V),
    ]
    x = torch.randn(2, 4)
    auto = built(layer_specs(layers, num_classes=V, example=x, num_al_layers=2))
    assert [len(layer.f) for layer in auto] == [2, 3]
    given = built(layer_specs(layers, num_classes=V, example=x, groups=[3, 1, 1]))
    assert isinstance(given[2].f, nn.Linear) and len(given) == 3


def embed(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def project(module: nn.Module, x: Tensor) -> Tensor:
    return x @ module.weight.t()


def tied_list() -> list[Any]:
    return [
        TiedLayerSpec("table", nn.Embedding, 9, 4, forward_fn=embed),
        TiedLayerSpec("table", nn.Embedding, 9, 4, forward_fn=project),
        LayerSpec(nn.Linear, 9, 6),
        lambda x: x.mean(dim=1),
        LayerSpec(nn.Linear, 6, V),
    ]


def test_tied_layers_work_inside_one_al_layer() -> None:
    x = torch.randint(9, (2, 3))
    specs = layer_specs(tied_list(), num_classes=V, example=x, groups=[2, 1])
    f = built(specs)[0].f
    assert len(list(f.parameters())) == 1 and f(x).shape == (2, 3, 9)
    table = next(f.parameters())
    assert torch.equal(f(x), table[x] @ table.t())


def test_tied_layers_across_al_layers_are_refused_with_a_remedy() -> None:
    x = torch.randint(9, (2, 3))
    with pytest.raises(ALConfigError, match=r"layers 0 and 1 are tied by the key 'table'.*groups=\[\.\.\.\]"):
        layer_specs(tied_list(), num_classes=V, example=x, groups=[1, 2])


class NeedsValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) == float("inf") else 2 * x


def test_a_layer_that_needs_values_is_run_on_the_example() -> None:
    layers = [nn.Linear(4, 4), NeedsValues(), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, V)]
    state = torch.get_rng_state()
    specs = layer_specs(layers, num_classes=V, example=torch.ones(2, 4), num_al_layers=2)
    assert torch.equal(torch.get_rng_state(), state) and layers[2].training
    assert len(specs) == 2


def test_the_classifier_may_be_named() -> None:
    layers = [nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, V)]
    x = torch.randn(2, 4)
    named = built(layer_specs(layers, num_classes=V, example=x, num_al_layers=2, head=2, objective="greedy"))
    assert torch.equal(predict(named, x), nn.Sequential(*layers)(x))
    none = built(layer_specs(layers[:3], num_classes=V, example=x, num_al_layers=3, head=0))
    assert predict(none, x).shape == (2, V)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, "empty layer list"),
        ([nn.Linear(4, 4), nn.Linear(4, 3)], {}, "ends with nn.Linear"),
        ([nn.Linear(4, 4), nn.Linear(4, V)], {"num_al_layers": 2}, "expected 1..1"),
        ([nn.Linear(4, 4), nn.Linear(4, V)], {"groups": [2]}, "1 in all"),
        ([nn.Linear(4, 4), nn.Linear(4, V)], {"head": 2}, "expected 0..1"),
        ([nn.Linear(3, 4), nn.Linear(4, V)], {"num_al_layers": 1}, "layer 0 .Linear. fails on the example"),
        ([nn.Linear(4, 4), nn.Linear(4, V)], {"num_al_layers": 1, "bridges": []}, "0 bridges for 1"),
    ],
)
def test_what_does_not_fit_is_refused(layers: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ALConfigError, match=message):
        layer_specs(layers, num_classes=V, example=torch.randn(2, 4), **options)


def test_the_former_name_of_the_function_builds_the_same_network() -> None:
    """Scripts of users call ``ds_al.ALPipelineModule.from_layers``, as the first README did."""
    import ds_al

    layers = [nn.Linear(8, 6), nn.Linear(6, V)]
    network = ds_al.ALPipelineModule.from_layers(layers, num_classes=V, num_al_layers=1, example=torch.randn(2, 8))
    assert isinstance(network, ds_al.ALPipelineModule)


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_the_default_objective_learns_at_usual_rates(rate: float) -> None:
    """Two clusters per class, of which 25 % is chance. By ``mse`` the last exit reaches half at the smaller rate."""
    torch.manual_seed(0)
    cluster = torch.randint(8, (600,))
    x, labels = (3 * torch.randn(8, 6))[cluster] + torch.randn(600, 6), cluster % 4
    net = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    layers = built(layer_specs(net, num_classes=4, example=x[:2], num_al_layers=3))
    batches = list(zip(x[:400].split(20), labels[:400].split(20), strict=True))
    learn(layers, 4 * batches, classes=4, rate=rate)
    assert min(accuracies(layers, x[400:], labels[400:], classes=4)) > 0.9
