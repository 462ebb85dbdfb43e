"""Each row of the table of compatibility names a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_row_names_a_test_that_is_there() -> None:
    rows = [line for line in (DOCS / "compatibility.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        links = re.findall(r"\[(test_\w+)\]\(([^)]+)\)", row)
        assert links, row
        for name, path in links:
            assert f"def {name}(" in (DOCS / path).read_text(), (name, path)
