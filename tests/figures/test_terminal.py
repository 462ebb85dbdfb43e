"""What is printed is what was meant, whatever names hold."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table

from ds_al.experiment.display import Display
from ds_al.figures.terminal import Console
from tests.support.runs import run_info

ROOT = Path(__file__).parents[2]
NAME, FOLDER = "vgg[fast]:100:", "runs[/x]/vgg[fast]"


def test_a_run_is_shown_with_its_name_and_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder called runs[old] was told as runs, and one with [/x] in its path ended the run."""
    Display().started(run_info(folder=Path(FOLDER), name=NAME))
    shown = capsys.readouterr().out
    assert f"{NAME}: streaming" in shown and f"writes to {FOLDER};" in shown


def test_a_table_has_its_cells_as_they_are() -> None:
    table = Table("method[a]", title="group[b]")
    table.add_row(NAME)
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    assert all(text in console.file.getvalue() for text in ("method[a]", "group[b]", NAME))


def test_every_console_is_such_a_one() -> None:
    files = [*ROOT.glob("ds_al/**/*.py"), *ROOT.glob("run/*.py")]
    direct = [str(file) for file in files if re.search(r"from rich\.console import.*\bConsole\b", file.read_text())]
    assert len(files) > 100 and direct == []
