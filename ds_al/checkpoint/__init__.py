"""Checkpoints by AL layer: saved by any number of stages, loaded by any other, checked before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_al.checkpoint.saving import Checkpoints

__all__ = ["Checkpoints"]


def __getattr__(name: str) -> Any:
    """Imports the engine's part when it is used: a command that only reads files starts no DeepSpeed."""
    if name != "Checkpoints":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_al.checkpoint.saving import Checkpoints

    return Checkpoints
