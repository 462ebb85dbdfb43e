"""Errors that say that another rank is gone."""

from __future__ import annotations

import re

_WORDS = re.compile(
    r"lost stage|cannot reach stage|Connection (closed|reset|refused|was likely closed)|Broken pipe"
    r"|[Tt]imed out waiting|Socket Timeout|ncclRemoteError|remote process exited"
)


def is_loss(error: BaseException) -> bool:
    """Whether an error says that another rank is gone, in words of ours, of gloo, of NCCL, or of torch's store."""
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None
