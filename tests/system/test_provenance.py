"""The command that a run records is the one that was typed, with its launcher."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ds_al.system import provenance

SCRIPT = "import sys\nfrom ds_al.system import provenance\nprint(provenance.command())\n"
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-u", sys.argv[-3], "--local_rank=0", *sys.argv[-2:]], check=True)
"""


def test_a_machine_has_an_id_of_its_own_start_that_does_not_tell_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Path("/proc/sys/kernel/random/boot_id")
    if started.exists():
        assert provenance.boot() == provenance.boot() and started.read_text().strip()[:8] not in str(provenance.boot())

    def nowhere(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", nowhere)
    assert provenance.boot() is None


def test_it_begins_with_the_launcher(tmp_path: Path) -> None:
    """As with ``deepspeed``, which starts a process that starts the ranks."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/deepspeed").write_text(LAUNCHER)
    (tmp_path / "train.py").write_text(SCRIPT)
    words = ["--num_accelerators", "2", "train.py", "--set", "a b=1"]
    launcher = [sys.executable, str(tmp_path / "bin/deepspeed"), *words]
    found = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert shlex.split(found.stdout) == ["deepspeed", *words]


def test_it_is_python_without_a_launcher(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    words = ["train.py", "--set", "a b=1"]
    found = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert shlex.split(found.stdout) == ["python", *words]


def test_where_no_launcher_is_to_be_seen_one_of_as_many_ranks_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run/train.py", "--local_rank=1", "--epochs", "2"])
    monkeypatch.setattr(provenance, "_ancestors", lambda: iter(()))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert provenance.command() == "deepspeed --num_accelerators 3 run/train.py --epochs 2"


def test_a_shell_or_sudo_above_the_launcher_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["run/train.py", "--epochs", "2"]
    lines = [["/bin/python3", "/bin/torchrun", "--nproc_per_node=2", *own], ["sudo", "KEY=x", "torchrun", *own]]
    monkeypatch.setattr(sys, "argv", own)
    monkeypatch.setattr(provenance, "_ancestors", lambda: iter(lines))
    assert provenance.command() == "torchrun --nproc_per_node=2 run/train.py --epochs 2"
