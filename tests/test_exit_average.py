"""The mean of several exits names the class that most of their probability is on."""

from __future__ import annotations

import pytest
import torch

from ds_al.errors import ALConfigError
from ds_al.exits import averaged_accuracy, check_average


def test_each_number_of_exits_is_averaged_from_the_last_one_on() -> None:
    first = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    last = torch.tensor([[0.3, 0.7], [0.45, 0.55]])
    # Alone the last exit is wrong on the first sample; the first one is so sure there that the mean is right.
    assert averaged_accuracy(torch.stack([first, last]), torch.tensor([0, 1])) == [0.5, 1.0]


@pytest.mark.parametrize("average", [0, 3])
def test_exits_that_are_not_there_are_refused(average: int) -> None:
    with pytest.raises(ALConfigError, match=f"average={average}: expected 1..2"):
        check_average(average, exit=2)
