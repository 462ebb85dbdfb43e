"""``docs/config.md`` says what the types say."""

from __future__ import annotations

from pathlib import Path

from docs.generate import config


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/config.md"
    assert page.read_text() == config.page(), "run: make docs"
