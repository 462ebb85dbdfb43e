"""What has no recovery is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from ds_al.config import recovery
from ds_al.config.settings import Settings
from ds_al.errors import ALConfigError
from tests.support.engines import engine_config, make_engine
from tests.support.ranks import RankFailure, run_ranks

FITS: dict[str, Any] = {"replicas": 1, "measured": False, "device": "cpu"}


def check(*, facts: dict[str, Any] | None = None, keys: dict[str, Any] | None = None, **al: Any) -> None:
    config = engine_config(keys=keys, recovery={"every": 8}, **al)
    recovery.check(Settings.of(config, is_al=True), **{**FITS, **(facts or {})})


def test_what_fits_is_accepted() -> None:
    check()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "forward_first"}, "method"),
        ({"trace": {"enabled": True}}, "trace"),
        ({"checkpoint": {"asynchronous": True}}, "asynchronous"),
        ({"repartition": {}}, "repartition"),
        ({"keys": {"csv_monitor": {"enabled": True}}}, "csv_monitor"),
        ({"facts": {"replicas": 2}}, "2 data parallel replicas"),
        ({"facts": {"measured": True}}, "measured"),
        ({"facts": {"device": "cuda"}}, "cuda"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ALConfigError, match=rf'{named}.*recovery": .*, or remove "recovery"'):
        check(**options)


def test_saves_are_after_whole_batches() -> None:
    config = engine_config(recovery={"every": 6})
    with pytest.raises(ALConfigError, match=r"recovery.every\": 6 .* expected a multiple of 4"):
        recovery.check(Settings.of(config, is_al=True), **FITS)


def test_an_interval_has_to_be_given() -> None:
    with pytest.raises(ALConfigError, match=r"recovery.every\" is missing"):
        Settings.of(engine_config(recovery={}), is_al=True)


def replicated(stages: int) -> None:
    """Worker: asks for recovery with fewer stages than ranks."""
    make_engine("mlp", module_options={"num_stages": stages}, recovery={"every": 4})


@pytest.mark.distributed
def test_replicas_are_refused_on_every_rank_before_there_is_a_keeper() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:replicated", 2, stages=1)
    for output in caught.value.outputs:
        assert '2 data parallel replicas with "associated_learning.recovery"' in output, output
        assert 'expected 1, with as many stages (num_stages) as ranks, or remove "recovery"' in output, output
