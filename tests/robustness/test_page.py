"""docs/robustness.md is up to date, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate import robustness

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs/robustness.md").read_text()
    assert page == robustness.page(), "run python docs/generate/robustness.py > docs/robustness.md"


@pytest.mark.parametrize("kind", robustness.kinds(), ids=lambda kind: f"{kind.section}: {kind.name}")
def test_the_tests_that_hold_a_kind_exist(kind: robustness.Kind) -> None:
    assert kind.tests or kind.outcome == "left"
    for test in kind.tests:
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), f"{test} does not exist"
