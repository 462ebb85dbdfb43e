"""Micro-batches of samples alike in length: complete, mixed, and a function of seed and epoch."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import TensorDataset

from ds_al.data import ShuffledLoader
from ds_al.data.order import bucketed
from ds_al.errors import ALDataError

LENGTHS = torch.randint(1, 200, (1003,), generator=torch.Generator().manual_seed(0))


def test_every_sample_has_one_place_and_micro_batches_are_alike_in_length() -> None:
    order = bucketed(LENGTHS, batch_size=8, seed=0, epoch=0)
    assert torch.equal(order.sort().values, torch.arange(1003))
    padding = (LENGTHS[order[:1000].view(-1, 8)].amax(dim=1) * 8).sum() / LENGTHS.sum()
    shuffled = torch.randperm(1003, generator=torch.Generator().manual_seed(0))[:1000].view(-1, 8)
    assert padding < 1.15 < (LENGTHS[shuffled].amax(dim=1) * 8).sum() / LENGTHS.sum()


def test_short_micro_batches_do_not_come_first() -> None:
    batches = LENGTHS[bucketed(LENGTHS, batch_size=8, seed=0, epoch=0)[:1000].view(-1, 8)].float().mean(dim=1)
    assert abs(batches[:60].mean() - batches[60:].mean()) < 30
    assert 40 < (batches.diff() < 0).sum() < 84  # of 124 steps about half go down


def test_order_changes_with_seed_and_epoch_alone_and_so_do_the_samples_left_over() -> None:
    def order(**keys: int) -> torch.Tensor:
        return bucketed(LENGTHS, batch_size=8, **{"seed": 0, "epoch": 0, **keys})

    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert torch.equal(first, order())
    for other in (order(seed=1), order(epoch=1)):
        assert not torch.equal(first, other)
        assert set(first[-3:].tolist()) != set(other[-3:].tolist())


def test_fewer_samples_than_a_micro_batch_are_all_left_over() -> None:
    assert bucketed(LENGTHS[:5], batch_size=8, seed=0, epoch=0).sort().values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("position", [0, 124, 125, 300])
def test_a_bucketed_loader_resumes_exactly(position: int) -> None:
    def loader() -> ShuffledLoader:
        return ShuffledLoader(
            TensorDataset(torch.arange(1003), torch.arange(1003)), batch_size=8, seed=2, lengths=LENGTHS
        )

    straight = [y.tolist() for _, y in islice(loader(), position + 4)]
    resumed = loader()
    resumed.seek(position)
    assert [y.tolist() for _, y in islice(resumed, 4)] == straight[position:]
    assert len({n for batch in straight[:125] for n in batch}) == 8 * len(straight[:125])


def test_lengths_must_be_those_of_the_samples() -> None:
    data = TensorDataset(torch.arange(9), torch.arange(9))
    with pytest.raises(ALDataError, match=r"8 lengths of 9 samples"):
        ShuffledLoader(data, batch_size=2, seed=0, lengths=torch.ones(8))
    with pytest.raises(ALDataError, match="prefetch=-1"):
        ShuffledLoader(data, batch_size=2, seed=0, prefetch=-1)
