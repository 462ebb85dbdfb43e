"""Checks of transformers' callbacks, and broadcast of their decisions from the first rank to all ranks.

Callbacks run on every rank; the decisions of the first rank apply to all. After each batch its five switches are
broadcast to the other ranks, which are downstream and thus reach that batch later anyway. The first rank does not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.trainer_callback import TrainerCallback, TrainerControl

from ds_al.errors import ALConfigError

ABSENT = {
    "on_pre_optimizer_step": "each stage steps by itself after every micro-batch: use on_step_begin",
    "on_optimizer_step": "each stage steps by itself after every micro-batch: use on_step_end",
    "on_substep_end": "each stage steps by itself after every micro-batch: use on_step_end",
    "on_prediction_step": "batches of an evaluation follow one another through the stages: use on_evaluate",
    "on_push_begin": "nothing is pushed to a hub: use on_save",
}
"""Events that ``ALTrainer`` never triggers, and why."""

_SWITCHES = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


def check_callback(callback: TrainerCallback | type[TrainerCallback]) -> None:
    """Checks the events of a callback.

    Raises:
        ALConfigError: it is no ``TrainerCallback``, or overrides an event that is never triggered. Callbacks of
            transformers itself may do so: they draw a progress bar with it.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    if not issubclass(kind, TrainerCallback):
        raise ALConfigError(f"got a callback of {kind.__name__}: expected a transformers.TrainerCallback")
    saves = getattr(callback, "_log_model", None) in (True, "end", "checkpoint")
    if saves and kind.__module__.startswith("transformers."):
        raise ALConfigError(
            f"got {kind.__name__} that is to log the model, by WANDB_LOG_MODEL or HF_DVCLIVE_LOG_MODEL: it saves it "
            "by a Trainer of transformers. Unset the variable, and log the folder of save_model()"
        )
    for event, why in ABSENT.items():
        own = getattr(kind, event)
        if own is not getattr(TrainerCallback, event) and not own.__module__.startswith("transformers."):
            raise ALConfigError(f"callback {kind.__name__} listens to {event}, which ALTrainer has not: {why}")


def of_loggers(report_to: str | Sequence[str]) -> list[TrainerCallback]:
    """Returns the callbacks of transformers' loggers.

    Raises:
        ALConfigError: a logger is unknown, or not installed.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        return [kind() for kind in get_reporting_integration_callbacks(report_to)]
    except (ValueError, RuntimeError, ImportError) as error:
        raise ALConfigError(f'"args.report_to": got {report_to!r}: {error}') from None


def one_folder(path: str) -> None:
    """Makes the folder that all ranks write to. Each would wait for the others' part of a checkpoint in another one.

    Raises:
        ALConfigError: two ranks have different folders, or the first rank cannot make it; raised on every rank.
    """
    failure = ""
    if dist.get_rank() == 0:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
    found: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(found, (path, failure))
    if found[0][1]:
        raise ALConfigError(f'"args.output_dir": got {path!r}, which rank 0 cannot make: {found[0][1]}')
    paths = [each for each, _ in found]
    if len(set(paths)) > 1:
        raise ALConfigError(
            f'"args.output_dir": got {", ".join(map(repr, paths))} on ranks 0, 1, ...: expected the same on all. A '
            "temporary folder has another name in each process"
        )


class Agreement:
    """Broadcasts the first rank's switches to all ranks. Every rank creates one and calls it equally often."""

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def __call__(self, control: TrainerControl) -> None:
        """Sets ``control`` to that of the first rank."""
        if self._group is None:
            return
        switches = torch.tensor([int(getattr(control, name)) for name in _SWITCHES], dtype=torch.uint8)
        work = dist.broadcast(switches, src=0, group=self._group, async_op=True)
        if dist.get_rank() == 0:
            self._under_way.append((work, switches))
            while self._under_way and self._under_way[0][0].is_completed():
                self._under_way.popleft()
            return
        work.wait()
        for name, value in zip(_SWITCHES, switches.tolist(), strict=True):
            setattr(control, name, bool(value))


def saved_states(callbacks: Sequence[TrainerCallback]) -> list[Any]:
    """Returns the callbacks whose state is part of a checkpoint."""
    from transformers.trainer_callback import ExportableState

    return [callback for callback in callbacks if isinstance(callback, ExportableState)]


def restore_states(callbacks: list[TrainerCallback], states: dict[str, Any]) -> None:
    """Restores callbacks, in place, from the states that :class:`transformers.TrainerState` stores by class name."""
    by_name = {name: list(found) if isinstance(found, list) else [found] for name, found in states.items()}
    for place, callback in enumerate(callbacks):
        if found := by_name.get(type(callback).__name__):
            callbacks[place] = type(callback).from_state(found.pop(0))  # type: ignore[attr-defined]
