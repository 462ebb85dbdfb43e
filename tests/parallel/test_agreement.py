"""Whatever is wrong on one rank is raised on all of them, with rank and host, before the first batch."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

import ds_al
from ds_al.errors import ALConfigError, ALDataError
from ds_al.launch.ranks import RankFailure, run_ranks
from ds_al.parallel.agreement import agreed, flat
from ds_al.parallel.facts import differences
from tests.support.engines import SEED, engine_config
from tests.support.networks import NETWORKS

pytestmark = pytest.mark.distributed


def failing(error: Exception) -> Any:
    raise error


def told(step: Any, **options: Any) -> str:
    """What ``agreed`` raises on this rank, and its type."""
    try:
        agreed("the test", step, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "agreed"


def initialized(rank: int, **differing: Any) -> str:
    """What ``initialize`` raises where rank 1 has other values: ``(of rank 0, of rank 1)``."""
    own = {name: values[rank] for name, values in differing.items()}
    seed = own.pop("base_seed", SEED)
    config = engine_config(micro_batches=own.pop("micro_batches", 4), keys=own.pop("keys", {}), **own)
    config["train_micro_batch_size_per_gpu"] = 8
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=seed)
    try:
        ds_al.initialize(model=module, config=config if config != {} else None)
    except ALConfigError as error:
        return str(error)
    return "initialized"


def disagree() -> dict[str, str]:
    """Worker: what this rank is told of each disagreement."""
    from ds_al.parallel.world import join_world

    join_world()
    rank = int(os.environ["RANK"])
    return {
        "error on rank 1": told(lambda: failing(ALDataError("no such folder")) if rank else 1),
        "bare error on rank 0": told(lambda: 1 if rank else failing(ImportError("no module named x"))),
        "same error": told(lambda: failing(ALDataError("the same"))),
        "another fact": told(lambda: 7, facts=lambda value: {"seven": value + rank, "eight": 8}),
        "no part": told(lambda: 7, facts=lambda value: {} if rank else {"seven": value}),
        "base_seed": initialized(rank, base_seed=(0, 1)),
        "gradient accumulation": initialized(rank, micro_batches=(4, 2)),
        "method": initialized(rank, method=("streaming", "sequential")),
        "a key of one rank": initialized(rank, keys=({}, {"seed_layers_typo": 1})),
        "optimizer": initialized(rank, params=({"lr": 1e-3, "torch_adam": True}, {"lr": 2e-3, "torch_adam": True})),
        "only printed": initialized(rank, keys=({"steps_per_print": 10**9}, {})),
    }


@pytest.fixture(scope="module")
def disagreements() -> list[dict[str, str]]:
    return run_ranks(f"{__name__}:disagree", 2)


def test_all_ranks_raise_the_same(disagreements: list[dict[str, str]]) -> None:
    assert disagreements[0] == disagreements[1]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("error on rank 1", r"ALDisagreement: the test, rank 1 (HOST): no such folder"),
        ("bare error on rank 0", r"ALDisagreement: the test, rank 0 (HOST): ImportError: no module named x"),
        ("same error", "ALDataError: the same"),
        (
            "another fact",
            "ALDisagreement: the test is not the same on all ranks: seven is 7 on rank 0 (HOST), 8 on rank 1 (HOST)",
        ),
        ("no part", "agreed"),
        ("base_seed", "base_seed is 0 on rank 0 (HOST), 1 on rank 1 (HOST)"),
        ("gradient accumulation", "gradient_accumulation_steps is 4 on rank 0 (HOST), 2 on rank 1 (HOST)"),
        ("method", 'associated_learning.method is "streaming" on rank 0 (HOST), "sequential" on rank 1 (HOST)'),
        ("a key of one rank", "initialize, rank 1 (HOST): "),
        ("optimizer", "optimizer.params.lr is 0.001 on rank 0 (HOST), 0.002 on rank 1 (HOST)"),
        ("only printed", "initialized"),
    ],
)
def test_a_disagreement_names_what_differs_and_where(
    case: str, expected: str, disagreements: list[dict[str, str]]
) -> None:
    import socket

    assert expected.replace("HOST", socket.gethostname()) in disagreements[0][case]


def test_a_rank_without_facts_takes_no_part_in_the_comparison() -> None:
    ranks: list[tuple[str, dict[str, str]]] = [("0 (a)", {"n": "1"}), ("1 (b)", {}), ("2 (b)", {"n": "2"})]
    assert differences(ranks[:2]) == []
    assert differences(ranks) == ["n is 1 on rank 0 (a), 2 on rank 2 (b)"]


def test_a_config_is_compared_by_its_paths() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def comes_late(*, rank_that_stays_away: int, joins: bool) -> None:
    """Worker: one rank does not come, to the group or to what the ranks agree on."""
    from ds_al.parallel.world import join_world

    away = int(os.environ["RANK"]) == rank_that_stays_away
    if joins or not away:
        join_world()
    if away:
        time.sleep(8)
        os._exit(7)
    agreed("the test", lambda: 1)


@pytest.mark.parametrize("joins", [False, True])
def test_a_rank_that_stays_away_is_named_in_time(joins: bool) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(
            f"{__name__}:comes_late",
            3,
            rank_that_stays_away=1,
            joins=joins,
            env={"DS_AL_START_SECONDS": "3"},
            timeout=25,
        )
    assert caught.value.codes == [1, 7, 1]
    for rank in (0, 2):
        assert "rank 1" in caught.value.outputs[rank] and "has not come within 3 s" in caught.value.outputs[rank]
        assert "rank 0 (" in caught.value.outputs[rank] and "rank 2 (" in caught.value.outputs[rank]


def reaches_the_store_late() -> int:
    """Worker: rank 1 reaches the store at its third try alone, as on a machine that is busy."""
    from ds_al.parallel import store
    from ds_al.parallel.world import join_world

    join_world()
    left = [2 if os.environ["RANK"] == "1" else 0]
    opened = store._opened

    def late(*args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("timed out")
        return opened(*args, **options)

    store._opened = late
    agreed("the test", lambda: 1, facts=lambda value: {"value": value})
    return left[0]


def test_a_rank_that_reaches_the_store_late_agrees_with_the_others() -> None:
    """It once took another way than they did, and all of them waited until the time was over."""
    assert run_ranks(f"{__name__}:reaches_the_store_late", 2, timeout=60) == [0, 0]


def fails_while_it_joins(seconds: float) -> None:
    """Worker: rank 1 fails where the others wait for it in DeepSpeed's start.

    Args:
        seconds: between two looks of rank 2 at what other ranks tell.
    """
    import deepspeed

    from ds_al.parallel import presence
    from ds_al.parallel.world import join_world

    def broken(**options: Any) -> None:
        raise RuntimeError("no backend")

    if os.environ["RANK"] == "1":
        deepspeed.init_distributed = broken
    if os.environ["RANK"] == "2":
        presence._LOOK = seconds
    join_world()


@pytest.mark.parametrize("seconds", [0.25, 30.0])
def test_a_rank_that_fails_while_the_ranks_join_ends_the_others(seconds: float) -> None:
    """They once waited for as long as the time-out of the process group.

    Later, one that lost the store before it looked said so, and not what had happened.
    """
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:fails_while_it_joins", 3, timeout=60, seconds=seconds)
    assert caught.value.codes == [1, 1, 1]
    for rank in (0, 2):
        assert "rank 1 (" in caught.value.outputs[rank] and "RuntimeError: no backend" in caught.value.outputs[rank]
