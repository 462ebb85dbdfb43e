"""What a network costs, against figures computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al import ALLayerSpec
from ds_al.errors import ALLayerError
from ds_al.models import build_al, build_twin
from ds_al.models.cost import Cost, model_cost, network_cost

BATCH, INPUT, WIDTH, CODE, CLASSES = 6, 7, 5, 4, 3


def linear_network() -> tuple[list[ALLayerSpec], list[LayerSpec]]:
    """Two AL layers of nothing but ``nn.Linear``, and their twin with a head."""

    def layer(width_in: int, code_in: int) -> ALLayerSpec:
        return ALLayerSpec(
            f=LayerSpec(nn.Linear, width_in, WIDTH),
            b=LayerSpec(nn.Linear, WIDTH, CODE),
            g=LayerSpec(nn.Linear, code_in, CODE),
            h=LayerSpec(nn.Linear, CODE, code_in),
        )

    twin = [(INPUT, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES)]
    return [layer(INPUT, CLASSES), layer(WIDTH, CODE)], [LayerSpec(nn.Linear, i, o) for i, o in twin]


def cost_of(name: str, x: Tensor, **options: Any) -> Any:
    al, twin = build_al(name, **options), build_twin(name, **options)
    return network_cost(al, twin, shape=x.shape, num_classes=options["num_classes"], dtype=x.dtype)


def test_linear_layers_cost_what_is_computed_by_hand():
    # A matrix product (m x k) (k x n) is 2 m k n. A linear layer has one forward, one for the gradient of its
    # weights and, where a gradient goes further back, one for that of its input.
    cost = network_cost(*linear_network(), shape=(BATCH, INPUT), num_classes=CLASSES)
    first, second = cost.layers
    for layer, width_in, code_in in ((first, INPUT, CLASSES), (second, WIDTH, CODE)):
        assert layer.f == Cost(2 * 2 * width_in * WIDTH, (width_in + 1) * WIDTH)
        assert layer.b == Cost(3 * 2 * WIDTH * CODE, (WIDTH + 1) * CODE)
        assert layer.g == Cost(2 * 2 * code_in * CODE, (code_in + 1) * CODE)
        assert layer.h == Cost(3 * 2 * CODE * code_in, (CODE + 1) * code_in)
    twin = 2 * (2 * INPUT * WIDTH + 3 * WIDTH * WIDTH + 3 * WIDTH * CLASSES)
    assert cost.twin == Cost(twin, (INPUT + 1) * WIDTH + (WIDTH + 1) * WIDTH + (WIDTH + 1) * CLASSES)
    al = sum(value for key, value in cost.flops().items() if key != "twin")
    assert cost.flops()["f"] == first.f.flops + second.f.flops
    assert cost.rho == al / twin


def test_costs_are_per_sample_and_leave_the_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    small, large = (cost_of("vgg", torch.empty(b, 1, 28, 28), in_shape=(1, 28, 28), num_classes=10) for b in (2, 32))
    assert small == large
    cost_of("lstm", torch.ones(4, 6, dtype=torch.int64), vocab_size=20, num_classes=3)  # on real samples
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_needs_values_is_counted_on_real_samples():
    ids = torch.ones(4, 6, dtype=torch.int64)
    cost = cost_of("lstm", ids, vocab_size=20, num_classes=3, embedding_width=10, width=8, num_blocks=2)
    embedding, lstm = cost.layers
    assert embedding.f.flops == 0  # a table is looked up
    # Both directions, six steps: four gates read input and state; no gradient goes into the input or the start.
    gates = 2 * 6 * 2 * 4 * 8
    assert lstm.f.flops == gates * (10 + 8) * 2 + gates * 8 * 5 // 6


def test_attention_is_counted():
    ids = torch.ones(4, 6, dtype=torch.int64)
    options = {"vocab_size": 20, "num_classes": 3, "width": 8, "num_blocks": 2, "heads": 2, "feed_forward": 16}
    encoder = cost_of("transformer", ids, **options).layers[1].f
    weights = 4 * 8 * 8 + 2 * 8 * 16
    scores = 2 * 6 * 8  # query by key, weights by value
    assert encoder.flops == 3 * 2 * 6 * (weights + scores)


def test_a_network_that_does_not_fit_its_input_is_refused_by_name():
    with pytest.raises(ALLayerError, match=r"\(2, 9\).*cannot be counted"):
        network_cost(*linear_network(), shape=(BATCH, 9), num_classes=CLASSES)


def test_the_default_vgg_saves_the_gradients_between_layers():
    # Bridges cost operations, but no gradient enters a layer's input: less than the twin, in operations.
    cost = cost_of("vgg", torch.empty(100, 1, 28, 28), in_shape=(1, 28, 28), num_classes=10)
    assert cost.rho == pytest.approx(0.898, abs=1e-3)
    assert cost.al.parameters > cost.twin.parameters


@pytest.mark.parametrize("objective", ["mse", "contrast", "decoded", "greedy"])
def test_every_objective_can_be_counted(objective: str) -> None:
    """``greedy`` once could not: its h reads the bridge's output, not a code of the target side."""
    cost = model_cost("mlp", shape=(4, 12), in_shape=(12,), num_classes=4, widths=(16, 16), objective=objective)
    flops = cost.flops()
    assert (flops["g"] == 0) == (objective == "greedy") and flops["h"] > 0
    assert cost.rho > 1  # a network this small is little beside its bridges
