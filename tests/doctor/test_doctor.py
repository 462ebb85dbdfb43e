"""``python -m ds_al doctor``: what it reports, when it fails, and what it never tells."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from email.message import Message
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet

from ds_al import __main__ as command_line
from ds_al import doctor
from ds_al.doctor import abilities, machine, software

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef" * 2 + "dummykey"
CPU = SimpleNamespace(device_name=lambda: "cpu")


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m ds_al`` as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "ds_al", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NETRC": os.devnull, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def by_item(rows: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {row.item: row for row in rows}


def test_the_rows_hold_the_versions_and_the_exit_code_follows_from_them(tmp_path: Path) -> None:
    done = call("doctor", "--json", str(tmp_path / "new" / "rows.json"))
    rows = [doctor.Finding(**row) for row in json.loads((tmp_path / "new" / "rows.json").read_text())]
    items = by_item(rows)
    assert items["python"].value == platform.python_version()
    for package in software.PACKAGES:
        assert items[package].value == metadata.version(package)
        assert metadata.version(package) in done.stdout
    assert {"accelerator", "communication", "cores", "NCCL", "fp16", "ZeRO", "port 29500"} <= items.keys()
    assert all(row.remark for row in rows if row.status != "ok")
    assert done.returncode == doctor.exit_code(rows)
    assert ("Ready to train." in done.stdout) == (done.returncode == 0)


@pytest.mark.parametrize("name", ["python", "torch", "deepspeed"])
def test_an_essential_version_out_of_range_fails(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(software, "supported_ranges", lambda: {name: SpecifierSet(">=99")})
    assert doctor.run() == 1
    out = capsys.readouterr().out
    assert f"install {name}>=99" in " ".join(out.split())
    assert f"Not ready to train: {name}" in out


@pytest.mark.parametrize("installed", [None, "1.0"])
def test_another_package_that_is_missing_or_out_of_range_only_limits(
    installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = software.release
    monkeypatch.setattr(software, "supported_ranges", lambda: {"datasets": SpecifierSet(">=3,<6")})
    monkeypatch.setattr(software, "release", lambda name: installed if name == "datasets" else original(name))
    rows = software.software()
    assert by_item(rows)["datasets"].status == "limited"
    assert "install datasets" in by_item(rows)["datasets"].remark
    assert doctor.exit_code(rows) == 0


@pytest.mark.parametrize("name", software.ESSENTIAL)
def test_an_essential_package_that_does_not_import_fails_with_a_table(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert doctor.run() == 1
    out = capsys.readouterr().out
    assert "import fails" in out
    assert "ninja" in out


def test_ranges_come_from_the_metadata_without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    info = Message()
    info["Requires-Python"] = ">=3.10"
    info["Requires-Dist"] = "deepspeed<0.20,>=0.19.0"
    info["Requires-Dist"] = 'pytest>=8; extra == "dev"'
    monkeypatch.setattr(software.metadata, "metadata", lambda name: info)
    assert software.supported_ranges() == {
        "python": SpecifierSet(">=3.10"),
        "deepspeed": SpecifierSet(">=0.19.0,<0.20"),
    }


def test_no_secret_is_told(tmp_path: Path) -> None:
    done = call("doctor", "--json", str(tmp_path / "rows.json"), WANDB_API_KEY=KEY, WANDB_MODE="online")
    written = (tmp_path / "rows.json").read_text()
    assert "WANDB_MODE online, account from WANDB_API_KEY" in written
    assert KEY not in done.stdout + done.stderr + written
    assert KEY[:8] not in done.stdout + done.stderr + written


@pytest.mark.parametrize(("host", "status"), [("api.wandb.ai", "ok"), ("example.org", "limited")])
def test_an_account_in_netrc_is_found_and_not_told(
    host: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    rows = software.software()
    assert by_item(rows)["wandb account"].status == status
    assert KEY not in repr(rows)


def test_it_only_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    before = torch.distributed.is_initialized()
    doctor.examine()
    assert torch.distributed.is_initialized() == before
    assert not (tmp_path / "extensions").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed has this op on Linux only")
class TestSharedMemoryOp:
    @pytest.fixture
    def tools(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A PATH with nothing on it, and an empty folder for compiled ops."""
        (tmp_path / "bin").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        return tmp_path / "bin"

    @pytest.mark.parametrize(
        ("present", "compiled", "status", "says"),
        [
            (["c++", "ninja"], False, "ok", "20-35 s"),
            (["ninja"], True, "ok", "TORCH_EXTENSIONS_DIR"),
            (["ninja"], False, "no", "no compiler"),
            (["c++"], True, "no", "without ninja"),
        ],
    )
    def test_what_the_first_start_needs(
        self, present: list[str], compiled: bool, status: str, says: str, tools: Path
    ) -> None:
        for name in present:
            (tools / name).touch(mode=0o755)
        if compiled:
            (tools.parent / "deepspeed_shm_comm").mkdir()
            (tools.parent / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
        (row,) = machine.compilation(CPU)
        assert row.status == status
        assert says in row.remark
        assert doctor.exit_code([row]) == int(status == "no")

    def test_a_gpu_does_not_need_it(self, tools: Path) -> None:
        assert machine.compilation(SimpleNamespace(device_name=lambda: "cuda")) == []


@pytest.mark.parametrize(
    ("cores", "threads", "status", "says"),
    [
        (8, 2, "ok", "8 cores, 2 threads per rank"),
        (2, 1, "ok", "2 cores, 1 thread per rank"),
        (8, 8, "limited", "OMP_NUM_THREADS=4 or less"),
        (2, 2, "limited", "OMP_NUM_THREADS=1 or less"),
        (1, 1, "limited", "share one core"),
    ],
)
def test_streaming_on_cores(cores: int, threads: int, status: str, says: str) -> None:
    row = abilities.streaming_on_cores(cores, threads)
    assert row.status == status
    assert says in row.remark


@pytest.mark.parametrize(("devices", "status"), [(1, "limited"), (2, "ok")])
def test_streaming_on_devices(devices: int, status: str) -> None:
    assert abilities.streaming_on_devices("cuda", devices).status == status


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert abilities.port_row(port).value == "in use"
        assert "--master_port" in abilities.port_row(port).remark
    assert abilities.port_row(port).value == "free"


def test_the_command_line_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["docter"])
    assert caught.value.code == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.parametrize("supported", [True, False])
def test_precision_is_what_the_accelerator_computes_in(supported: bool) -> None:
    """Both were called refused long after ds_al had learnt them, and float16 "not on a CPU", where some have it."""
    accelerator = SimpleNamespace(
        device_name=lambda: "cpu", is_fp16_supported=lambda: supported, is_bf16_supported=lambda: True
    )
    rows = by_item(abilities.abilities(accelerator, torch))
    assert (rows["fp16"].status, rows["bf16"].status) == ("ok" if supported else "no", "ok")
    assert rows["ZeRO"].value == "stage 1"
