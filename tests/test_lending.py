"""Functions that write on their input get copies, those that read get the tensors themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_al.compute.compile import compile_layer
from ds_al.compute.recompute import Recomputed
from ds_al.config.associated_learning import CompileConfig
from ds_al.errors import ALLayerError
from ds_al.layer import ALLayer, predict
from ds_al.lending import FIRST_CALLS, Lender
from ds_al.objectives import Decoded
from tests.support.blocks import AtTimes, Scaled


class Sees(nn.Module):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.given = nn.Linear(4, 4), []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        return self.linear(x)


def layer_of(f: nn.Module, *, plain: bool = True) -> ALLayer:
    torch.manual_seed(1)
    return ALLayer(f, *(Scaled(4, 4, plain=plain) for _ in "bgh"))


def test_a_function_that_only_reads_gets_the_tensor_itself_after_its_first_calls() -> None:
    layer, x = layer_of(Sees()), torch.randn(2, 4)
    for _ in range(FIRST_CALLS + 2):
        layer.activation(x)
    same = [given is x for given in layer.f.given]
    assert same == [False] * FIRST_CALLS + [True] * 2
    asks = [given.requires_grad for given in layer.f.given]
    assert asks == [True] + [False] * (FIRST_CALLS + 1), "only to see whether a block checkpoints itself"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_every_function_is_given_stays_as_it_is(mode: str) -> None:
    """f, b, g and h of the second form scale their input in place; losses and gradients are those of the first."""
    plain = layer_of(Scaled(4, 4, plain=True))
    writing = layer_of(Scaled(4, 4), plain=False)
    writing.load_state_dict(plain.state_dict())
    for _ in range(FIRST_CALLS + 2):
        x, t = torch.randn(2, 4), torch.randn(2, 4)
        found = []
        for layer in (plain, writing):
            given = x.clone(), t.clone()
            getattr(layer, mode)().zero_grad()
            s_out, t_out = layer(*given)
            losses = layer.local_losses(s_out, t_out, given[1])
            sum(losses).backward()
            assert torch.equal(given[0], x) and torch.equal(given[1], t)
            scores = predict([layer, layer], given[0])
            assert torch.equal(given[0], x)
            found.append([s_out, t_out, *losses, scores, *(p.grad.clone() for p in layer.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_function_that_writes_at_times_gets_copies_if_its_first_calls_show_it() -> None:
    layer, x = layer_of(AtTimes(first=3)), torch.ones(2, 4)
    for _ in range(FIRST_CALLS + 3):
        layer.activation(x)
        assert torch.equal(x, torch.ones(2, 4))


def test_a_function_that_first_writes_later_raises_or_gets_copies_by_a_key() -> None:
    x = torch.ones(2, 4)
    layer = layer_of(AtTimes(first=FIRST_CALLS + 2))
    for _ in range(FIRST_CALLS + 1):
        layer.activation(x)
    with pytest.raises(ALLayerError, match=r'f changed its input in place.*"copy_inputs"'):
        layer.activation(x)
    x, layer = torch.ones(2, 4), layer_of(AtTimes(first=FIRST_CALLS + 2))
    layer.copies_inputs = True
    for _ in range(FIRST_CALLS + 3):
        layer.activation(x)
    assert torch.equal(x, torch.ones(2, 4))


def test_tensors_that_share_memory_are_lent_as_copies_of_their_own() -> None:
    both = torch.ones(2)
    lend = Lender("f")
    kept = lend(lambda s: (s[0].add_(1), s[1].clone()), (both, both.view(2)))
    assert torch.equal(kept[1], torch.ones(2)) and torch.equal(both, torch.ones(2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_checkpoints_itself_gets_the_gradients_of_one_that_does_not(reentrant: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    own, x, t = layer_of(Own()), torch.randn(2, 4), torch.randn(2, 4)
    plain = copy.deepcopy(own)
    plain.f = plain.f.block
    for _ in range(FIRST_CALLS + 2):
        for layer in (own, plain):
            layer.zero_grad()
            sum(layer.local_losses(*layer(x, t), t)).backward()
        pairs = zip(own.f.parameters(), plain.f.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
        assert x.grad is None and not x.requires_grad


def recomputed(layer: ALLayer) -> None:
    layer.recomputed = Recomputed(layer.f, interval=1)


def compiled(layer: ALLayer) -> None:
    compile_layer(layer, CompileConfig(functions=["f", "b"], backend="aot_eager"), index=0)


@pytest.mark.parametrize("how", [recomputed, compiled])
def test_blocks_in_place_are_recomputed_and_compiled_as_those_out_of_place(how: Callable[[ALLayer], None]) -> None:
    def sequence(*, plain: bool) -> ALLayer:
        return layer_of(
            nn.Sequential(Scaled(4, 4, plain=plain), nn.Linear(4, 4), Scaled(4, 4, plain=plain)), plain=plain
        )

    plain, writing = sequence(plain=True), sequence(plain=False)
    writing.load_state_dict(plain.state_dict())
    how(plain)
    how(writing)
    for _ in range(FIRST_CALLS + 2):
        x, t = torch.randn(2, 4), torch.randn(2, 4)
        before = x.clone()
        for layer in (plain, writing):
            layer.zero_grad()
            sum(layer.local_losses(*layer(x, t), t)).backward()
        assert torch.equal(x, before)
        pairs = zip(plain.parameters(), writing.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_each_layer_has_an_objective_of_its_own() -> None:
    """One instance for two layers would decode both with the copies of the second."""
    objective = Decoded(refresh_every=3)
    layers = [ALLayer(*(nn.Identity() for _ in "fbgh"), objective=objective) for _ in range(2)]
    layers[1].objective.earlier = [nn.Identity()]
    assert layers[0].objective.earlier == [] and layers[0].objective.refresh_every == 3
