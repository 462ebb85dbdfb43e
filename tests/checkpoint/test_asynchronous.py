"""Saving while training goes on: what is saved is the state at the call, and the last good checkpoint stays."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ds_al
from ds_al.checkpoint import writer
from ds_al.launch.ranks import RankFailure, run_ranks
from tests.checkpoint.test_checkpoint import refused
from tests.support.engines import MICRO_BATCHES, different, engine_state, make_engine, merge
from tests.support.networks import NETWORKS

pytestmark = pytest.mark.distributed


def batches(start: int, count: int) -> Any:
    """An iterator over the micro-batches of some batches of the same stream."""
    return iter(NETWORKS["mlp"].batches((start + count) * MICRO_BATCHES)[start * MICRO_BATCHES :])


def wait_for(path: Path) -> None:
    """Waits until a file is there."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def saves(folder: str) -> dict[str, Any]:
    """Worker: trains on while a save is held up; then one that fails; then several, of which the last two are kept."""
    root = Path(folder)
    engine = make_engine("mlp", checkpoint={"asynchronous": True, "keep_last": 2})
    result: dict[str, Any] = {}
    write, go, failing = writer.write_tensors, threading.Event(), threading.Event()

    def held_up(path: Path, tensors: Any) -> Any:
        assert go.wait(60)
        if failing.is_set() and engine.stage_id == 1:
            raise OSError("no space left on device")
        return write(path, tensors)

    writer.write_tensors = held_up
    engine.train_batch(batches(0, 1))
    result["at save"] = engine_state(engine)
    engine.save_checkpoint(folder, tag="one")
    engine.train_batch(batches(1, 1))  # ends although no stage has written a single file
    result["meanwhile"] = (root / "latest").exists() or (root / "one").exists()
    trained = engine_state(engine)
    go.set()
    engine.flush()
    engine.load_checkpoint(folder)
    result["loaded"], result["changed"] = engine_state(engine), bool(different(trained, result["at save"]))

    failing.set()
    engine.save_checkpoint(folder, tag="two")
    engine.train_batch(batches(1, 1))
    result["failed"] = refused(lambda: engine.save_checkpoint(folder, tag="three"))
    result["after failure"] = (root / "latest").read_text()
    failing.clear()
    for tag in ("four", "five", "six"):
        engine.save_checkpoint(folder, tag=tag)
    engine.flush()
    engine.gather(None)
    result["kept"] = sorted(path.name for path in root.iterdir())
    engine.gather(None)
    failing.set()
    engine.save_checkpoint(folder, tag="seven")
    result["at destroy"] = refused(engine.destroy)
    return result


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    ranks = run_ranks(f"{__name__}:saves", 2, folder=str(tmp_path))
    assert different(merge([r["at save"] for r in ranks]), merge([r["loaded"] for r in ranks])) == []
    for rank in ranks:
        assert not rank["meanwhile"] and rank["changed"]
        for when, tag in (("failed", "two"), ("at destroy", "seven")):
            assert f"{tag}', saved while training went on, failed" in rank[when], rank[when]
            assert "stage 1" in rank[when] or "no space left on device" in rank[when]
        assert rank["after failure"] == "one"
        assert rank["kept"] == ["five", "latest", "six"]  # neither what failed nor what lies beyond the two


def killed(folder: str) -> None:
    """Worker: a good checkpoint, then one during which every rank is ended by kill -9, half-way through its files."""
    engine = make_engine("mlp")
    engine.train_batch(batches(0, 1))
    engine.save_checkpoint(folder, tag="good")
    engine.train_batch(batches(1, 1))
    write = writer.write_tensors

    def fatal(path: Path, tensors: Any) -> Any:
        record = write(path, tensors)
        if path.name.startswith("layer_02-associated"):
            os.truncate(path, 100)
            (path.parent / ".tmpAb12cD").touch()  # as another stage leaves it, whose kill finds safetensors at work
            (Path(folder) / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    writer.write_tensors = fatal
    engine.save_checkpoint(folder, tag="good", asynchronous=True)  # would take the place of the good one
    wait_for(Path(folder) / "half")
    os.kill(os.getpid(), signal.SIGKILL)


def goes_on(folder: str) -> dict[str, Any]:
    """Worker: goes on from the last good checkpoint, and saves again."""
    engine = make_engine("mlp")
    engine.load_checkpoint(folder)
    done = engine.global_steps
    engine.train_batch(batches(done, 1))
    engine.save_checkpoint(folder, tag="good")
    left = sorted(path.name for path in Path(folder).iterdir())
    whole = make_engine("mlp")
    for batch in range(2):
        whole.train_batch(batches(batch, 1))
    return {"done": done, "left": left, "different": different(engine_state(engine), engine_state(whole))}


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(f"{__name__}:killed", 2, folder=str(tmp_path))
    assert failure.value.codes == [-signal.SIGKILL] * 2
    assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
    (rank,) = run_ranks(f"{__name__}:goes_on", 1, folder=str(tmp_path))
    assert rank == {"done": 1, "left": ["good", "half", "latest"], "different": []}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """A checkpoint of the same tag was moved aside, and the new one not yet put in its place."""
    from ds_al.checkpoint import folder, own

    aside = tmp_path / ".last.0123-4.old"
    aside.mkdir()
    (aside / own.INDEX).touch()
    (tmp_path / "latest").write_text("last")
    assert folder.find(tmp_path) == aside
    (tmp_path / "last").mkdir()
    with pytest.raises(ds_al.ALCheckpointError, match=r"expected a file index\.json"):
        folder.find(tmp_path)
