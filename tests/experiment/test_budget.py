"""When a run ends: by epochs, by batches, by time."""

from __future__ import annotations

from ds_al.experiment.budget import Budget


def test_epochs_alone() -> None:
    budget = Budget(10, 3)
    assert (budget.total_batches, budget.epochs, [budget.batches(epoch) for epoch in range(3)]) == (30, 3, [10, 10, 10])
    assert [budget.ends(epoch, seconds=1e9) for epoch in range(3)] == [False, False, True]


def test_a_number_of_batches_cuts_the_last_epoch_short() -> None:
    budget = Budget(10, 3, max_batches=14)
    assert (budget.total_batches, budget.epochs, [budget.batches(epoch) for epoch in range(2)]) == (14, 2, [10, 4])
    assert budget.ends(1, seconds=0.0)
    assert Budget(10, 3, max_batches=1000).total_batches == 30


def test_the_epoch_in_which_the_time_is_over_is_the_last() -> None:
    budget = Budget(10, 3, max_seconds=5.0)
    assert [budget.ends(0, seconds=4.9), budget.ends(0, seconds=5.0), budget.ends(2, seconds=0.0)] == [
        False, True, True,
    ]  # fmt: skip
