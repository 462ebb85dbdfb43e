"""Images of parquet files: decoded once, the same pixels, normalised by the training part."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ds_al.data import AUGMENTATIONS, Images, ShuffledLoader, decode, load_data
from ds_al.data.images import statistics
from ds_al.errors import ALDataError
from tests.support.parquet_files import config, png, random_images, shared, write, write_images


def parts(folder: Path, **keys: object) -> tuple[Images, Images, Images]:
    splits = load_data(config(folder, **keys), seed=0)
    assert isinstance(splits.train, Images) and isinstance(splits.validation, Images)
    assert isinstance(splits.test, Images)
    return splits.train, splits.validation, splits.test


def test_pixels_come_through_and_each_training_image_is_in_one_part(tmp_path: Path) -> None:
    train, validation, test = parts(write_images(tmp_path), validation_fraction=0.25)
    assert (len(train), len(validation), len(test)) == (30, 10, 10)
    written = torch.from_numpy(random_images(40)).permute(0, 3, 1, 2)
    seen = {tuple(image.flatten().tolist()) for part in (train, validation) for image in part.pixels}
    assert seen == {tuple(image.flatten().tolist()) for image in written}
    assert torch.equal(test.pixels, torch.from_numpy(random_images(10, seed=1)).permute(0, 3, 1, 2))
    assert test.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1] and test.labels.dtype == torch.int64


def test_a_label_stays_with_its_image(tmp_path: Path) -> None:
    train, validation, _ = parts(write_images(tmp_path))
    numbers = {image.tobytes(): row % 4 for row, image in enumerate(random_images(40))}
    for part in (train, validation):
        for image, label in zip(part.pixels, part.labels, strict=True):
            assert numbers[image.permute(1, 2, 0).numpy().tobytes()] == label


def test_x_is_normalised_by_the_training_part(tmp_path: Path) -> None:
    train, validation, test = parts(write_images(tmp_path))
    x, _ = train.make_batch(torch.arange(len(train)))
    std, mean = torch.std_mean(x, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(3), atol=1e-5, rtol=0)
    expected_std, expected_mean = torch.std_mean(train.pixels.float(), dim=(0, 2, 3), keepdim=True)
    for part in (validation, test):
        x, _ = part.make_batch(torch.arange(len(part)))
        torch.testing.assert_close(x, (part.pixels.float() - expected_mean) / expected_std)
        torch.testing.assert_close(part[3][0], x[3])


def test_a_channel_without_contrast_is_no_division_by_zero() -> None:
    pixels = torch.full((5, 1, 2, 2), 7, dtype=torch.uint8)
    mean, std = statistics(pixels)
    assert mean.item() == 7 and std.item() == 1


def test_augmentation_sees_pixels_before_they_are_normalised(tmp_path: Path) -> None:
    train, _, _ = parts(write_images(tmp_path))
    seen = []

    def look(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(x)
        return x

    next(ShuffledLoader(train, batch_size=4, seed=0, augment=look))
    assert seen[0].dtype == torch.uint8


@pytest.mark.parametrize("augment", sorted(AUGMENTATIONS))
def test_every_augmentation_can_be_prefetched_and_resumed(tmp_path: Path, augment: str) -> None:
    train, _, _ = parts(write_images(tmp_path))

    def loader(prefetch: int) -> ShuffledLoader:
        return ShuffledLoader(train, batch_size=5, seed=1, augment=AUGMENTATIONS[augment], prefetch=prefetch)

    straight, resumed = list(islice(loader(0), 12)), loader(3)
    resumed.seek(9)
    for (x, y), (x_expected, y_expected) in zip(islice(resumed, 3), straight[9:], strict=True):
        assert torch.equal(x, x_expected) and torch.equal(y, y_expected)
    resumed.close()


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, _ = parts(write_images(tmp_path))

    def fail(*args: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(decode, "_decode", fail)
    again, _, _ = parts(tmp_path)
    assert torch.equal(first.pixels, again.pixels)
    with pytest.raises(AssertionError, match="decoded again"):
        parts(tmp_path, image_size=4)  # another size is other pixels


def test_images_are_scaled_to_the_size_asked_for(tmp_path: Path) -> None:
    *_, test = parts(write_images(tmp_path), image_size=4)
    assert test.pixels.shape == (10, 3, 4, 4)
    expected = Image.fromarray(random_images(10, seed=1)[6]).resize((4, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(test.pixels[6].permute(1, 2, 0), np.asarray(expected))


def test_images_of_different_sizes_ask_for_one(tmp_path: Path) -> None:
    images = [png(random_images(1, size=size)[0]) for size in (8, 8, 6)]
    for part in ("train", "test"):
        write(tmp_path, part, image=images, label=[0, 1, 0])
    with pytest.raises(
        ALDataError, match=r"row 2 of train.* has 6 x 6 pixels, the first one 8 x 8: set experiment\.data\.image"
    ):
        parts(tmp_path)
    assert parts(tmp_path, image_size=8)[2].pixels.shape == (3, 3, 8, 8)


def test_grey_images_have_one_channel_unless_some_are_in_colour(tmp_path: Path) -> None:
    colour = random_images(2)
    grey = colour[..., 0]
    for part in ("train", "test"):
        write(tmp_path, part, image=[png(grey[0]), png(grey[1])], label=[0, 1])
    train, _, test = parts(tmp_path)
    assert train.pixels.shape[1:] == test.pixels.shape[1:] == (1, 8, 8)
    assert torch.equal(test.pixels[1, 0], torch.from_numpy(grey[1]))
    write(tmp_path, "test", image=[png(grey[1]), png(colour[0]), png(grey[0])], label=[0, 1, 0])
    train, _, test = parts(tmp_path)
    assert train.pixels.shape[1:] == test.pixels.shape[1:] == (3, 8, 8)
    assert torch.equal(test.pixels[0], torch.from_numpy(grey[1]).expand(3, -1, -1))
    assert torch.equal(test.pixels[1], torch.from_numpy(colour[0]).permute(2, 0, 1))
    assert torch.equal(test.pixels[2], torch.from_numpy(grey[0]).expand(3, -1, -1))


def test_what_is_no_image_is_named_with_its_row(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, image=[png(random_images(1)[0]), b"no image"], label=[0, 1])
    with pytest.raises(ALDataError, match=r"column 'image' holds no image in row 1 .*image_column"):
        parts(tmp_path)


def test_images_as_datasets_stores_them(tmp_path: Path) -> None:
    written = random_images(4)
    entries = [{"bytes": png(image), "path": None} for image in written]
    for part in ("train", "test"):
        write(tmp_path, part, img=entries, fine_label=[0, 1, 2, 3])
    _, _, test = parts(tmp_path, name="cifar100")
    assert torch.equal(test.pixels, torch.from_numpy(written).permute(0, 3, 1, 2))
    assert test.labels.tolist() == [0, 1, 2, 3]


def test_cifar10_by_its_name(tmp_path: Path) -> None:
    folder = shared("cifar10-small")
    splits = load_data(config(folder, name="cifar10", cache=str(tmp_path)), seed=0)
    assert splits.shape == (3, 32, 32) and splits.classes[:2] == ["airplane", "automobile"]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9000, 1000, 2000)
