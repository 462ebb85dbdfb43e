"""Weights that rest at the start, while others train: pretrained ones until new ones beside them have learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def mark_pretrained(module: nn.Module) -> None:
    """Marks a module and all in it as trained before; copies and parts of it are marked, too."""
    for each in module.modules():
        each.pretrained = True  # type: ignore[assignment]


def pretrained_weights(network: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the weights of all marked modules."""
    for each in network.modules():
        if getattr(each, "pretrained", False):
            yield from each.parameters(recurse=False)


class Held:
    """Holds pretrained weights until a number of samples.

    The number decides alone, so a run that is resumed holds what the whole run held, and stages need no agreement. A
    weight that rests has no gradient: neither its moments nor its count of steps change, and no backward runs through
    a function all of whose weights rest.

    Args:
        modules: layers whose marked weights rest; those that are frozen before the first batch stay frozen.
        samples: number of samples after which they train.
    """

    def __init__(self, modules: Iterable[nn.Module], *, samples: int) -> None:
        self._weights = [w for module in modules for w in pretrained_weights(module) if w.requires_grad]
        self._samples = samples
        self._rest = False

    def before_batch(self, trained: int) -> None:
        """Lets the weights rest or train in the next batch.

        Args:
            trained: number of samples of all batches before it.
        """
        rest = trained < self._samples
        if rest == self._rest:
            return
        if rest:  # what the user has frozen since stays frozen
            self._weights = [weight for weight in self._weights if weight.requires_grad]
        self._rest = rest
        for weight in self._weights:
            weight.requires_grad_(not rest)
