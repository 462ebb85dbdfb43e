"""The global random number generators of this process: those of torch, Python and numpy, which belong to the user.

Layers draw from the same generators, with a seed per layer and micro-batch. While an engine computes, the states that
the user left are set aside; his own code inside (an iterator, a transform, a function of batches) draws from them, and
they are back when the call ends::

    with generators.aside():           train_batch, evaluate, predict, a constructor
        with generators.restored():    the next micro-batch of the user's iterator
            ...

Hence his draws depend on his seed, and not on the layers of a stage. Torch's generators take microseconds. Python's and
numpy's take longer, and are set aside and seeded only as long as it is not known that no layer draws from them: the
first micro-batches tell.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_WATCHED = 16  # forward and backward passes of a stage


class Generators:
    """States of the user's generators while layers draw."""

    def __init__(self) -> None:
        self._users: Any = None
        self._passes = 0
        self._drawn = False
        self._mark: Any = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Sets the user's states aside, and restores them at the end."""
        outer, self._users = self._users, self._states()
        try:
            yield
        finally:
            self._compare()
            _restore(self._users)
            self._users = outer

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Lets the user's code draw from his generators inside :meth:`aside`."""
        assert self._users is not None
        self._compare()
        _restore(self._users)
        try:
            yield
        finally:
            self._users = self._states()

    def seed_host(self) -> None:
        """Seeds Python's and numpy's generators with the seed of torch's, if layers may draw from them."""
        self._compare()
        if self._layers_may_draw:
            seed = torch.default_generator.initial_seed() & 0xFFFFFFFF  # what numpy takes
            random.seed(seed)
            np.random.seed(seed)
            self._mark = _host_states() if self._passes < _WATCHED else None

    def after_pass(self) -> None:
        """Ends a forward or backward pass of a stage: the first ones tell whether layers draw."""
        self._compare()
        self._passes += 1

    @property
    def watched(self) -> tuple[int, bool]:
        """Number of passes so far, and whether a layer drew in one of them; set in a process that continues."""
        return self._passes, self._drawn

    @watched.setter
    def watched(self, seen: tuple[int, bool]) -> None:
        self._passes, self._drawn = seen

    @property
    def layers_drew(self) -> bool:
        """Whether a layer is known to have drawn from Python's or numpy's generator."""
        return self._drawn

    @property
    def _layers_may_draw(self) -> bool:
        """Whether layers draw from Python's or numpy's generator, or it is not known yet."""
        return self._drawn or self._passes < _WATCHED

    def _compare(self) -> None:
        if self._mark is not None:
            self._drawn = self._drawn or _host_states() != self._mark
            self._mark = None

    def _states(self) -> tuple[Any, ...]:
        on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        host = _host_states() if self._layers_may_draw else None
        return torch.default_generator.get_state(), on_device, host


def _host_states() -> tuple[Any, ...]:
    state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = state
    return random.getstate(), (kind, keys.tobytes(), *rest)


def _restore(states: tuple[Any, ...]) -> None:
    on_cpu, on_device, host = states
    torch.default_generator.set_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device)
    if host is not None:
        python, (kind, keys, *rest) = host
        random.setstate(python)
        np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
