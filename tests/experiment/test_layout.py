"""Which process has which stage of a run, of which copy of the pipeline."""

from __future__ import annotations

import pytest

from ds_al.errors import ALConfigError
from ds_al.experiment.layout import Layout


def layouts(method: str, num_stages: int | None, world: int) -> list[Layout]:
    return [Layout.of(method=method, num_stages=num_stages, world=world, rank=rank) for rank in range(world)]


def test_processes_are_in_deepspeeds_order() -> None:
    found = layouts("streaming", 2, 4)
    assert [(each.stage, each.copy) for each in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {each.recorder for each in found} == {2}, "the last stage of the first copy"
    assert [(each.stage, each.copy) for each in layouts("bp_1f1b", None, 2)] == [(0, 0), (1, 0)]


def test_replicas_share_the_micro_batches_of_a_batch() -> None:
    (first, second) = layouts("bp_dp", None, 2)
    assert (first.stages, first.copies, first.recorder) == (1, 2, 0) and (second.stage, second.copy) == (0, 1)
    assert first.micro_batches_of_a_copy(4, method="bp_dp") == 2
    assert layouts("streaming", 1, 2)[0].micro_batches_of_a_copy(4, method="streaming") == 4
    with pytest.raises(ALConfigError, match="got 3 for 2 replicas of bp_dp"):
        first.micro_batches_of_a_copy(3, method="bp_dp")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ALConfigError, match="got 2 for 3 processes"):
        layouts("streaming", 2, 3)
    with pytest.raises(ALConfigError, match="got 2 for bp_dp, where every process is a replica"):
        layouts("bp_dp", 2, 4)
