"""A stalled job says where on every rank, with real ranks; a slow one says nothing."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
from deepspeed.pipe import PipelineModule
from torch import nn

import ds_al
from ds_al.launch.ranks import RankFailure, run_ranks
from tests.support.engines import MICRO_BATCHES, engine_config, make_engine
from tests.support.networks import NETWORKS

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
BATCHES = 3
BLOCKED_AT = 6  # micro-batch, in the second batch


def blocking_iterator(seconds: float, every: float = 0.0) -> Iterator[Any]:
    """Micro-batches of the small network; one of them takes long, and each a little."""
    for number, batch in enumerate(NETWORKS["mlp"].batches(BATCHES * MICRO_BATCHES)):
        time.sleep(seconds if number == BLOCKED_AT else every)
        yield batch


def twin_engine(**al: Any) -> Any:
    """DeepSpeed's own engine on plain layers, one for each of two stages."""
    deepspeed.init_distributed()
    module = PipelineModule([nn.Linear(12, 12), nn.Linear(12, 4)], num_stages=2, loss_fn=nn.CrossEntropyLoss())
    return ds_al.initialize(model=module, config={**engine_config(method="bp_1f1b", **al), "gradient_clipping": 0.0})[0]


def train(
    *, seconds: float, every: float = 0.0, twin: bool = False, pause: float = 0.0, last_layer: float = 0.0, **al: Any
) -> tuple[str, int]:
    """Worker: what this rank printed to stderr while it trained, and the micro-batches that it executed."""
    engine = twin_engine(**al) if twin else make_engine(**al)
    if last_layer and engine.is_last_stage():
        engine.layers[-1][1].f.register_forward_hook(lambda *_: time.sleep(last_layer))
    text = io.StringIO()
    end = al.get("on_stall") == "end"
    with contextlib.nullcontext() if end else contextlib.redirect_stderr(text):
        # The twin's last stage reads labels, from an iterator that does not block.
        batches = blocking_iterator(seconds if engine.is_first_stage() else every, every)
        for _ in range(BATCHES):
            engine.train_batch(batches)
            time.sleep(pause)  # user code
        if not twin:
            engine.flush()
    executed = engine.runner.progress.executed["BackwardPass"]
    engine.destroy()
    assert not any("stall" in thread.name for thread in threading.enumerate())
    return text.getvalue(), executed


def blocks(text: str) -> list[str]:
    return text.split("--- stall: ")[1:]


def test_every_rank_says_where_it_stands_and_training_goes_on() -> None:
    ranks = run_ranks(f"{__name__}:train", 2, seconds=2.6, stall_seconds=1.0, on_stall="continue")
    assert [executed for _, executed in ranks] == [BATCHES * MICRO_BATCHES] * 2
    first, second = (blocks(text) for text, _ in ranks)
    assert len(first) == len(second) == 1  # the next would come 2 s after the first
    assert "stage 0, rank 0: LoadMicroBatch, micro-batch 6, waits for the data iterator, for " in first[0]
    assert "in blocking_iterator" in first[0] and "time.sleep(seconds" in first[0]
    assert (
        "RecvActivation, micro-batch 6, waits for the activations of micro-batch 6 from stage 0 (rank 0)" in second[0]
    )
    assert "stage 1, rank 1: " in second[0] and "in receive" in second[0]
    assert all('"on_stall": "continue"' in block for block in (*first, *second))


def test_a_stall_ends_the_job_where_so_configured() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:train", 2, seconds=120.0, stall_seconds=1.0, on_stall="end")
    assert caught.value.seconds < 60
    assert caught.value.codes == [1, 1]
    for rank, text in enumerate(caught.value.outputs):
        assert len(blocks(text)) == 1, text
        assert f"stage {rank}, rank {rank}: " in text and 'ends ("on_stall": "end")' in text
        assert "Traceback" not in text.split("--- stall: ")[0]


def test_with_data_parallel_copies_each_says_which_it_is_and_which_rank_it_waits_for() -> None:
    ranks = run_ranks(f"{__name__}:train_copies", 4, seconds=4.0)
    told = [blocks(text) for text in ranks]
    assert [len(each) for each in told] == [1] * 4
    # Ranks 0 and 1 hold stage 0, ranks 2 and 3 stage 1; the data of replica 1 block.
    assert "replica 1, stage 0, rank 1: LoadMicroBatch, micro-batch 6, waits for the data iterator" in told[1][0]
    assert "replica 0, stage 0, rank 0: ReduceGrads" in told[0][0]
    assert "waits for the ranks that hold the same weights: 1, for " in told[0][0]
    assert "replica 1, stage 1, rank 3: RecvActivation" in told[3][0] and "from stage 0 (rank 1)" in told[3][0]
    assert "replica 0, stage 1, rank 2: ReduceGrads" in told[2][0] and "the same weights: 3, for " in told[2][0]


def train_copies(*, seconds: float) -> str:
    """Worker: two stages, twice; the first stage of the second replica waits long for a micro-batch."""
    engine = make_engine(module_options={"num_stages": 2}, stall_seconds=2.0, on_stall="continue")
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        batches = blocking_iterator(seconds if engine.replicas.index == 1 else 0.0)
        for _ in range(BATCHES):
            engine.train_batch(batches)
        engine.flush()
    engine.destroy()
    return text.getvalue()


def test_slow_is_not_stalled() -> None:
    # The last stage waits for more than a second in all, outside of instructions passes more than a second, too.
    ranks = run_ranks(f"{__name__}:train", 2, seconds=0.3, every=0.3, pause=1.5, stall_seconds=1.0)
    assert [blocks(text) for text, _ in ranks] == [[], []]


def test_a_stage_that_waits_long_is_not_stalled_while_another_moves() -> None:
    # The first stage is soon at the barrier, and waits there for four micro-batches of the last.
    ranks = run_ranks(
        f"{__name__}:train", 2, seconds=0.0, last_layer=0.5, method="forward_first", queue_depth=4, stall_seconds=1.0
    )
    assert [blocks(text) for text, _ in ranks] == [[], []]


def test_the_backprop_twin_says_it_too() -> None:
    ranks = run_ranks(f"{__name__}:train", 2, seconds=2.6, twin=True, stall_seconds=1.0, on_stall="continue")
    first, second = (blocks(text) for text, _ in ranks)
    assert len(first) == len(second) == 1
    assert "stage 0, rank 0: LoadMicroBatch, micro-batch 6" in first[0] and "in blocking_iterator" in first[0]
    assert "stage 1, rank 1: SendGrad, micro-batch 5" in second[0] and "taken by stage 0 (rank 0)" in second[0]


def evaluate_slowly() -> str:
    """Worker: an evaluation that takes longer than ``stall_seconds``, of which no batch does."""
    engine = make_engine(stall_seconds=0.5)
    text = io.StringIO()

    class Slow(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                time.sleep(0.2)
                yield batch

    with contextlib.redirect_stderr(text):
        batches = iter(NETWORKS["mlp"].batches(MICRO_BATCHES))
        engine.train_batch(batches)
        engine.evaluate(Slow(NETWORKS["mlp"].batches(8)))
    engine.watchdog.stop()
    return text.getvalue()


def test_evaluation_is_no_stall() -> None:
    assert [blocks(text) for text in run_ranks(f"{__name__}:evaluate_slowly", 2)] == [[], []]


def ends_at_once() -> None:
    """Worker: the interpreter ends while the watch runs, and nobody has stopped it."""
    make_engine(stall_seconds=0.01)
    time.sleep(0.3)
    sys.exit(7)


def test_the_watch_neither_holds_a_process_up_nor_disturbs_its_end() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(f"{__name__}:ends_at_once", 2)
    assert caught.value.codes == [7, 7] and caught.value.seconds < 60
    assert not any("Traceback" in text or "terminate called" in text for text in caught.value.outputs)


def without_a_watch() -> list[str]:
    """Worker: the names of this rank's threads."""
    engine = make_engine(stall_seconds=None)
    assert engine.watchdog is None
    return [thread.name for thread in threading.enumerate()]


def test_off_means_no_thread() -> None:
    assert not any("stall" in name for names in run_ranks(f"{__name__}:without_a_watch", 2) for name in names)
