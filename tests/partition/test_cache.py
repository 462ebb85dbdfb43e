"""Measured times are found again where nothing changed that decides them, and only there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_al.partition import cache as time_cache
from ds_al.partition.layer_times import LayerTime

TIMES = [[LayerTime(0.1, 0.2, 0.3, 4), LayerTime(1.0, 2.0, 3.0, 5)]] * 3
FACTS = {"layers": "abc", "ranks": [["cpu", 1]] * 3}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_AL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_written_is_read_under_the_same_facts_alone() -> None:
    assert time_cache.read(FACTS, ranks=3, layers=2) is None
    time_cache.write(FACTS, TIMES)
    assert time_cache.read(FACTS, ranks=3, layers=2) == TIMES
    assert time_cache.read({**FACTS, "layers": "abd"}, ranks=3, layers=2) is None


def no_json(content: dict[str, Any]) -> str:
    return json.dumps(content)[:-9]


def no_number(content: dict[str, Any]) -> str:
    content["times"][1][0]["step"] = float("inf")  # which JSON as Python writes it can hold
    return json.dumps(content)


def no_step(content: dict[str, Any]) -> str:
    del content["times"][1][0]["step"]
    return json.dumps(content)


def no_rank(content: dict[str, Any]) -> str:
    return json.dumps({**content, "times": content["times"][:2]})


def no_times(content: dict[str, Any]) -> str:
    return json.dumps({"facts": content["facts"]})


@pytest.mark.parametrize("damage", [no_json, no_number, no_step, no_rank, no_times])
def test_a_damaged_file_is_named_and_ignored(damage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    time_cache.write(FACTS, TIMES)
    path = time_cache.path_of(FACTS)
    path.write_text(damage(json.loads(path.read_text())))
    assert time_cache.read(FACTS, ranks=3, layers=2) is None
    assert f"ignored the measured times in {path}" in capsys.readouterr().err
    time_cache.write(FACTS, TIMES)
    assert time_cache.read(FACTS, ranks=3, layers=2) == TIMES


def test_a_folder_that_cannot_be_written_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_text("a file")
    time_cache.write(FACTS, TIMES)
    assert "could not keep the measured times in" in capsys.readouterr().err


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_AL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert time_cache.folder() == Path("/somewhere/ds_al")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert time_cache.folder() == Path("~/.cache/ds_al").expanduser()


def block(width: int = 3, power: int = 2, kind: type[nn.Module] = nn.ReLU, frozen: bool = False) -> nn.Module:
    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.power = power

        def forward(self, x: Tensor) -> Tensor:
            return x**self.power

    return nn.Sequential(nn.Linear(3, width), kind(), Power()).requires_grad_(not frozen)


def test_layers_that_may_cost_otherwise_have_another_signature() -> None:
    torch.manual_seed(0)
    one = time_cache.signature([block()])
    assert one == time_cache.signature([block()])  # whatever the weights are
    others = [
        [block(4)],
        [block(power=3)],
        [block(kind=nn.Tanh)],
        [block(frozen=True)],
        [block()] * 2,
        [block().double()],
    ]
    found = [time_cache.signature(layers) for layers in others]
    assert len({one, *found}) == 1 + len(others)


def test_the_code_of_a_class_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for name, power in {"powers_one": 2, "powers_two": 3, "powers_three": 2}.items():
        code = f"from torch import nn\nclass Power(nn.Module):\n    def forward(self, x):\n        return x**{power}\n"
        (tmp_path / f"{name}.py").write_text(code)
        found.append(time_cache.signature([importlib.import_module(name).Power()]))
    assert found[0] == found[2] != found[1]
