"""Numbers that are not finite, checkpoints and other files, and W&B: what may be there, and what happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.layer import ALLayer
from ds_al.optim.local import LocalOptimizer
from ds_al.stage import LocalStage
from tests.support.networks import NETWORKS
from tests.support.robustness import Case, Kind, by_name, meet

KINDS = [
    Kind(
        section="Numbers",
        name="a loss, output, gradient or weight that is NaN or infinite",
        outcome="refused",
        what="An `ALLayerError` names stage, AL layer, micro-batch, function and weight: on a CPU in that step, before "
        "the output leaves and before the step is applied; on a GPU at most 8 micro-batches later.",
        tests=(
            "tests/robustness/test_files.py::test_numbers_that_are_not_finite",
            "tests/test_stage.py::test_the_host_waits_for_the_numbers_of_eight_micro_batches_before",
        ),
    ),
    Kind(
        section="Numbers",
        name="infinite entries of a mask that travels beside the activations",
        outcome="honoured",
        what="They pass; NaN does not.",
        tests=("tests/robustness/test_files.py::test_a_mask_may_hold_infinite_numbers",),
    ),
]

# ---- numbers ---------------------------------------------------------------------------------------

PLANTED_AT = 2
"""The micro-batch at which a number is planted."""


def planted(place: str, layer: int, value: str) -> Case:
    """A number planted in a weight, a gradient, an output or a loss of one function."""
    what, _, function = place.partition(".")
    named = {
        "weight": rf"weight {function}\.(0\.)?weight holds {value}",
        "gradient": rf"the gradient of {function}\.(0\.)?weight holds {value}",
        "output": f"the output of {function} holds {value}",
        "loss": f"the {'associated' if function == 'b' else 'autoencoder'} loss is {value}",
    }
    message = rf"stage 3, AL layer Block, micro-batch {PLANTED_AT}, function {function}: {named[what]}"
    return Case(
        name=f"{value} in {place} of layer {layer}", given=(what, function, layer, float(value)), message=message
    )


NUMBERS = [
    *(planted(f"weight.{f}", layer, value) for f in "fbgh" for layer in (0, 2) for value in ("nan", "inf", "-inf")),
    *(planted(f"gradient.{f}", layer, value) for f in "fbgh" for layer in (0, 2) for value in ("nan", "inf")),
    *(planted(f"output.{f}", layer, value) for f in "fg" for layer in (0, 2) for value in ("nan", "inf", "-inf")),
    *(planted(f"loss.{f}", layer, value) for f in "bh" for layer in (0, 2) for value in ("nan", "inf")),
]


@by_name(NUMBERS)
def test_numbers_that_are_not_finite(case: Case) -> None:
    what, function, index, value = case.given
    layers = NETWORKS["mlp"].build(7)[:3]
    stage = LocalStage(list(enumerate(layers)), stage_id=3, base_seed=7, device=torch.device("cpu"))
    optimizer = LocalOptimizer(list(enumerate(layers)), associated=sgd, autoencoder=sgd)
    batches = iter(NETWORKS["mlp"].batches(PLANTED_AT + 1))
    for _ in range(PLANTED_AT):
        step(stage, optimizer, *next(batches))
    plant(layers[index], what, function, value)
    before = {name: weight.clone() for layer in layers for name, weight in named(layer)}
    meet(case, lambda: step(stage, optimizer, *next(batches)))
    assert all(torch.equal(weight, before[name]) for layer in layers for name, weight in named(layer) if finite(weight))


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05)


def step(stage: LocalStage, optimizer: LocalOptimizer, x: Tensor, labels: Tensor) -> None:
    """One micro-batch, as the engine executes it."""
    stage.forward(x, nn.functional.one_hot(labels, 4).float())
    stage.backward(scale=1.0)
    optimizer.step()
    optimizer.zero_grad()


def plant(layer: ALLayer, what: str, function: str, value: float) -> None:
    module = getattr(layer, function)
    weight = next(module.parameters())
    if what == "weight":
        weight.data.view(-1)[3] = value
    elif what == "gradient":
        weight.register_hook(lambda gradient: first_becomes(gradient, value))
    elif what == "output":
        module.register_forward_hook(lambda module, inputs, output: first_becomes(output, value))
    else:
        loss = "associated_loss" if function == "b" else "autoencoder_loss"
        setattr(layer, loss, lambda one, two: (one - two).square().mean() * 0 + value)


def first_becomes(tensor: Tensor, value: float) -> Tensor:
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    mask.view(-1)[0] = True
    return tensor.masked_fill(mask, value)


def named(layer: ALLayer) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"{id(layer)}.{name}", weight) for name, weight in layer.named_parameters())


def finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight).all())


class WithMask(nn.Module):
    """Passes an additive mask along, as blocks of a decoder do."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.linear, self.number = nn.Linear(12, 16), number

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), torch.full((len(x), 3), self.number)


@by_name(
    [
        Case(name="a mask of -inf", given=float("-inf"), message=None),
        Case(name="a mask of NaN", given=float("nan"), message="function f: another part of the output holds nan"),
    ]
)
def test_a_mask_may_hold_infinite_numbers(case: Case) -> None:
    layer = ALLayer(f=WithMask(case.given), b=nn.Linear(16, 6), g=nn.Linear(4, 6), h=nn.Linear(6, 4))
    stage = LocalStage([(0, layer)], stage_id=0, base_seed=7, device=torch.device("cpu"))
    ((x, labels),) = NETWORKS["mlp"].batches(1)
    meet(case, lambda: stage.forward(x, nn.functional.one_hot(labels, 4).float()))
