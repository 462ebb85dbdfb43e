"""The measurements of links: which commands make one, what rows say of runs, and that nothing is left behind."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_al.studies.bench import namespaces
from ds_al.studies.bench.slow_link import FORMS, Found, LinkCases, Run, link_rows
from ds_al.studies.bench.traffic import al_bytes, bp_bytes
from ds_al.studies.tables.links import slow_link, traffic
from ds_al.studies.tables.write import document

ROOT = Path(__file__).resolve().parents[2]
CASES = LinkCases(rates=[10, 100], model="vgg", cut=2, micro_batch=64, micro_batches=8, seconds=1.0, repeat=2)


def test_the_commands_touch_nothing_but_the_namespaces_of_this_process() -> None:
    one, two = namespaces.names(123)
    assert one != two and all("123" in name for name in (one, two))
    commands = namespaces.creation(123)
    assert commands[:2] == [["ip", "netns", "add", one], ["ip", "netns", "add", two]]
    assert "type veth peer" in " ".join(commands[2])
    for command in commands[2:]:
        assert one in command or two in command
    assert {"10.173.0.1/30", "10.173.0.2/30"} <= {word for command in commands for word in command}
    assert namespaces.within(123) == [["ip", "netns", "exec", one], ["ip", "netns", "exec", two]]
    environment = namespaces.environment()
    assert environment == {"MASTER_ADDR": "10.173.0.1", "GLOO_SOCKET_IFNAME": namespaces.INTERFACE}


def test_a_limit_is_a_token_bucket_and_can_be_taken_away() -> None:
    assert " ".join(namespaces.limit(100)).startswith("tc qdisc replace dev link0 root tbf rate 100mbit burst ")
    assert " ".join(namespaces.limit(0.5)).split()[8] == "0.5mbit"
    assert "tbf" not in namespaces.limit(None)


def test_without_root_there_is_a_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["slow_link.py"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "run/slow_link.py"), run_name="__main__")
    assert caught.value.code == 3
    assert "not measured: network namespaces need root" in capsys.readouterr().err


def test_a_machine_without_the_tools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(namespaces.NotAllowed, match="tc not found: install iproute2"):
        namespaces.check()


def _allowed() -> bool:
    try:
        with namespaces.joined_namespaces():
            return True
    except namespaces.NotAllowed:
        return False


def test_namespaces_are_gone_afterwards_whatever_happens() -> None:
    if not _allowed():
        pytest.skip("network namespaces are not allowed here")
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale, running = namespaces.names(gone.pid)[0], namespaces.names(os.getppid())[0]
    for name in (stale, running):
        namespaces.run(["ip", "netns", "add", name])
    try:
        with pytest.raises(RuntimeError, match="in between"), namespaces.joined_namespaces() as within:
            assert set(namespaces.names(os.getpid())) <= set(namespaces.existing())
            assert stale not in namespaces.existing() and running in namespaces.existing()
            seen = subprocess.run([*within[1], "ip", "address"], capture_output=True, text=True)
            assert namespaces.INTERFACE in seen.stdout and "10.173.0.2/30" in seen.stdout, seen.stderr
            raise RuntimeError("in between")
        assert not set(namespaces.names(os.getpid())) & set(namespaces.existing())
    finally:
        namespaces.remove([stale, running])
    assert running not in namespaces.existing()


def found(rank: int) -> Found:
    """Runs of one rank: at 10 Mbit/s half as fast as without a limit, and 1F1B, which sends both ways, a quarter."""
    runs = {}
    for rate in CASES.all_rates:
        for form in FORMS:
            backprop = form[0] == "bp_1f1b"
            seconds = {None: 1.0, 100.0: 1.0, 10: 4.0 if backprop else 2.0}[rate]
            sent = 8_000_000 if rank == 0 or backprop else 0
            runs[rate, form] = [Run(5.0, 5.0 + seconds - 0.1 * (rank == 0), 1, sent, sent + 800)] * CASES.repeat
    return {rate: rate or 5000.0 for rate in CASES.all_rates}, runs


def test_rows_and_table_of_a_slow_link() -> None:
    rows = list(link_rows(CASES, [found(0), found(1)]))
    assert [row["rate_mbit"] for row in rows[::4]] == [None, 100, 10]
    al, bp = (next(r for r in rows if (r["rate_mbit"], r["method"]) == (10, m)) for m in ("streaming", "bp_1f1b"))
    assert (al["samples_per_s"], al["relative_to_unlimited"], al["seconds"]) == (256, 0.5, 2.0)
    assert (bp["samples_per_s"], bp["relative_to_unlimited"]) == (128, 0.25)
    assert (al["bytes_per_micro_batch"], bp["bytes_per_micro_batch"]) == (1_000_000, 2_000_000)
    assert al["wire_bytes_per_micro_batch"] == 1_000_200
    assert al["needed_mbit"] == bp["needed_mbit"] == 64  # 1 MB, 8 times a second, each way
    table = document(*slow_link(rows))
    assert "| 10 | 10 | 256 (-50 %) | 256 (-50 %) | 256 (-50 %) | 128 (-75 %) |" in table
    assert "| no limit | 5,000 | 512 | 512 | 512 | 512 |" in table
    assert "-1.2 %" in table and "-51 %" in table and "arXiv 2609.35440" in table


def test_bytes_by_formula() -> None:
    hidden, mask, code = torch.zeros(2, 100), torch.zeros(2, 100, dtype=torch.bool), torch.zeros(2, 16)
    report = 10  # 40 bytes, as every tensor filled up to 64
    others = 256 + 64  # mask, report
    assert al_bytes("fp32", (hidden, mask), (code,), report) == 832 + 128 + others
    assert al_bytes("bf16", (hidden, mask), (code,), report) == 448 + 64 + others
    assert al_bytes("int8", (hidden, mask), (code,), report) == 256 + 64 + 64 + 64 + others
    assert bp_bytes((hidden, mask)) == 800 + 200 + 800


def test_traffic_table() -> None:
    row = {"network": "vgg", "stages": 2, "samples": 4, "boundary": 1, "method": "streaming", "relative_error": 0.005}
    rows = [
        {**row, "message_dtype": name, "bytes": size, "formula": size, "times_less": 8192 / size}
        for name, size in (("fp32", 4096), ("bf16", 2048), ("int8", 1024))
    ]
    rows.append({**row, "method": "bp_1f1b", "message_dtype": "fp32", "bytes": 8192, "formula": 8192, "times_less": 1})
    line = "| vgg | 1 | 8.0 | 4.0 | 2.0 | 1.0 | 2.00 | 4.00 | 8.00 | 0.50 % | 0.50 % |"
    assert line in document(*traffic(rows))
    rows[0] = {**rows[0], "formula": 5120}
    table = document(*traffic(rows))
    assert "4.0 (5.0)" in table and "1 differ from the formula" in table
