"""Meter of a stage's activation memory: tensors that autograd saves for the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class ActivationMeter:
    """Context manager that counts the tensors saved for backward inside it, as long as they are held.

    Tensors that share a storage count once, with the bytes of that storage. After the context has ended, the counts
    still decrease when graphs are freed.

    Args:
        exclude: tensors that do not count, such as a module's parameters.
    """

    def __init__(self, *, exclude: Iterable[Tensor] = ()) -> None:
        self.current_bytes = 0
        """Bytes held now."""
        self.current_tensors = 0
        """Distinct storages held now."""
        self.peak_bytes = 0
        """Peak of :attr:`current_bytes`."""
        self.peak_tensors = 0
        """Peak of :attr:`current_tensors`."""
        self._exclude = {_storage(tensor)[0] for tensor in exclude}
        self._holders: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _Holder.unpack)

    def __enter__(self) -> ActivationMeter:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def take_peak(self) -> int:
        """Returns the peak since the last call, and resets :attr:`peak_bytes` to the bytes held now."""
        peak, self.peak_bytes = self.peak_bytes, self.current_bytes
        return peak

    def _pack(self, tensor: Tensor) -> _Holder:
        return _Holder(tensor, self)

    def _hold(self, storage: int, nbytes: int) -> None:
        self._holders[storage] += 1
        if self._holders[storage] == 1:
            self.current_bytes += nbytes
            self.current_tensors += 1
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)
            self.peak_tensors = max(self.peak_tensors, self.current_tensors)

    def _let_go(self, storage: int, nbytes: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self.current_bytes -= nbytes
            self.current_tensors -= 1


class _Holder:
    """Object that autograd keeps in place of a saved tensor; both are freed together."""

    def __init__(self, tensor: Tensor, meter: ActivationMeter) -> None:
        # An output saved by its own graph node would hold that node: a cycle. Autograd restores the history when it
        # unpacks. A leaf has none, and must remain the tensor that accumulates gradients.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.storage, self.nbytes = _storage(tensor)
        self.meter = None if not self.nbytes or self.storage in meter._exclude else meter
        if self.meter is not None:
            self.meter._hold(self.storage, self.nbytes)

    def unpack(self) -> Tensor:
        return self.tensor

    def __del__(self) -> None:
        if self.meter is not None:
            self.meter._let_go(self.storage, self.nbytes)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Returns address and bytes of a tensor's memory; a sparse one has those of its indices and values together."""
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    parts = [_storage(part) for part in _sparse_parts(tensor)]
    return (parts[-1][0], sum(nbytes for _, nbytes in parts)) if parts else (id(tensor), tensor.nbytes)


def _sparse_parts(tensor: Tensor) -> list[Tensor]:
    """Returns indices and values of a sparse tensor, values last; nothing of a tensor of a library's own layout."""
    match tensor.layout:
        case torch.sparse_coo:
            return [tensor._indices(), tensor._values()]
        case torch.sparse_csr | torch.sparse_bsr:
            return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        case torch.sparse_csc | torch.sparse_bsc:
            return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
