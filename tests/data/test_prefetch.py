"""A thread that prepares micro-batches changes nothing but the time, and ends when it should."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ds_al.data import ShuffledLoader, crop_and_flip
from ds_al.data.prefetch import Prefetcher


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ds_al-prefetch"]


def wait_for(condition: object, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def loader(prefetch: int) -> ShuffledLoader:
    images = TensorDataset(torch.rand(22, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(22))
    return ShuffledLoader(images, batch_size=4, seed=3, augment=crop_and_flip, prefetch=prefetch)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_same_bits_across_epochs(depth: int) -> None:
    ahead = loader(depth)
    for (x, y), (x_expected, y_expected) in zip(islice(ahead, 23), islice(loader(0), 23), strict=True):
        assert torch.equal(x, x_expected) and torch.equal(y, y_expected)
    ahead.close()


@pytest.mark.parametrize("position", [0, 4, 6, 30])
def test_a_resume_starts_at_its_position_whatever_was_ready(position: int) -> None:
    straight = list(islice(loader(0), position + 3))
    resumed = loader(3)
    list(islice(resumed, 2))
    resumed.seek(position)
    assert resumed.position == position  # what was handed out counts, not what is ready
    for (x, y), (x_expected, y_expected) in zip(islice(resumed, 3), straight[position:], strict=True):
        assert torch.equal(x, x_expected) and torch.equal(y, y_expected)
    assert resumed.position == position + 3
    resumed.close()


def test_no_more_than_the_depth_is_made_ahead_and_in_another_thread() -> None:
    made: list[int] = []
    makers = set()

    def make(position: int) -> int:
        made.append(position)
        makers.add(threading.current_thread())
        return position

    prefetcher = Prefetcher(make, depth=3)
    assert prefetcher.get(5) == 5
    assert wait_for(lambda: made == [5, 6, 7, 8])
    time.sleep(0.05)
    assert made == [5, 6, 7, 8]
    assert threading.main_thread() not in makers
    prefetcher.close()


def test_making_overlaps_with_what_the_consumer_does() -> None:
    made = [threading.Event() for _ in range(7)]

    def make(position: int) -> int:
        made[position].set()
        return position

    prefetcher = Prefetcher(make, depth=1)
    prefetcher.get(0)
    for position in range(1, 6):
        assert made[position].wait(30)  # within a training step, before it is asked for
        assert prefetcher.get(position) == position
    prefetcher.close()


def test_an_error_reaches_the_consumer_in_its_turn_and_can_be_tried_again() -> None:
    broken = True

    def make(position: int) -> int:
        if position == 2 and broken:
            raise RuntimeError("sample 2 cannot be read")
        return position

    prefetcher = Prefetcher(make, depth=4)
    assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sample 2 cannot be read"):
            prefetcher.get(2)
    broken = False
    assert prefetcher.get(2) == 2
    prefetcher.close()


def test_a_failed_batch_does_not_count() -> None:
    def spoil(x: Tensor, generator: torch.Generator) -> Tensor:
        raise ValueError("no such image")

    images = TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8))
    failing = ShuffledLoader(images, batch_size=4, seed=0, augment=spoil, prefetch=2)
    with pytest.raises(ValueError, match="no such image"):
        next(failing)
    assert failing.position == 0


def test_the_thread_ends_with_close_and_with_the_loader() -> None:
    before = len(threads())
    closed, dropped = loader(2), loader(2)
    next(closed), next(dropped)
    assert len(threads()) == before + 2
    closed.close()
    assert len(threads()) == before + 1
    next(closed)
    closed.close()
    del dropped
    gc.collect()
    assert wait_for(lambda: len(threads()) == before)


def test_a_program_that_forgets_to_close_ends_cleanly() -> None:
    code = (
        "import torch; from torch.utils.data import TensorDataset; from ds_al.data import ShuffledLoader\n"
        "l = ShuffledLoader(TensorDataset(torch.rand(64, 9), torch.arange(64)), batch_size=4, seed=0, prefetch=3)\n"
        "next(l); print('done')"
    )
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    assert result.returncode == 0 and "done" in result.stdout
    assert "Exception" not in result.stderr and "terminate" not in result.stderr
