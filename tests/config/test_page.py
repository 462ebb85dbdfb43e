"""``docs/config.md`` says what the types say."""

from __future__ import annotations

from pathlib import Path

from ds_al.config_docs import document


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/config.md"
    assert page.read_text() == document(), "run: python -m ds_al config-docs > docs/config.md"
