"""What is refused with recovery: whatever a process that takes the place of another one could not do again."""

from __future__ import annotations

from ds_al.config.base import BLOCK
from ds_al.config.settings import Settings
from ds_al.errors import ALConfigError

_MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")


def check(settings: Settings, *, replicas: int, measured: bool, device: str) -> None:
    """Checks that a job with recovery can honour the settings.

    Args:
        replicas: number of data parallel replicas.
        measured: whether the ranks have measured the partition.
        device: type of the accelerator.

    Raises:
        ALConfigError: a setting has no recovery, or does not fit it.
    """
    al = settings.al
    assert al.recovery is not None
    micro_batches = settings.deepspeed["gradient_accumulation_steps"]
    monitors = [name for name in _MONITORS if (settings.deepspeed.get(name) or {}).get("enabled")]
    refused = {
        f'"{BLOCK}.method": {al.method!r}': (al.method != "streaming", 'expected "streaming"'),
        f"{replicas} data parallel replicas": (
            replicas > 1,
            "the gradients of a replica that is gone cannot be averaged: expected 1, with as many "
            "stages (num_stages) as ranks",
        ),
        f"the device {device}": (
            device != "cpu",
            "NCCL notices no process that is gone, and its kernels would train on what has not arrived: expected cpu",
        ),
        'the partition "measured"': (measured, 'a new process would measure other times: give its result as "cuts:"'),
        f'"{BLOCK}.trace"': (al.trace.enabled, "a process that is gone has taken its events along: expected it off"),
        f'"{BLOCK}.repartition"': (al.repartition is not None, "a new process could not repeat moves: expected null"),
        f'"{BLOCK}.non_finite": {al.non_finite!r}': (
            al.non_finite == "save_and_stop",
            "a new process could not repeat how the ranks agree on a batch: expected 'raise' or 'skip'",
        ),
        f'"{BLOCK}.checkpoint.asynchronous"': (
            al.checkpoint.asynchronous,
            "a save that another process has begun cannot be completed in the background: expected false",
        ),
        f'"{"".join(monitors[:1])}"': (bool(monitors), "a monitor would show batches twice: remove it"),
        f'"{BLOCK}.recovery.every": {al.recovery.every}': (
            al.recovery.every % micro_batches > 0,
            f"expected a multiple of {micro_batches}, the micro-batches of a batch",
        ),
    }
    for name, (given, why) in refused.items():
        if given:
            raise ALConfigError(f'{name} with "{BLOCK}.recovery": {why}, or remove "recovery"')
