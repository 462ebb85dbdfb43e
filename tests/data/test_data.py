"""The order of data depends on data set, batch size and seed alone; the parts of a data set are disjoint."""

from __future__ import annotations

import json
from importlib import resources
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from ds_al.data import ShuffledLoader, crop_and_flip, load_vision, ordered_batches
from ds_al.errors import ALDataError


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count))


class Samples(Dataset):
    """The same samples as :func:`numbers`, one by one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index


class BatchedSamples(Samples):
    """Hands out many samples per call, as Hugging Face data sets do, and refuses single ones."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise AssertionError("asked for a single sample")

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [(torch.tensor([float(index)]), index) for index in indices]


def order(loader: ShuffledLoader, count: int) -> list[list[int]]:
    return [y.tolist() for _, y in islice(loader, count)]


def test_order_depends_on_the_seed_and_not_on_global_random_state():
    orders = []
    for state in (0, 1):
        torch.manual_seed(state)
        orders.append(order(ShuffledLoader(numbers(20), batch_size=4, seed=7), 15))
        torch.rand(3)
    assert orders[0] == orders[1]
    assert orders[0] != order(ShuffledLoader(numbers(20), batch_size=4, seed=8), 15)


def test_loader_leaves_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    images = TensorDataset(torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8))
    order(ShuffledLoader(images, batch_size=4, seed=0, augment=crop_and_flip), 5)
    assert torch.equal(torch.rand(3), expected)


def test_an_epoch_holds_each_sample_at_most_once_and_epochs_differ():
    loader = ShuffledLoader(numbers(22), batch_size=4, seed=0)
    assert loader.batches_per_epoch == 5
    first, second = ([y for batch in order(loader, 5) for y in batch] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert loader.epoch == 2


@pytest.mark.parametrize("position", [0, 3, 4, 5, 9, 17])
def test_seek_resumes_exactly_across_epoch_borders_and_with_augmentation(position: int):
    images = TensorDataset(torch.rand(22, 1, 6, 6), torch.arange(22))

    def loader() -> ShuffledLoader:
        return ShuffledLoader(images, batch_size=4, seed=3, augment=crop_and_flip)

    straight = list(islice(loader(), position + 7))
    resumed = loader()
    resumed.seek(position)
    assert resumed.position == position
    for (x, y), (x_expected, y_expected) in zip(islice(resumed, 7), straight[position:], strict=True):
        assert torch.equal(y, y_expected)
        assert torch.equal(x, x_expected)
    assert resumed.position == position + 7


def test_a_sample_is_augmented_anew_in_each_epoch():
    images = TensorDataset(torch.rand(1, 1, 6, 6).expand(4, -1, -1, -1), torch.arange(4))
    loader = ShuffledLoader(images, batch_size=4, seed=0, augment=crop_and_flip)
    batches = {tuple(x.flatten().tolist()) for x, _ in islice(loader, 6)}
    assert len(batches) == 6


@pytest.mark.parametrize("dataset", [Samples(11), BatchedSamples(11)])
def test_every_kind_of_data_set_gives_the_same_batches(dataset: Dataset):
    fast = ShuffledLoader(numbers(11), batch_size=3, seed=0)
    general = ShuffledLoader(dataset, batch_size=3, seed=0)
    for (x, y), (x_expected, y_expected) in zip(islice(general, 7), islice(fast, 7), strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


def test_collate_fn_makes_the_batch():
    loader = ShuffledLoader(Samples(6), batch_size=2, seed=0, collate_fn=lambda samples: ("x", len(samples)))
    assert next(loader) == ("x", 2)
    batches = ordered_batches(numbers(3), batch_size=2, collate_fn=lambda samples: ("x", len(samples)))
    assert list(batches) == [("x", 2), ("x", 1)]


def test_ordered_batches_are_complete_in_order_and_can_be_iterated_again():
    batches = ordered_batches(numbers(10), batch_size=4)
    assert len(batches) == 3
    for _ in range(2):
        assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_impossible_loaders_are_refused_with_a_remedy():
    with pytest.raises(ALDataError, match=r"3 samples: expected at least one micro-batch of 4; .*lower"):
        ShuffledLoader(numbers(3), batch_size=4, seed=0)
    with pytest.raises(ALDataError, match="empty data set"):
        ShuffledLoader(numbers(0), batch_size=4, seed=0)
    with pytest.raises(ALDataError, match="empty data set"):
        ordered_batches(numbers(0), batch_size=4)
    with pytest.raises(ALDataError, match="batch_size=0: expected 1 or more"):
        ordered_batches(numbers(3), batch_size=0)
    with pytest.raises(ALDataError, match="position -1"):
        ShuffledLoader(numbers(4), batch_size=4, seed=0).seek(-1)


def test_crop_and_flip_moves_images_whole():
    x = torch.zeros(64, 2, 9, 9)
    x[:, 0, 4, 3], x[:, 1, 4, 4] = 1.0, 2.0
    moved = crop_and_flip(x, torch.Generator().manual_seed(0), pad=2)
    assert moved.shape == x.shape
    assert torch.equal(moved.sum(dim=(2, 3)), x.sum(dim=(2, 3)))  # the marks never leave the image
    sides = set()
    for image in moved:
        (row_0, column_0), (row_1, column_1) = image[0].nonzero()[0].tolist(), image[1].nonzero()[0].tolist()
        assert row_0 == row_1 and 2 <= row_0 <= 6  # channels move together
        sides.add(column_1 - column_0)
    assert sides == {1, -1}  # some are mirrored, some are not
    assert torch.equal(crop_and_flip(x, torch.Generator(), pad=0, flip=False), x)


def test_validation_is_cut_from_train_and_test_is_left_alone():
    splits = load_vision("fashion-mnist-small", validation_fraction=0.1, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9000, 1000, 2000)
    assert splits.shape == (1, 28, 28)
    assert len(splits.classes) == 10
    x, y = splits.train.make_batch(torch.arange(9000))
    assert x.shape[1:] == splits.shape and x.dtype == torch.float32 and y.dtype == torch.int64
    torch.testing.assert_close(x.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(), torch.tensor(1.0), atol=1e-4, rtol=0)

    with np.load(resources.files("ds_al.data") / "fashion-mnist-small.npz") as arrays:
        x_train, x_test, y_test = (torch.from_numpy(arrays[key]) for key in ("x_train", "x_test", "y_test"))
        names = arrays["class_names"].tolist()
    assert splits.classes == names
    assert json.loads((resources.files("ds_al.data") / "fashion-mnist-small.classes.json").read_text()) == names
    low, scale = x.min(), (x.max() - x.min()) / 255
    x_seen, y_seen = splits.test.make_batch(torch.arange(2000))
    assert torch.equal(y_seen, y_test)
    assert torch.equal(((x_seen - low) / scale).round().to(torch.uint8)[:, 0], x_test)
    parts = torch.cat([x, splits.validation.make_batch(torch.arange(1000))[0]])
    pixels = ((parts - low) / scale).round().to(torch.uint8)[:, 0]
    assert torch.equal(_sorted_rows(pixels), _sorted_rows(x_train))  # each training image in one part, once


def test_the_seed_decides_what_is_held_out():
    parts = [load_vision("fashion-mnist-small", validation_fraction=0.1, seed=s).validation for s in (0, 0, 1)]
    labels = [part.labels for part in parts]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_an_unknown_data_set_or_fraction_is_named():
    with pytest.raises(ALDataError, match=r"'mnist': expected one of \['fashion-mnist-small'"):
        load_vision("mnist", validation_fraction=0.1, seed=0)
    with pytest.raises(ALDataError, match=r"validation_fraction=1\.5"):
        load_vision("fashion-mnist-small", validation_fraction=1.5, seed=0)


def _sorted_rows(images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.sort(images.flatten(1).numpy().view([("", np.uint8)] * 784), axis=0).view(np.uint8))
