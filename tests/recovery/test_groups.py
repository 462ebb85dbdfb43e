"""Groups, AL layers that span stages, recover as one: nothing differs, and other groups go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.recovery import events
from tests.recovery.script import Death, Result
from tests.recovery.test_recovery import await_end, ranks, undisturbed
from tests.support.engines import different, merge

pytestmark = pytest.mark.distributed


def check(
    results: list[Result], expected: list[Result], folder: Path, deaths: list[Death], *, group: dict[int, set[int]]
) -> None:
    """Compares everything with the undisturbed run.

    Args:
        group: ranks of the group of each rank.
    """
    assert not different(merge([each.state for each in results]), merge([each.state for each in expected]))
    for own, other in zip(results, expected, strict=True):
        assert own.losses == other.losses
        assert torch.equal(own.all_losses, other.all_losses)
        assert own.evaluated == other.evaluated
        assert own.drawn == other.drawn
    told = [event for event in events.read(folder / "recovery") if event["event"] in events.ENDS]
    for rank, its_group in group.items():
        processes = (folder / f"processes_{rank}").read_text().split()
        assert len(processes) == 1 + sum(event["rank"] == rank for event in told)
        assert (len(processes) == 1) == (not any(death.rank in its_group for death in deaths))  # others go on
        await_end([int(process) for process in processes])
    # Where two of a group die at the same time, a keeper may have ended the second one before.
    least = len({(min(group[death.rank]), death.process) for death in deaths})
    assert least <= sum(event["event"] == "death" for event in told) <= len(deaths)


def run_and_check(stages: int, folder: Path, deaths: list[Death], *, layers: int = 2, **options: Any) -> None:
    sizes = stages // layers
    group = {rank: set(range(rank // sizes * sizes, rank // sizes * sizes + sizes)) for rank in range(stages)}
    without = {name: value for name, value in options.items() if name != "recovery"}
    expected = undisturbed(stages, folder / "undisturbed", layers=layers, **without)
    check(ranks(stages, folder, deaths, layers=layers, **options), expected, folder, deaths, group=group)


def test_a_group_goes_back_as_one(tmp_path: Path) -> None:
    run_and_check(2, tmp_path, [Death(1, 0, "forward", 21)], layers=1)


OPTIONS: dict[str, dict[str, Any]] = {
    "together": {
        "group_schedule": "zb_h2",
        "group_step": "together",
        "layer_gradient_clipping": 0.05,
        "steps_per_batch": 2,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7, "warmup_max_lr": 0.01}},
    },
    "int8, on disk": {"group_schedule": "zb_h1", "message_dtype": "int8", "recovery": {"log": "disk"}},
    "copies of decoders": {"name": "decoded"},
    "standby": {"recovery": {"standby": True}},
    "bf16, ZeRO-1": {
        "keys": {"bf16": {"enabled": True, "check_grad_overflow": False}, "zero_optimization": {"stage": 1}}
    },
    "slow link": {"link": {"delay_ms": 3, "mbit": 100}, "message_checksum": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    run_and_check(4, tmp_path, [Death(1, 0, "forward", 21), Death(3, 0, "forward", 30)], **options)


@pytest.mark.slow
def test_uneven_groups(tmp_path: Path) -> None:
    """Two layers of 6 and 2 blocks on four stages: a group of three, and one of a stage alone."""
    group = {0: {0, 1, 2}, 1: {0, 1, 2}, 2: {0, 1, 2}, 3: {3}}
    deaths = [Death(1, 0, "forward", 18), Death(3, 0, "forward", 29)]
    expected = undisturbed(4, tmp_path / "undisturbed", layers=[6, 2])
    check(ranks(4, tmp_path, deaths, layers=[6, 2]), expected, tmp_path, deaths, group=group)


CASES: dict[str, list[Death]] = {
    "first stage of the first group": [Death(0, 0, "forward", 21)],
    "last stage of the first group": [Death(1, 0, "forward", 21)],
    "first stage of the last group": [Death(2, 0, "forward", 21)],
    "last stage of the last group, which then evaluates": [Death(3, 0, "evaluate", 6)],
    "evaluation, in the first group": [Death(0, 0, "evaluate", 2)],
    "two deaths in a group": [Death(0, 0, "forward", 18), Death(1, 0, "forward", 17)],
    "a death in each group": [Death(1, 0, "forward", 21), Death(2, 0, "forward", 21)],
    "in the recovery": [Death(2, 0, "forward", 21), Death(3, 1, "forward", 18), Death(2, 2, "between", 4)],
    "before the first save, in a save, at the end": [
        Death(0, 0, "forward", 1),  # its first forward pass
        Death(3, 0, "save", 4),
        Death(3, 1, "end", 1),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("deaths", CASES.values(), ids=CASES.keys())
def test_nothing_differs(deaths: list[Death], tmp_path: Path) -> None:
    run_and_check(4, tmp_path, deaths)
