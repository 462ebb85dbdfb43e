"""Splitting of a backward pass into gradients of inputs, now, and gradients of weights, later.

Inside :class:`SplitBackward`, calls of ``linear`` and of convolutions on trained weights are replaced by functions of
the same result, whose backward pass computes the gradient of the input and queues the computation of those of weight
and bias. Layers of other kinds, such as norms and embeddings, and calls inside ``nn.MultiheadAttention`` and
recomputed blocks are not split: all their gradients are computed in the first part. No operation runs twice, and
gradients have the bits of the unsplit pass where a kernel computes both gradients independently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class QueuedGradients:
    """Gradients of weights that are still to be computed."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] = []

    def __len__(self) -> int:
        """Number of calls whose weight gradients are queued."""
        return len(self._queue)

    def add(self, compute: Callable[[], Sequence[tuple[Tensor, Tensor]]]) -> None:
        """Queues a computation of ``(weight, gradient)`` pairs."""

        def run() -> None:
            for weight, gradient in compute():
                _accumulate(weight, gradient)

        self._queue.append(run)

    @torch.no_grad()
    def compute(self) -> None:
        """Computes all queued gradients and adds them to ``weight.grad``."""
        queue, self._queue = self._queue, []
        for run in queue:
            run()


_QUEUE: ContextVar[QueuedGradients | None] = ContextVar("queue", default=None)


def weight_queue() -> QueuedGradients | None:
    """Returns where an autograd function of one's own may queue the gradients of its weights.

    Called in the function's forward pass; ``None`` where the backward pass is not split. Weights whose gradients are
    queued must not be inputs of the function.
    """
    return _QUEUE.get()


def _accumulate(weight: Tensor, gradient: Tensor) -> None:
    """Does what autograd does at a leaf: a gradient has the strides of its weight, and hooks run after accumulation."""
    if weight.grad is None:
        same = gradient.stride() == weight.stride()
        weight.grad = gradient if same else torch.empty_like(weight).copy_(gradient)  # fused optimizers go by memory
    else:
        weight.grad += gradient
    for hook in (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(weight)


class SplitBackward(TorchFunctionMode):
    """Context of a forward pass whose backward pass is split.

    Args:
        queue: receives the gradients of weights during the backward pass.
    """

    def __init__(self, queue: QueuedGradients) -> None:
        super().__init__()
        self.queue = queue

    def __enter__(self) -> Any:
        self._token = _QUEUE.set(self.queue)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        _QUEUE.reset(self._token)
        return super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces a call that can be split."""
        kwargs = kwargs or {}
        split = _SPLIT.get(func)
        if split is not None and torch.is_grad_enabled():
            call = split(*args, **kwargs)
            if call is not None:
                return call(self.queue)
        return func(*args, **kwargs)


Call = Callable[[QueuedGradients], Tensor]


def _can_split(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the input needs a gradient, and weight and bias are leaves that autograd would accumulate into."""
    leaves = [weight] if bias is None else [weight, bias]
    return x.requires_grad and all(isinstance(leaf, nn.Parameter) and leaf.requires_grad for leaf in leaves)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    if not _can_split(input, weight, bias):
        return None
    return lambda queue: _Linear.apply(input, weight.detach(), Leaves(weight, bias), queue)  # type: ignore[no-any-return]


class Leaves(NamedTuple):
    """Weight and bias, which the graph does not see: it would call their hooks without a gradient."""

    weight: Tensor
    bias: Tensor | None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, leaves: Leaves, queue: QueuedGradients) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaves, ctx.queue = leaves, queue
        return F.linear(x, weight, leaves.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        leaves = ctx.leaves
        rows = gradient.reshape(-1, gradient.shape[-1])

        def compute() -> list[tuple[Tensor, Tensor]]:
            pairs = [(leaves.weight, rows.t().mm(x.reshape(-1, x.shape[-1])))]
            return pairs if leaves.bias is None else [*pairs, (leaves.bias, rows.sum(0))]

        ctx.queue.add(compute)
        return rows.mm(weight).view(x.shape), None, None, None


def _convolution(dims: int) -> Callable[..., Call | None]:
    def split(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Call | None:
        if isinstance(padding, str) or input.dim() != dims + 2 or not _can_split(input, weight, bias):
            return None
        stride, padding, dilation = (_each(value, dims) for value in (stride, padding, dilation))
        options = (stride, padding, dilation, False, [0] * dims, groups)
        leaves = Leaves(weight, bias)
        return lambda queue: _Convolution.apply(input, weight.detach(), leaves, options, queue)  # type: ignore[no-any-return]

    return split


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, leaves: Leaves, options: tuple[Any, ...], queue: QueuedGradients
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaves, ctx.options, ctx.queue = leaves, options, queue
        return torch.ops.aten.convolution(x, weight, leaves.bias, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        leaves, options = ctx.leaves, ctx.options
        has_bias = leaves.bias is not None

        def gradients(*mask: bool) -> Any:
            sizes = [weight.shape[0]] if has_bias else None
            return torch.ops.aten.convolution_backward(gradient, x, weight, sizes, *options, list(mask))

        def compute() -> list[tuple[Tensor, Tensor]]:
            _, of_weight, of_bias = gradients(False, True, has_bias)
            pairs = [(leaves.weight, of_weight)]
            return [*pairs, (leaves.bias, of_bias)] if has_bias else pairs

        ctx.queue.add(compute)
        return gradients(True, False, False)[0], None, None, None, None


_SPLIT: dict[Any, Callable[..., Call | None]] = {
    F.linear: _linear,
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
}
