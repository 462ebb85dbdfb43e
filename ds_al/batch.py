"""Batch preparation on the first stage: checks a micro-batch, moves it to the device, and encodes its labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_al.errors import ALDataError
from ds_al.objectives import Objective
from ds_al.objectives.per_token import IGNORED
from ds_al.tensors import Activation, Target


class BatchPreparation:
    """Converts ``(x, labels)`` to the input ``(s_0, t_0)`` of the first layer.

    Args:
        objective: defines ``t_0``.
        num_classes: V; labels are integers in 0..V-1.
        micro_batch_size: expected number of samples.
        device: where the stage computes.
        check: also check values; otherwise only structure and shapes are checked.
        dynamic_shape: shapes may change from one micro-batch to the next.
        dtype: floating-point inputs are cast to it; ``None`` leaves them unchanged.
        check_input: checks x of the network, with the values, before it is moved to the device.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        num_classes: int,
        micro_batch_size: int,
        device: torch.device,
        check: bool,
        dynamic_shape: bool,
        dtype: torch.dtype | None = None,
        check_input: Callable[[Activation], None] | None = None,
    ) -> None:
        self.objective = objective
        self.num_classes = num_classes
        self.micro_batch_size = micro_batch_size
        self.device = device
        self.check = check
        self.dynamic_shape = dynamic_shape
        self.dtype = dtype
        self.check_input = check_input
        self._shapes: list[torch.Size] | None = None

    def reset_shape(self) -> None:
        """Accepts a new shape from the next micro-batch on."""
        self._shapes = None

    def __call__(self, batch: Any) -> tuple[Activation, Target]:
        """Returns ``s_0`` and ``t_0`` of a training micro-batch.

        Raises:
            ALDataError: no batch, another structure, size, shape, label type or range, or NaN in an input.
        """
        x, labels = self.split(batch)
        parts = x if isinstance(x, tuple) else (x,)
        if not self.dynamic_shape:
            self._check_shape([part.shape for part in parts])
        arrived = tuple(self.cast(self.to_device(part)) for part in parts)
        labels = self.to_device(labels.to(torch.int64))
        one_hot = self.cast(self.compared(labels))
        return (arrived if isinstance(x, tuple) else arrived[0]), self.objective.first_target(labels, one_hot)

    def cast(self, tensor: Tensor) -> Tensor:
        """Casts a floating-point tensor to the dtype in which the layers compute."""
        return tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(self.dtype)

    def to_device(self, tensor: Tensor) -> Tensor:
        """Moves a tensor to the device; for a GPU through pinned memory, so that the host does not wait."""
        if tensor.device == self.device:
            return tensor
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def on_device(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Moves modules to the device, in the precision that layers compute in."""
        return [module.to(self.device, self.dtype) for module in modules]

    def split(self, batch: Any) -> tuple[Activation, Tensor]:
        """Checks ``(x, labels)`` of any batch size, and returns it with ``x`` as a tensor or a tuple."""
        if batch is None:
            raise ALDataError(
                "the first stage has no data: pass an iterator to train_batch(), or training_data to initialize()"
            )
        if isinstance(batch, Mapping):
            raise ALDataError(
                f"got a micro-batch that is a {type(batch).__name__} of {', '.join(map(str, batch))}: expected (x, "
                "labels); engine.set_batch_fn(ds_al.convert.batch_fn) makes it of a batch of transformers, a function "
                "of your own of any other"
            )
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ALDataError(f"got a micro-batch that is {_describe(batch)}: expected (x, labels)")
        x, labels = batch
        x = tuple(x) if isinstance(x, list) else x
        parts = x if isinstance(x, tuple) else (x,)
        if not all(isinstance(part, Tensor) for part in (*parts, labels)):
            raise ALDataError(f"got x {_describe(x)} and labels {_describe(labels)}: expected tensors")
        if type(x) is not tuple and isinstance(x, tuple):
            raise ALDataError(
                f"got x as a NamedTuple {type(x).__name__}: layers receive plain tuples, on whichever stage they are; "
                "pass tuple(x)"
            )
        if unusable := [part for part in (*parts, labels) if part.layout is not torch.strided or part.is_meta]:
            kind = "on the meta device" if unusable[0].is_meta else f"of layout {unusable[0].layout}"
            raise ALDataError(f"got a tensor {kind} in a micro-batch: expected dense tensors with values: x.to_dense()")
        per_token = self.objective.per_token
        if labels.ndim != 1 + per_token or any(part.shape[:1] != labels.shape[:1] for part in parts):
            shapes, wanted = [tuple(part.shape) for part in parts], "(B, T)" if per_token else "(B,)"
            raise ALDataError(f"got x of {shapes} and labels of {tuple(labels.shape)}: expected (B, ...) and {wanted}")
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            raise ALDataError(
                f"got labels of {labels.dtype}: expected integer class numbers; use labels.long() if they are whole"
            )
        plain, labels = tuple(map(_plain, parts)), _plain(labels)
        x = plain if isinstance(x, tuple) else plain[0]
        if self.check:
            self._check_values(plain, labels)
            if self.check_input is not None:
                self.check_input(x)
        return x, labels

    def compared(self, labels: Tensor) -> Tensor:
        """Returns the targets of scores: labels ``(B,)`` as one-hot floats ``(B, V)`` on the device. Labels of tokens
        stay integers, since a vocabulary is too large for one-hot vectors."""
        labels = self.to_device(labels.to(torch.int64))
        if self.objective.per_token:
            return labels
        zeros = torch.zeros(len(labels), self.num_classes, device=self.device)
        return zeros.scatter_(1, labels.unsqueeze(1), 1.0)

    def no_labels(self, samples: int) -> Tensor:
        """Returns placeholder labels for inputs that are only scored."""
        return torch.zeros((samples, 0) if self.objective.per_token else (samples,), dtype=torch.int64)

    def _check_shape(self, shapes: list[torch.Size]) -> None:
        if self._shapes is None:
            if shapes[0][0] != self.micro_batch_size:
                raise ALDataError(
                    f"got a micro-batch of {shapes[0][0]} samples: expected {self.micro_batch_size} "
                    '("train_micro_batch_size_per_gpu"); drop the incomplete last one'
                )
            self._shapes = shapes
        elif shapes != self._shapes:
            raise ALDataError(
                f"the shape of micro-batches changed from {[tuple(s) for s in self._shapes]} to "
                f"{[tuple(s) for s in shapes]}: keep it, call engine.reset_activation_shape() on every rank when it "
                "changes, or build the module with dynamic_shape=True"
            )

    def _check_values(self, parts: tuple[Tensor, ...], labels: Tensor) -> None:
        if self.objective.per_token:
            labels = labels[labels != IGNORED]
        if labels.numel():
            low, high = (int(value) for value in torch.aminmax(labels))
            if low < 0 or high >= self.num_classes:
                raise ALDataError(
                    f"got labels from {low} to {high}: expected 0..{self.num_classes - 1}, since "
                    f"num_classes={self.num_classes}"
                )
        for part in parts:
            # Any NaN or infinite value shows in the sum, which is cheap; a sum may also overflow, so look again.
            if part.is_floating_point() and not math.isfinite(part.sum()) and not torch.isfinite(part).all():
                count = int((~torch.isfinite(part)).sum())
                raise ALDataError(
                    f"{count} values of an input are NaN or infinite: clean the data, or look at the transform"
                )


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without a graph of the user's, and as one that can be trained on if ``torch.inference_mode`` made
    it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach() if tensor.requires_grad else tensor


def input_check(layers: Sequence[tuple[int, Any]]) -> Callable[[Activation], None] | None:
    """Returns the function by which a part of the first layer checks x, if ``layers`` has that layer and it has one."""
    parts: Iterator[Any] = (part for index, layer in layers if index == 0 for part in layer.f.modules())
    return next((part.check_network_input for part in parts if hasattr(part, "check_network_input")), None)


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
