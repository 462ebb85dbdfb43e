"""Stop of training on a number that is NaN or infinite, ``"non_finite": "save_and_stop"``.

The layer leaves out its step (:mod:`ds_al.optim.skip`), and training goes on until all ranks are after the same batch;
there they save a checkpoint and raise one error. Rank 0 chooses the batch, since stages may be at different ones::

    rank r       finds a number in batch a       writes that it has
    rank 0       reads it after batch b          writes b + 1, trains batch b + 1, and stops
    all others   after every batch               read b + 1, and stop after it

No rank ends batch b + 1 without rank 0, which has written before it begins it. A joint call stops as well: all ranks
make it after the same batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import Store

from ds_al.config.base import BLOCK
from ds_al.errors import ALCheckpointError, ALConfigError, ALLayerError
from ds_al.parallel import meetings, presence, store

_PATIENCE = 60.0  # seconds within which a rank reaches the store of the job
_engines = itertools.count()  # every rank makes its engines in the same order


class SaveAndStop:
    """Stops all ranks of an engine after the same batch.

    Args:
        save: saves a checkpoint on all ranks, and returns its path.

    Raises:
        ALConfigError: the ranks did not meet in a TCP store.
    """

    def __init__(self, save: Callable[[], str | Path]) -> None:
        here = presence.here()
        self.save = save
        self._rank, self._batch = here.rank, 0
        self._store: Store | None = None
        if here.world > 1:
            self._store = store.connect_group(f"non_finite/{next(_engines)}", seconds=_PATIENCE)
            if self._store is None:
                raise ALConfigError(
                    f'"{BLOCK}.non_finite": got "save_and_stop" for ranks that met without a TCP store, through which '
                    'they agree on a batch: use init_method="env://" or "tcp://...", or "raise"'
                )
        self._begin(0)

    def _begin(self, stops: int) -> None:
        """Begins the search for the next number, after so many stops."""
        self._stops, self._at = stops, 0
        self._first: tuple[int, int, str] | None = None
        self._told = False

    def found(self, micro_batch: int, layer: int, text: str) -> None:
        """Remembers the first number that a layer of this stage has met.

        Args:
            micro_batch: number of the micro-batch.
            layer: index of the layer.
            text: names both, and what holds the number.
        """
        self._first = self._first or (micro_batch, layer, text)

    def after_batch(self) -> None:
        """Called after every batch.

        Raises:
            ALLayerError: on all ranks, after the same batch: a rank has found a number.
        """
        self._batch += 1
        if self._is_last():
            self._stop()

    def settle(self) -> None:
        """Ends this rank where it has found a number of which the others have not learned.

        Raises:
            ALLayerError: it has; nothing is saved.
        """
        if self._first is not None:
            raise ALLayerError(f"{self._first[2]}. No layer stepped on it; nothing is saved: the other ranks go on")

    def call(self, method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Makes a joint call, unless a rank has found a number.

        Raises:
            ALLayerError: on all ranks: one has.
        """
        if any(meetings.gather(self._first)):
            self._stop()
        return method(*args, **options)

    def _is_last(self) -> bool:
        if self._store is None:
            return self._first is not None
        found, at = f"{self._stops}/found", f"{self._stops}/at"
        if self._first is not None and not self._told:
            self._store.set(found, "")
            self._told = True
        if not self._at:
            if self._rank == 0 and self._store.check([found]):
                self._store.set(at, str(self._batch + 1))
            if self._store.check([at]):
                self._at = int(self._store.get(at))
        return self._batch == self._at

    def _stop(self) -> None:
        """Saves, and raises the error of the first micro-batch, and of its first layer."""
        _, _, text = min(first for first in meetings.gather(self._first) if first is not None)
        self._begin(self._stops + 1)
        text = f"{text}. No layer stepped on such a number"
        try:
            saved = self.save()
        except ALCheckpointError as error:
            raise ALLayerError(
                f"{text}; all ranks stop after batch {self._batch}, and could not save: {error}"
            ) from error
        raise ALLayerError(f"{text}; all ranks stop after batch {self._batch}, whose checkpoint is {str(saved)!r}")
