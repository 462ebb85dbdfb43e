"""Augmentation of a whole micro-batch does to each image what a loop over images would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ds_al.data import colour_jitter, crop_and_flip, published


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(batch: int = 32, channels: int = 3, size: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(256, (batch, channels, size, size), dtype=torch.uint8, generator=seeded(seed))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("border", "mode"), [("edge", "replicate"), ("zero", "constant")])
def test_crop_and_flip_equals_a_loop_over_images(dtype: torch.dtype, border: str, mode: str) -> None:
    x, pad = pixels().to(dtype), 3
    moved = crop_and_flip(x, seeded(7), pad=pad, border=border)
    draw = seeded(7)
    top, left = torch.randint(2 * pad + 1, (2, len(x), 1), generator=draw)
    mirrored = torch.rand(len(x), 1, generator=draw) < 0.5
    assert moved.dtype == dtype and mirrored.any() and not mirrored.all()
    for i, image in enumerate(x):
        padded = F.pad(image[None].float(), (pad,) * 4, mode=mode)[0]
        cropped = padded[:, top[i] : top[i] + 9, left[i] : left[i] + 9]
        expected = cropped.flip(2) if mirrored[i] else cropped
        assert torch.equal(moved[i].float(), expected), i


def test_images_need_not_be_square() -> None:
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    assert torch.equal(crop_and_flip(x, seeded(), pad=0, flip=False), x)
    assert crop_and_flip(x, seeded(), pad=2).shape == x.shape


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_equals_a_loop_over_images(channels: int) -> None:
    x = pixels(channels=channels)
    jittered = colour_jitter(x, seeded(3), brightness=0.5, contrast=0.3, saturation=0.9)
    factors = torch.rand(len(x), 3, generator=seeded(3)) * 2 - 1

    def grey(image: Tensor) -> Tensor:
        if len(image) == 1:
            return image
        return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)

    for i, image in enumerate(x.float()):
        brightness, contrast, saturation = (1 + v * f for v, f in zip((0.5, 0.3, 0.9), factors[i], strict=True))
        image = (image * brightness).clamp(0, 255)
        image = (contrast * image + (1 - contrast) * grey(image).mean()).clamp(0, 255)
        image = (saturation * image + (1 - saturation) * grey(image)).clamp(0, 255)
        torch.testing.assert_close(jittered[i], image, atol=1e-3, rtol=1e-5)


def test_factors_fill_their_range_and_do_not_leave_it() -> None:
    x = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)  # grey all over: brightness alone shows
    shown = colour_jitter(x, seeded(), brightness=0.4)[:, 0, 0, 0] / 100
    assert 0.6 <= shown.min() < 0.61 and 1.39 < shown.max() <= 1.4
    assert abs(shown.mean() - 1) < 0.02


def test_pixels_stay_pixels_and_zero_strength_changes_nothing() -> None:
    x = pixels()
    jittered = colour_jitter(x, seeded(), brightness=1.0, contrast=1.0, saturation=1.0)
    assert jittered.dtype == torch.float32 and jittered.min() >= 0 and jittered.max() <= 255
    still = colour_jitter(x, seeded(), brightness=0, contrast=0, saturation=0)
    torch.testing.assert_close(still, x.float(), atol=1e-3, rtol=0)
    assert x.equal(pixels())  # the original is not written to


def test_published_is_crop_flip_and_jitter_of_one_generator() -> None:
    x, draw = pixels(), seeded(5)
    expected = colour_jitter(crop_and_flip(x, draw, pad=4, border="zero"), draw)
    assert torch.equal(published(x, seeded(5)), expected)
    assert not torch.equal(published(x, seeded(6)), expected)
