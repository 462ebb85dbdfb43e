"""Pages of docs/ are all in its index, and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page.name} links to {target}"


def test_options_that_pages_name_are_options_of_the_command() -> None:
    """docs/profiling.md once said that run/train.py has no data parallel replicas, while it had ``--stages``."""
    command = [sys.executable, str(ROOT / "run/train.py"), "--help"]
    known = subprocess.run(command, text=True, capture_output=True, timeout=120, check=True).stdout
    named = set()
    for page in PAGES:
        for options in re.findall(r"`(?:deepspeed [^`]*?)?run/train\.py ([^`]*)`", page.read_text()):
            named |= set(re.findall(r"--[a-z][a-z_-]+", options))
    assert "--stages" in named
    assert {option for option in named if f"{option} " not in known and f"{option}\n" not in known} == set()
    assert "`run/train.py --stages`" in (ROOT / "docs/profiling.md").read_text()
