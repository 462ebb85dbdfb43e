"""LR schedules of torch and DeepSpeed, each made of an optimizer whose rate is 0.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import lr_scheduler

from ds_al import host

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "OneCycle": lambda o: host.SCHEDULES["OneCycle"](o, 0.01, 0.1, cycle_first_step_size=3),
    "LRRangeTest": lambda o: host.SCHEDULES["LRRangeTest"](o, lr_range_test_step_size=3),
    "WarmupLR": lambda o: host.SCHEDULES["WarmupLR"](o, 0.0, 0.1, 4),
    "WarmupDecayLR": lambda o: host.SCHEDULES["WarmupDecayLR"](o, 9, 0.0, 0.1, 4),
    "WarmupCosineLR": lambda o: host.SCHEDULES["WarmupCosineLR"](o, 9, warmup_num_steps=4),
}
