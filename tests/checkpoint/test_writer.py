"""The writer of checkpoints, apart from ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ds_al.checkpoint.folder import write_index
from ds_al.checkpoint.writer import Destination, Writer, _tidy


def test_a_folder_that_is_renamed_while_a_stage_looks_into_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage once failed, now and then, with FileNotFoundError: the first had just renamed the folder."""
    part = tmp_path / ".session-1.part"
    part.mkdir()

    def renamed_meanwhile(folder: Any) -> Any:
        part.rename(tmp_path / "tag")
        write_index(tmp_path / "tag", {"format": 2, "stages": [], "layers": []})
        raise FileNotFoundError(folder)

    monkeypatch.setattr(os, "scandir", renamed_meanwhile)
    monkeypatch.setattr(os, "listdir", renamed_meanwhile)
    writer = Writer(stage=1, ranks=[0, 1], session="session")
    writer._await(part, Destination(tmp_path, "tag"))


def test_a_checkpoint_that_a_new_process_loads_again_is_kept(tmp_path: Path) -> None:
    """With ``keep_last`` it was once removed, and the process that took the place of another one could not load it."""
    for number, tag in enumerate(("loaded", "old", "new")):
        (tmp_path / tag).mkdir()
        write_index(tmp_path / tag, {"format": 2, "stages": [], "layers": []})
        os.utime(tmp_path / tag / "index.json", (number, number))
    _tidy(tmp_path / ".s-1.part", tmp_path / "new", Destination(tmp_path, "new", keep=1, needed=(tmp_path / "loaded",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loaded", "new"]
