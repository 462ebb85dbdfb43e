"""Secrets in configs and command lines: keys and tokens stay out of files, reports and logs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_NAME = re.compile(
    r"(?i:(?:^|[_.-])(?:(?:api|access|secret|private)[_-]?key|secret|password|passwd|credentials?))$"
    r"|(?i:(?:^|[_.-])(?:auth|access|api|hf|hub|github|identity|bearer|wandb)_token)$"
    r"|(?i:(?:^|\.)token)$|^[A-Z0-9_]+_(?:KEY|TOKEN)$"
)
_LEAST = 8  # characters: a shorter value of the environment may be a common word
_ADDRESS = re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")


def is_secret(name: str) -> bool:
    """Whether a key or variable of this name holds a secret, such as ``api_key`` or ``HF_TOKEN``."""
    return _NAME.search(name) is not None


def without_secrets(value: Any) -> Any:
    """Returns a copy of a config without its secret keys, and with :data:`HIDDEN` in place of secrets in texts."""
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not (isinstance(item, str) and is_secret(str(key)))}
        return {key: without_secrets(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return hide(value) if isinstance(value, str) else value


def hide(text: str) -> str:
    """Replaces secrets in a text: values of the environment, of ``name=value``, and passwords of addresses."""
    for name, secret in os.environ.items():
        if is_secret(name) and len(secret) >= _LEAST:
            text = text.replace(secret, HIDDEN)
    text = re.sub(r"([\w.-]+)=([^\s'\"]+)", lambda found: _hidden(found[1], found[0]), text)
    return _ADDRESS.sub(HIDDEN, text)


def _hidden(name: str, assignment: str) -> str:
    return f"{name}={HIDDEN}" if is_secret(name) else assignment
