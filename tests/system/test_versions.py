"""A DeepSpeed that is too old is named at once, not by whatever it lacks."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

import ds_al
from ds_al.errors import ALVersionError
from ds_al.system import versions


@pytest.mark.parametrize("found", ["0.18.9", "0.9.5"])
def test_a_release_below_the_range_is_an_error_when_a_public_name_is_used(
    found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "release", lambda _: found)
    monkeypatch.delitem(vars(ds_al), "initialize", raising=False)
    with pytest.raises(ALVersionError, match=f"got deepspeed {found}, expected >=0.19.0,<0.20: pip install 'deepspeed"):
        _ = ds_al.initialize
    assert ds_al.ALVersionError is ALVersionError  # what errors are called is known with any release


def test_none_at_all_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = versions.release("no-package-of-this-name")
    assert absent is None and versions.release("deepspeed") == metadata.version("deepspeed")
    monkeypatch.setattr(versions, "release", lambda _: absent)
    with pytest.raises(ALVersionError, match=r"deepspeed is not installed, expected >=0\.19\.0"):
        versions.check_deepspeed()


@pytest.mark.parametrize("found", [versions.OLDEST, "0.19.8", "0.21.1"])
def test_the_oldest_and_later_ones_pass(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "release", lambda _: found)
    versions.check_deepspeed()


def test_the_range_is_that_of_the_package() -> None:
    lines = (Path(__file__).parents[2] / "pyproject.toml").read_text().splitlines()
    assert f'    "deepspeed>={versions.OLDEST},<{versions.BELOW}",' in lines
