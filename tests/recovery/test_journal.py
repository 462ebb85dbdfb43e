"""The journal of a rank: what a process has written, the next one reads, in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_al.errors import ALRecoveryError
from ds_al.parallel.journal import Journal
from ds_al.recovery.place import Place
from ds_al.trace import StageStats

STATS = StageStats(0, 1.5, 0.1, 0.2, 0.0, 100, 2, 16)


def written(path: Path) -> Path:
    journal = Journal(path)
    journal.add("batch", "train_batch", [0.1, "float32"])
    journal.add("call", "gather", {"result": [STATS, (1, None)], "scores": torch.arange(3)})
    journal.flush()
    return path


def test_another_process_reads_what_is_written(tmp_path: Path) -> None:
    journal = Journal(written(tmp_path / "journal"))
    batch, call = journal.take("batch", "train_batch"), journal.take("call", "gather")
    assert batch is not None and batch.value == [0.1, "float32"]
    assert call is not None and call.value["result"] == [STATS, (1, None)]
    assert call.value["scores"].tolist() == [0, 1, 2]
    assert journal.take("batch", "train_batch") is None
    journal.add("batch", "train_batch", [0.2, "float32"])
    journal.flush()
    again = Journal(tmp_path / "journal")
    values = [entry.value for entry in iter(lambda: again.take(*again.next[:2]) if again.next else None, None)]
    assert len(values) == 3 and values[2] == [0.2, "float32"]


@pytest.mark.parametrize("bytes_left", [1, 4, 9, 30])
def test_what_was_being_written_at_death_does_not_count(bytes_left: int, tmp_path: Path) -> None:
    whole = written(tmp_path / "journal").read_bytes()
    journal = Journal(tmp_path / "journal")
    journal.add("batch", "train_batch", [0.3, "float32"])
    journal.flush()
    (tmp_path / "journal").write_bytes((tmp_path / "journal").read_bytes()[: len(whole) + bytes_left])
    after = Journal(tmp_path / "journal")
    assert after.take("batch", "train_batch") and after.take("call", "gather") and after.next is None
    assert (tmp_path / "journal").read_bytes() == whole


def test_a_script_that_does_something_else_is_told(tmp_path: Path) -> None:
    journal = Journal(written(tmp_path / "journal"))
    with pytest.raises(ALRecoveryError, match=r"came to call 'evaluate'.* came to batch 'train_batch'"):
        journal.take("call", "evaluate")


def test_the_place_outlives_its_process(tmp_path: Path) -> None:
    Place(tmp_path / "place").micro_batches = 77
    assert Place(tmp_path / "place").micro_batches == 77
