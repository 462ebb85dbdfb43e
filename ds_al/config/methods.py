"""Names of the training methods."""

from __future__ import annotations

from typing import Literal, get_args

ALMethod = Literal["streaming", "forward_first", "parallel_backward", "sequential"]
BackpropMethod = Literal["bp_1f1b", "bp_gpipe", "bp_naive", "bp_zb_h1", "bp_zb_h2", "bp_dualpipev", "bp_dp", "bp_async"]
AL_METHODS: tuple[str, ...] = ("streaming", "forward_first", "parallel_backward", "sequential")
EMULATED: tuple[BackpropMethod, ...] = ("bp_async",)
"""Methods whose runs have the accuracy of a pipeline, but not its times."""
BACKPROP_METHODS: tuple[str, ...] = get_args(BackpropMethod)
