"""Training objectives of AL layers, one per file. To add one, write a file and a line in :data:`OBJECTIVES`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from ds_al.errors import ALConfigError
from ds_al.objectives.base import Objective
from ds_al.objectives.contrast import Contrast
from ds_al.objectives.decoded import Decoded
from ds_al.objectives.greedy import Greedy
from ds_al.objectives.mse import Mse
from ds_al.objectives.next_token import NextToken
from ds_al.objectives.readout import Readout
from ds_al.objectives.token_codes import TokenCodes
from ds_al.tensors import Target

__all__ = [
    "OBJECTIVES",
    "Contrast",
    "Decoded",
    "Greedy",
    "Mse",
    "NextToken",
    "Objective",
    "Readout",
    "Target",
    "TokenCodes",
    "resolve",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "mse": Mse,
    "contrast": Contrast,
    "decoded": Decoded,
    "greedy": Greedy,
    "next_token": NextToken,
    "readout": Readout,
    "token_codes": TokenCodes,
}
"""Maps objective names to classes."""
DEFAULT = "greedy"
"""Objective of converted networks: it learns at usual rates, starts from a model's own scores, and exports plainly."""


def resolve(objective: str | Mapping[str, Any] | Objective) -> Objective:
    """Builds an objective from its name or from ``{"name": ..., option: value}``; returns a copy of an instance, since
    each layer has its own, of which the layers share what the instance trains.

    Raises:
        ALConfigError: the name or an option is unknown, or an option is out of range.
    """
    if isinstance(objective, Objective):
        return copy.copy(objective)
    options = {"name": objective} if isinstance(objective, str) else dict(objective)
    name = options.pop("name", None)
    if name not in OBJECTIVES:
        raise ALConfigError(f"unknown objective {name!r}: use one of {', '.join(OBJECTIVES)}")
    known = list(inspect.signature(OBJECTIVES[name].__init__).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ALConfigError(f"objective {name} has no option {unknown[0]!r}: it has {', '.join(known) or 'none'}")
    return OBJECTIVES[name](**options)
