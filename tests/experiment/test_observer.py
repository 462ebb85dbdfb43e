"""Observers of a run: all are called, in their order, and none where a rank does not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ds_al.experiment.observer import Observer, Observers
from ds_al.experiment.run_folder import RunFolder
from tests.support.runs import run_info

CALLS: dict[str, tuple[Any, ...]] = {
    "started": (run_info(),),
    "batch": (0, lambda: None),
    "logged": ({},),
    "losses": (0, torch.zeros(1, 2, 2)),
    "epoch": ({},),
    "trained": ((),),
    "finished": ({}, []),
    "failed": (),
}


class Noting(Observer):
    """Notes its calls in a list."""

    def __init__(self, name: str, seen: list[tuple[Any, ...]]) -> None:
        for call in CALLS:
            setattr(self, call, lambda *args, call=call: seen.append((name, call, *args)))


def test_every_observer_gets_every_call_in_order() -> None:
    seen: list[tuple[Any, ...]] = []
    observers = Observers(Noting("first", seen), Noting("second", seen))
    for call, args in CALLS.items():
        getattr(observers, call)(*args)
    assert seen == [(name, call, *args) for call, args in CALLS.items() for name in ("first", "second")]


def test_without_observers_nothing_happens() -> None:
    for observer in (Observers(), Observer()):
        for call, args in CALLS.items():
            getattr(observer, call)(*args)


def test_the_folder_of_a_run_that_failed_has_all_lines_up_to_then(tmp_path: Path) -> None:
    folder = RunFolder({"key": 1}, {"method": "streaming"})
    folder.started(run_info(tmp_path, first_epoch=1))
    folder.logged({"batch": 10, "losses": [[float("nan"), 2.0]]})
    folder.losses(1, torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    folder.failed()
    assert json.loads((tmp_path / "config.json").read_text()) == {"key": 1, "resolved": {"method": "streaming"}}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows.pop(0) == {"kind": "log", "batch": 10, "losses": [[None, 2.0]]}
    assert [(row["batch"], row["losses"]) for row in rows] == [(19, [[1.0, 2.0]]), (20, [[3.0, 4.0]])]


def test_a_process_that_takes_another_ones_place_adds_no_line_twice(tmp_path: Path) -> None:
    """It runs from the start again, and the former one died while it wrote its third line."""
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"kind": "log", "batch": 1}\n{"kind": "log", "batch": 2}\n{"kind": "lo')
    folder = RunFolder({}, {})
    folder.started(run_info(tmp_path))
    for batch in range(1, 5):
        folder.logged({"batch": batch})
    folder.failed()
    assert [json.loads(line)["batch"] for line in lines.read_text().splitlines()] == [1, 2, 3, 4]
