"""The text for a repository: the page's content, with pictures that are there."""

from __future__ import annotations

import re
from pathlib import Path

from ds_al.report import content, read, write_markdown
from tests.support.folders import make_run, make_seeds


def test_pictures_are_where_the_text_says(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    files = write_markdown(content(read([tmp_path])[0]), tmp_path / "docs" / "my report.md")
    text = files[0].read_text()
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(named) == len(files) - 1 > 6
    for name in named:
        assert (files[0].parent / name.replace("%20", " ")).read_bytes().startswith(b"\x89PNG")


def test_it_has_the_numbers_of_the_page(tmp_path: Path) -> None:
    make_seeds(tmp_path)
    text = write_markdown(content(read([tmp_path])[0], question="Why?"), tmp_path / "r.md")[0].read_text()
    assert "**Why?**" in text
    assert "| streaming | 2 | 3 | 2 | 3 | 0.9100 ± 0.0100 | 11.0 ± 1.0 | 1,001 ± 1 | 300 |" in text
    assert "    deepspeed run/train.py --method streaming --seed 0" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_nothing_of_a_file_becomes_markup(tmp_path: Path) -> None:
    make_run(tmp_path, cpu="a | b <img src=x> [c](d) $e$")
    text = write_markdown(content(read([tmp_path])[0]), tmp_path / "r.md")[0].read_text()
    assert r"a \| b \<img src=x\> \[c\](d) \$e\$" in text


def test_differences_come_first(tmp_path: Path) -> None:
    make_run(tmp_path)
    make_run(tmp_path, method="bp_1f1b", cpu="Other")
    text = write_markdown(content(read([tmp_path])[0]), tmp_path / "r.md")[0].read_text()
    assert text.index("- Processor differs: AMD EPYC") < text.index("## Methods")
