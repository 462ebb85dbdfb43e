"""The GPU of this machine. Imports PyTorch alone, since other packages may be missing."""

from __future__ import annotations

from typing import Any

import torch


def gpu() -> dict[str, Any] | None:
    """Returns the facts of the first GPU; ``None`` where PyTorch finds none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)),
    }
