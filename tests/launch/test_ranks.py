"""Ranks that fail: the cause comes first."""

from __future__ import annotations

import os
import time

import pytest

from ds_al.errors import ALTransportError
from ds_al.launch.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.distributed


def loses_or_fails(rank_that_fails: int) -> None:
    """Worker: one rank fails, and takes its time to end; the others have lost it, and end at once."""
    if int(os.environ["RANK"]) != rank_that_fails:
        raise ALTransportError("train_batch() lost another rank: the cause")
    time.sleep(0.5)
    raise ArithmeticError("the cause")


def test_a_rank_that_failed_is_shown_before_those_that_lost_it() -> None:
    """On a busy machine the rank that had failed sometimes ended last, and its output came last."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:loses_or_fails", 3, rank_that_fails=1, timeout=60)
    first = str(caught.value).split("--- rank ")[1]
    assert first.startswith("1,") and "ArithmeticError: the cause" in first
