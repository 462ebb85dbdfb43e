"""Lends tensors to the functions of a layer, which may write on what they are given.

Neighbouring layers, the two losses of a layer and the user's own data share tensors. A function that works in place
(``nn.ReLU(inplace=True)`` at its start, ``x += positions``) gets copies, so that no other reader sees what it writes,
whatever the partition is. A function that only reads gets the tensors themselves::

    calls 1 .. 8    copies; the version counters of the copies tell whether the function writes
    later calls     copies if it has written before, else the tensors themselves

A block that checkpoints itself in the reentrant form (``torch.utils.checkpoint``, ``deepspeed.checkpointing``) computes
no gradients unless one of its inputs requires a gradient, and the input of an AL layer requires none. In the first call
with gradients the lent tensors therefore require one; later they do where the graph of that call has such a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.errors import ALLayerError
from ds_al.tensors import Activation

FIRST_CALLS = 8
"""Number of calls in which a function gets copies, whether it writes or not."""


class Lender:
    """Calls one function in one mode (training or evaluation).

    Args:
        name: what the function is called in errors.
        module: module whose blocks may checkpoint themselves; ``None`` where that does not matter.
        always_copies: give copies in every call, for a function that writes at times only.
    """

    def __init__(self, name: str, *, module: nn.Module | None = None, always_copies: bool = False) -> None:
        self._name = name
        self._module = module
        self._copies = always_copies
        self._asks: bool | None = None if module is not None else False
        self._calls = 0

    def __call__(self, function: Callable[..., Any], *given: Activation, again: bool = False) -> Any:
        """Returns ``function(*given)``, and leaves ``given`` as it is.

        Args:
            again: whether this repeats the call before, which has told whether the function writes.

        Raises:
            ALLayerError: a function that had written in none of its first calls has written on ``given``.
        """
        asks = torch.is_grad_enabled() and (self._asks is True or self._may_ask())
        copies = self._copies or (self._calls < FIRST_CALLS and not again)
        lent = tuple(_each(each, asks=asks, copies=copies) for each in given) if asks or copies else given
        versions = _versions(lent)
        result = function(*lent)
        if _versions(lent) != versions:
            if not copies:
                raise ALLayerError(
                    f"{self._name} changed its input in place, which it did in none of its first {FIRST_CALLS} calls, "
                    'so that others who read this input got changed values. Work out of place, or set "copy_inputs" in '
                    '"associated_learning": it then gets copies in every call'
                )
            self._copies = True
        if asks and self._asks is None:
            self._asks = checkpoints_itself(result)
        self._calls += not again
        return result

    def _may_ask(self) -> bool:
        """Whether it is unknown if the module checkpoints itself, and matters: it has trained weights. A compiled
        module contains no reentrant form."""
        if self._asks is not None or self._module is None or getattr(self._module, "_compiled_call_impl", None):
            return False
        return any(parameter.requires_grad for parameter in self._module.parameters())


def checkpoints_itself(outputs: Any) -> bool:
    """Whether the graph of these outputs has a node of a checkpoint function in the reentrant form."""
    found: set[Any] = set()
    nodes = [part.grad_fn for part in _parts(outputs) if isinstance(part, Tensor) and part.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if "Checkpoint" in type(node).__name__:
            return True
        new = [parent for parent, _ in node.next_functions if parent is not None and parent not in found]
        found.update(new)
        nodes += new
    return False


def _each(given: Activation, *, asks: bool, copies: bool) -> Activation:
    if isinstance(given, Tensor):
        return _lent(given, asks=asks, copies=copies)
    return tuple(_lent(part, asks=asks, copies=copies) for part in given)


def _lent(tensor: Tensor, *, asks: bool, copies: bool) -> Tensor:
    if asks and not tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.detach().requires_grad_()
    return tensor.clone() if copies else tensor


def _versions(lent: tuple[Activation, ...]) -> list[int]:
    return [part._version for each in lent for part in _parts(each)]


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
