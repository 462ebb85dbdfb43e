"""Names of the training methods."""

from __future__ import annotations

from typing import Literal

ALMethod = Literal["streaming", "forward_first", "parallel_backward", "sequential"]
BackpropMethod = Literal["bp_1f1b", "bp_gpipe", "bp_naive", "bp_dp"]
AL_METHODS: tuple[str, ...] = ("streaming", "forward_first", "parallel_backward", "sequential")
BACKPROP_METHODS: tuple[str, ...] = ("bp_1f1b", "bp_gpipe", "bp_naive", "bp_dp")
