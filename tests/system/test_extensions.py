"""A compilation is announced; a lock that a killed one has left is named instead of waited for."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ds_al.errors import ALConfigError
from ds_al.system import extensions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    return tmp_path / "op"


def test_a_compilation_is_announced_with_its_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with extensions.compiling("op", tell=True):
        pass
    text = capsys.readouterr().err
    assert f"compiling op of DeepSpeed, once, into {folder}: 1 to 2 minutes" in text and "compiled op in 0 s" in text
    (folder / "op.so").touch()
    with extensions.compiling("op", tell=True), extensions.compiling(None, tell=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_lock_that_nobody_holds_is_refused_by_name(folder: Path) -> None:
    (folder / "lock").touch()
    expected = pytest.raises(ALConfigError, match=r"op/lock was left by a compilation .* remove this file")
    with expected, extensions.compiling("op", tell=False):
        pass


def test_a_process_that_is_killed_while_it_loads_what_is_compiled_does_not_stop_the_next_one(folder: Path) -> None:
    """A run that was killed in its first second could not be started again until someone removed the file."""
    (folder / "op.so").touch()
    (folder / "lock").touch()
    with extensions.compiling("op", tell=False):
        assert not (folder / "lock").exists()


def test_a_lock_that_is_held_is_waited_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle = os.open(folder / "lock", os.O_CREAT | os.O_EXCL)

    def release() -> None:
        time.sleep(2.0)
        os.close(handle)
        (folder / "lock").unlink()

    thread = threading.Thread(target=release)
    thread.start()
    with extensions.compiling("op", tell=True):
        assert not (folder / "lock").exists()
    thread.join()
    assert "waiting for another process that compiles" in capsys.readouterr().err


@pytest.mark.parametrize("held", [False, True])
def test_a_process_may_end_while_what_processes_hold_is_read(
    held: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start once failed by FileNotFoundError: '/proc/<pid>/fd', of a process that had just ended."""
    child = subprocess.Popen(["sleep", "60"])

    def ends_before(read: Callable[[Any], Any], path: Any = ".") -> Any:
        if str(path) == f"/proc/{child.pid}/fd":
            child.kill()
            child.wait()
        return read(path)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, partial(ends_before, getattr(os, name)))
    with (folder / "lock").open("w") if held else nullcontext():
        assert extensions.is_held(folder / "lock") == held
    assert child.returncode is not None or held
    child.kill()
    child.wait()


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("Adam", {"lr": 1e-3}, "fused_adam"),
        ("adamw", None, "fused_adam"),
        ("AdamW", {"torch_adam": True}, None),
        ("SGD", {}, None),
        (None, None, None),
    ],
)
def test_which_optimizer_is_compiled(name: str | None, params: dict[str, object] | None, expected: str | None) -> None:
    assert extensions.of_optimizer(name, params) == expected
