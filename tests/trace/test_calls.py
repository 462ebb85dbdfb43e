"""Ranks that leave the common order of calls are found at once, and the job ends with a diagnosis."""

from __future__ import annotations

import pytest

from ds_al.launch.ranks import RankFailure, run_ranks
from ds_al.trace.calls import Position, out_of_order
from tests.support.engines import MICRO_BATCHES, make_engine
from tests.support.networks import NETWORKS


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ([(3, 0, 0, ""), (1, 0, 0, "")], ""),  # a stage may be batches behind
        ([(3, 1, 3, "evaluate"), (2, 0, 0, "")], ""),
        ([(3, 1, 3, "evaluate"), (3, 0, 0, "")], ""),
        ([(5, 1, 3, "evaluate"), (3, 1, 3, "evaluate")], ""),
        ([(5, 2, 5, "save_checkpoint"), (4, 1, 3, "evaluate")], ""),
        ([(3, 1, 3, "evaluate"), (4, 0, 0, "")], "called evaluate() after 3 batches, and rank 1 has begun batch 4"),
        ([(4, 0, 0, ""), (0, 1, 0, "predict")], "called predict() after 0 batches, and rank 0 has begun batch 4"),
        (
            [(3, 1, 3, "evaluate"), (3, 1, 3, "predict")],
            "called evaluate() after 3 batches, and rank 1 called predict()",
        ),
        ([(3, 1, 2, "evaluate"), (3, 1, 3, "evaluate")], "rank 1 called evaluate() after 3"),
    ],
)
def test_a_rank_is_out_of_order_where_it_cannot_come_to_the_call_any_more(
    positions: list[tuple[int, int, int, str]], says: str
) -> None:
    found = out_of_order({rank: Position(*position) for rank, position in enumerate(positions)})
    assert (says in found) if says else found == ""


def calls_alone(*, name: str, folder: str) -> None:
    """Worker: rank 0 alone makes a call that needs all ranks, with the watchdog as it is by default."""
    engine = make_engine()
    batches = NETWORKS["mlp"].batches(4 * MICRO_BATCHES)
    data = iter(batches)
    engine.train_batch(data)
    if engine.global_rank == 0:
        match name:
            case "evaluate":
                engine.evaluate(batches)
            case "save_checkpoint":
                engine.save_checkpoint(folder)
    engine.train_batch(data)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["evaluate", "save_checkpoint"])
def test_a_call_on_one_rank_alone_ends_the_job(name: str, tmp_path: object) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:calls_alone", 2, name=name, folder=str(tmp_path), timeout=60)
    assert caught.value.codes == [1, 1]
    for text in caught.value.outputs:
        assert f"--- stall: rank 0 called {name}() after 1 batches, and rank 1 has begun batch 2 without it" in text
        assert "Python stack" in text
