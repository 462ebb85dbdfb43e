"""Which process holds which stage of a run, of which replica of the pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from ds_al.config.associated_learning import ALConfig
from ds_al.errors import ALConfigError
from ds_al.experiment.forms import Form, form_of
from ds_al.experiment.layout import Layout


def form(method: Any) -> Form:
    return form_of(ALConfig(method=method))


def layouts(method: str, num_stages: int | None, world: int) -> list[Layout]:
    return [form(method).layout(num_stages=num_stages, world=world, rank=rank) for rank in range(world)]


def test_processes_are_in_deepspeeds_order() -> None:
    found = layouts("streaming", 2, 4)
    assert [(each.stage, each.replica) for each in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {each.writer for each in found} == {2}, "the last stage of the first replica"
    assert [(each.stage, each.replica) for each in layouts("bp_1f1b", None, 2)] == [(0, 0), (1, 0)]


def test_replicas_share_the_micro_batches_of_a_batch() -> None:
    (first, second) = layouts("bp_dp", None, 2)
    assert (first.stages, first.replicas, first.writer) == (1, 2, 0) and (second.stage, second.replica) == (0, 1)
    assert form("bp_dp").micro_batches(4, replicas=2) == 2
    assert form("streaming").micro_batches(4, replicas=2) == 4
    with pytest.raises(ALConfigError, match="got 3 for 2 replicas of bp_dp"):
        form("bp_dp").micro_batches(3, replicas=2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ALConfigError, match="got 2 for 3 processes"):
        layouts("streaming", 2, 3)
    with pytest.raises(ALConfigError, match="got 2 for bp_dp, where every process is a replica"):
        layouts("bp_dp", 2, 4)


def test_the_last_stage_reads_data_where_it_needs_labels() -> None:
    assert [form("streaming").reads_data(each) for each in layouts("streaming", None, 3)] == [True, False, False]
    assert [form("bp_gpipe").reads_data(each) for each in layouts("bp_gpipe", None, 3)] == [True, False, True]
    assert all(form("bp_dp").reads_data(each) for each in layouts("bp_dp", None, 3))
