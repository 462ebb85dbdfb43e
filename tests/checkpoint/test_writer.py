"""The writer of checkpoints, apart from ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ds_al.checkpoint.folder import write_index
from ds_al.checkpoint.writer import Destination, Writer


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
