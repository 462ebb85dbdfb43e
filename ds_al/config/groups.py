"""What is refused where AL layers span several stages, K < P."""

from __future__ import annotations

from collections.abc import Sequence

from ds_al.config.associated_learning import ALConfig
from ds_al.config.base import BLOCK
from ds_al.config.settings import Settings
from ds_al.errors import ALConfigError
from ds_al.group_schedule import fastest


def check(settings: Settings, *, layers: int, stages: int) -> None:
    """Checks that groups of stages can honour the settings.

    Args:
        layers: number of AL layers, K.
        stages: number of stages, P; more than layers.

    Raises:
        ALConfigError: a setting would need an agreement of the stages of a group, or make results depend on their
            number.
    """
    al, precision = settings.al, settings.precision
    together = al.group_step == "together"
    refused = {
        f'"{BLOCK}.method": {al.method!r}': (al.method != "streaming", 'expected "streaming"'),
        f'"{BLOCK}.layer_gradient_clipping"': (
            al.layer_gradient_clipping > 0 and not together,
            f'the norm of a layer\'s gradients is summed over its stages: set "{BLOCK}.group_step": "together", which '
            "lets them wait for each other at each step",
        ),
        f'"{BLOCK}.non_finite": {al.non_finite!r}': (
            al.non_finite != "raise",
            "the stages of a layer would have to agree on a step that is left out: use 'raise'",
        ),
        f'"{BLOCK}.compile"': (
            al.compile is not None,
            "compiled blocks would depend on where stages cut a layer: remove it",
        ),
        f'"{BLOCK}.repartition"': (al.repartition is not None, "the parts of a layer keep their stages: remove it"),
        "loss scales (fp16, or bf16 with check_grad_overflow)": (
            precision.checks_overflow and not together,
            f'the stages of a layer agree on an overflow: set "{BLOCK}.group_step": "together", or use bf16 without '
            "check_grad_overflow",
        ),
    }
    for name, (given, why) in refused.items():
        if given:
            raise ALConfigError(
                f"{name} with {stages} stages for {layers} AL layers, where a layer spans several stages: {why}, or "
                f"start at most {layers} stages"
            )


def chosen(settings: Settings, *, sizes: Sequence[int]) -> ALConfig:
    """Returns the block with the schedule that ``"auto"`` chooses; the same on every rank.

    Args:
        sizes: number of stages of each group.

    Raises:
        ALConfigError: no schedule holds as few graphs as ``group_graphs`` says.
    """
    al = settings.al
    if al.group_schedule != "auto":
        return al
    micro_batches = settings.deepspeed["gradient_accumulation_steps"] // (al.steps_per_batch or 1)
    name = fastest(
        size=max(sizes), micro_batches=micro_batches, graphs=al.group_graphs, together=al.group_step == "together"
    )
    return al.model_copy(update={"group_schedule": name})
