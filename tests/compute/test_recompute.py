"""Recomputed blocks leave the bits of plain ones, and keep less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_al.compute.recompute import Recomputed
from ds_al.layer import ALLayer
from ds_al.trace import ActivationMeter


class Block(nn.Module):
    """Everything that makes a second run differ if it is careless: dropout, a batch norm, a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, s: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = s
        self.calls += 1
        return self.dropout(self.norm(self.linear(x)).relu()) * self.calls * mask[:, None], mask


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.arange(6) < 5


def trained(f: nn.Module, run: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients, buffers, and the next random number after two forward and backward passes."""
    torch.manual_seed(3)
    for _ in range(2):
        run(pair())[0].square().sum().backward()
    return [p.grad for p in f.parameters()], list(f.buffers()), torch.rand(1)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_gradients_and_buffers_are_those_of_the_plain_pass(interval: int) -> None:
    plain = nn.Sequential(*(Block(4) for _ in range(3)))
    recomputed = copy.deepcopy(plain)
    expected = trained(plain, plain)
    runs: list[int] = []
    recomputed[1].linear.register_forward_hook(lambda *_: runs.append(1))
    got = trained(recomputed, Recomputed(recomputed, interval=interval))
    assert len(runs) == 4  # two passes, each run twice
    for mine, theirs in zip((*got[0], *got[1], got[2]), (*expected[0], *expected[1], expected[2]), strict=True):
        assert torch.equal(mine, theirs)


def test_a_chain_is_cut_by_its_blocks_and_a_chain_of_its_own_kind_is_one_block() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    chain = [nn.Linear(2, 2) for _ in range(5)]
    assert [len(list(s.parameters())) for s in Recomputed(nn.Sequential(*chain), interval=2).segments] == [4, 4, 2]
    own = Own(*chain)
    assert Recomputed(own, interval=2).segments == [own]


def test_blocks_that_learn_nothing_and_evaluation_run_once() -> None:
    runs: list[int] = []
    f = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU())
    for module in f:
        module.register_forward_hook(lambda module, *_: runs.append(type(module).__name__))
    run = Recomputed(f, interval=1)
    with torch.no_grad():
        run(torch.ones(2, 4))
    assert runs == ["Flatten", "Linear", "ReLU"]
    run(torch.ones(2, 4)).sum().backward()
    assert runs[3:] == ["Flatten", "Linear", "ReLU", "ReLU", "Linear"]


def test_only_what_enters_a_block_is_kept_until_it_is_run_again() -> None:
    """Four blocks of two maps and two ReLUs each: plain, 16 activations are kept; recomputed, the 4 that enter blocks,
    and in backward beside those the last block's own."""
    width, rows = 8, 3
    size = width * rows * 4  # bytes
    blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for _ in range(4)]
    f = nn.Sequential(*blocks)
    x = torch.randn(rows, width)
    held = {}
    for name, run in {"plain": f, "recomputed": Recomputed(f, interval=1)}.items():
        with ActivationMeter(exclude=f.parameters()) as meter:
            out = run(x)
            after_forward = meter.current_bytes
            out.sum().backward()
        held[name] = after_forward, meter.peak_bytes
        assert meter.current_bytes == 0 or name == "recomputed"
    assert held["plain"] == (9 * size, 9 * size)  # x and one output per ReLU
    assert held["recomputed"][0] == 4 * size
    assert 4 * size < held["recomputed"][1] <= 6 * size


def test_a_layer_recomputes_in_training_alone() -> None:
    layer = ALLayer(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    runs: list[int] = []
    layer.f.register_forward_hook(lambda *_: runs.append(1))
    layer.recomputed = Recomputed(layer.f, interval=1)
    s, t = layer(torch.ones(3, 4), torch.ones(3, 2))
    torch.autograd.backward(list(layer.local_losses(s, t, torch.ones(3, 2))))
    assert len(runs) == 2
    layer.eval()
    s, t = layer(torch.ones(3, 4), torch.ones(3, 2))
    torch.autograd.backward(list(layer.local_losses(s, t, torch.ones(3, 2))))
    assert len(runs) == 3
