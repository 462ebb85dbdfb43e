"""A run goes on in its own folder: which one, from which checkpoint, and which rows it keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ds_al.checkpoint import folder as checkpoints
from ds_al.errors import ALCheckpointError
from ds_al.experiment.resuming import AUTO, Origin
from ds_al.experiment.run_folder import RunFolder, epochs_of
from tests.support.runs import run_info


def saved(root: Path, monkeypatch: pytest.MonkeyPatch, latest: str | None, **trained: int) -> None:
    """A folder of checkpoints that have trained so many micro-batches; of a negative number the index is cut."""
    for tag, count in trained.items():
        (root / tag).mkdir(parents=True)
        (root / tag / "index.json").write_text(str(count))
    if latest is not None:
        (root / "latest").write_text(latest)

    def read(folder: Path) -> dict[str, Any]:
        if (count := int((folder / "index.json").read_text())) < 0:
            raise ALCheckpointError("cut")
        return {"counters": {"trained_micro_batches": count}}

    monkeypatch.setattr(checkpoints, "read_index", read)


def test_the_newest_checkpoint_is_the_one_that_has_trained_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed between the renaming of a folder and the writing of ``latest`` leaves the one before."""
    assert checkpoints.newest(tmp_path / "none") is None
    saved(tmp_path, monkeypatch, "one", one=4, two=8, three=-1, **{".hidden": 16})
    assert checkpoints.newest(tmp_path) == "two"
    (tmp_path / "two").rename(tmp_path / ".two.0123456789ab-3.old")  # killed while it replaced it
    (tmp_path / "latest").write_text("two")
    assert checkpoints.newest(tmp_path) == "two"


def test_auto_is_the_latest_run_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Origin.of(AUTO, tmp_path) == Origin() == Origin.of(None, tmp_path)
    for number, name in enumerate(("later", "earlier")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        os.utime(tmp_path / name / "config.json", (1000 - number, 1000 - number))
    run = tmp_path / "later"
    assert Origin.of(AUTO, tmp_path) == Origin(str(run / "checkpoints"), None, str(run), trained=False)
    saved(run / "checkpoints", monkeypatch, "one", one=4)
    assert Origin.of(AUTO, tmp_path) == Origin(str(run / "checkpoints"), "one", str(run), trained=True)
    assert Origin.of(str(run), tmp_path) == Origin(str(run / "checkpoints"), trained=True)


def test_rows_that_are_written_again_are_removed_and_a_cut_one_is_none(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"kind": "log", "epoch": 1, "batch": n} for n in (5, 10)]
    rows += [{"kind": "batch", "epoch": 1, "batch": n} for n in range(1, 11)] + [{"kind": "epoch", "epoch": 1}]
    rows += [{"kind": "log", "epoch": 2, "batch": n} for n in (15, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "lo')

    def kept(**info: int) -> list[Any]:
        folder = RunFolder({}, {})
        folder.started(run_info(tmp_path, **info))
        folder.failed()
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert kept(first_epoch=1, first_batch=17) == rows[:-1]
    assert epochs_of(tmp_path) == [{"epoch": 1}]
    # A run that was stopped after the last batch of an epoch, before the rows of the epoch were written.
    assert kept(first_epoch=0, first_batch=10) == rows[:2]
    assert kept(first_epoch=0) == []
