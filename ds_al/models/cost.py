"""FLOP and parameter counts of f, b, g and h of every AL layer, and of the backprop twin.

FLOPs are those counted by ``torch.utils.flop_counter``, forward and backward: matrix products, convolutions and
attention, where a multiply-add counts as two. Element-wise operations, norms, losses and optimizers are not counted.
Modules are built and run on torch's meta device, so counting allocates no memory and computes nothing; a network whose
operations depend on values (an LSTM packs by lengths) is run on two real samples instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ds_al.errors import ALError, ALLayerError
from ds_al.layer import ALLayer
from ds_al.models import build_al, build_twin
from ds_al.spec import ALLayerSpec
from ds_al.tensors import Activation

Result = TypeVar("Result")

_REAL_BATCH = 2  # batch norm cannot train on a single sample


@dataclass(frozen=True)
class Cost:
    """Cost of one function, or of a whole network.

    Attributes:
        flops: operations of the forward and backward pass, per sample.
        parameters: number of parameters.
    """

    flops: int = 0
    parameters: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.parameters + other.parameters)


@dataclass(frozen=True)
class LayerCost:
    """Cost of one AL layer, by function. ``b`` includes the layer's ``reduce``."""

    f: Cost
    b: Cost
    g: Cost
    h: Cost

    @property
    def total(self) -> Cost:
        """Cost of all four functions."""
        return sum((getattr(self, field.name) for field in fields(self)), Cost())


@dataclass(frozen=True)
class NetworkCost:
    """Cost of both forms of a network.

    Attributes:
        layers: cost of each AL layer.
        twin: cost of the whole backprop twin.
    """

    layers: tuple[LayerCost, ...]
    twin: Cost

    @property
    def al(self) -> Cost:
        """Cost of the whole AL form."""
        return sum((layer.total for layer in self.layers), Cost())

    @property
    def rho(self) -> float:
        """FLOPs of the AL form divided by those of its twin.

        Raises:
            ALLayerError: none of the twin's operations is counted.
        """
        if not self.twin.flops:
            raise ALLayerError("the twin has no operation that torch's counter counts, so rho is undefined")
        return self.al.flops / self.twin.flops

    @property
    def bridge_share(self) -> float:
        """FLOPs of all bridges divided by those of the twin: the bridges' part of :attr:`rho`.

        Raises:
            ALLayerError: none of the twin's operations is counted.
        """
        return self.rho * self.flops()["b"] / self.al.flops

    def flops(self) -> dict[str, int]:
        """Returns the FLOPs per sample of f, b, g and h, each summed over all layers, and of the twin."""
        return {key: cost.flops for key, cost in self._parts().items()}

    def parameters(self) -> dict[str, int]:
        """Returns the parameter counts of f, b, g and h, each summed over all layers, and of the twin."""
        return {key: cost.parameters for key, cost in self._parts().items()}

    def _parts(self) -> dict[str, Cost]:
        own = {key: sum((getattr(layer, key) for layer in self.layers), Cost()) for key in "fbgh"}
        return {**own, "twin": self.twin}


def network_cost(
    al: Sequence[ALLayerSpec],
    twin: Sequence[LayerSpec],
    *,
    shape: Sequence[int],
    num_classes: int,
    dtype: torch.dtype = torch.float32,
) -> NetworkCost:
    """Counts FLOPs and parameters of both forms of a network. torch's random state is preserved.

    Args:
        al: specs from :func:`~ds_al.models.build_al`.
        twin: specs from :func:`~ds_al.models.build_twin` with the same options.
        shape: shape of one micro-batch of x: images ``(B, C, H, W)``, token ids ``(B, T)``.
        num_classes: V; the input of the first g is one-hot labels ``(B, V)``.
        dtype: dtype of x; ``torch.int64`` for token ids.
    Raises:
        ALLayerError: the network runs neither on the meta device nor on two real samples.
    """
    return counted(
        lambda shape, device: _count(al, twin, shape=shape, num_classes=num_classes, dtype=dtype, device=device),
        shape=shape,
        dtype=dtype,
    )


def model_cost(name: str, *, shape: Sequence[int], dtype: torch.dtype = torch.float32, **options: Any) -> NetworkCost:
    """Counts FLOPs and parameters of both forms of a model, given its name and options; see :func:`network_cost`.

    Args:
        name: a key of :data:`~ds_al.models.AL_MODELS`.
        shape, dtype: shape and dtype of one micro-batch of x.
        options: options of :func:`~ds_al.models.build_al`, including a preset.
    """
    al, twin = build_al(name, **options), build_twin(name, **options)
    return network_cost(al, twin, shape=shape, num_classes=options["num_classes"], dtype=dtype)


def counted(count: Callable[[Sequence[int], str], Result], *, shape: Sequence[int], dtype: torch.dtype) -> Result:
    """Returns ``count(shape, device)`` on the meta device or, if an operation needs values, on two real samples.

    Raises:
        ALLayerError: the count fails on both.
    """
    try:
        return count(shape, "meta")
    except Exception:  # operations that need values raise various exceptions
        shape = (_REAL_BATCH, *shape[1:])
    try:
        return count(shape, "cpu")
    except ALError:
        raise
    except Exception as error:
        raise ALLayerError(
            f"the network does not run on x of shape {tuple(shape)}, {dtype}, so its cost cannot be counted: "
            f"{type(error).__name__}: {error}"
        ) from error


def _count(
    al: Sequence[ALLayerSpec],
    twin: Sequence[LayerSpec],
    *,
    shape: Sequence[int],
    num_classes: int,
    dtype: torch.dtype,
    device: str,
) -> NetworkCost:
    with isolated(device):
        # Ids are 1, because 0 is usually padding and a sequence of padding alone costs less.
        x, t = torch.ones(*shape, dtype=dtype), torch.ones(shape[0], num_classes)
        s: Activation = x
        layers = []
        for spec in al:
            cost, s, t = _layer(spec.build(), s, t)
            layers.append(cost)
        modules = [spec.build() for spec in twin]

        def chain() -> Activation:
            value: Activation = x
            for module in modules:
                value = module(value)
            return value

        flops, outputs = forward_flops(chain)
        flops += _backward(outputs)
    return NetworkCost(tuple(layers), Cost(flops // shape[0], _parameters(modules)))


@contextmanager
def isolated(device: str) -> Iterator[None]:
    """Creates tensors on a device, ``"meta"`` or ``"cpu"``, and restores all global state on exit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about devices missing on this machine
        with (
            torch.backends.mkldnn.flags(enabled=False),  # oneDNN's LSTM is one operation unknown to torch's counter
            torch.random.fork_rng(devices=[]),
            torch.device(device),
            torch.enable_grad(),
        ):
            yield


def _layer(layer: ALLayer, s: Activation, t: Tensor) -> tuple[LayerCost, Activation, Tensor]:
    """Returns the costs of a layer and its detached outputs.

    The graph is cut after f and after g, so that each function is counted separately; gradients are passed across the
    cut, so the backward passes are those of training.
    """
    batch = t.shape[0]
    f, s_out = forward_flops(lambda: layer.f(s))
    s_cut = _leaves(s_out)
    b, code = forward_flops(lambda: layer.bridge(s_cut))
    b += _backward(code)
    f += _backward(s_out, s_cut)
    if layer.objective.trains_decoder:  # there is no target side: the input of h is the bridge's output
        g, t_out, t_cut = 0, t, _leaves(code)
    else:
        g, t_out = forward_flops(lambda: layer.g(t))
        t_cut = _leaves(t_out)
    h, back = forward_flops(lambda: layer.h(t_cut))
    h += _backward(back)
    if not layer.objective.trains_decoder:
        g += _backward(t_out, t_cut)
    reads = [layer.b, layer.reduce] if isinstance(layer.reduce, nn.Module) else [layer.b]
    cost = LayerCost(
        f=Cost(f // batch, _parameters([layer.f])),
        b=Cost(b // batch, _parameters(reads)),
        g=Cost(g // batch, _parameters([layer.g])),
        h=Cost(h // batch, _parameters([layer.h])),
    )
    detached = s_cut.detach() if isinstance(s_cut, Tensor) else tuple(part.detach() for part in s_cut)
    return cost, detached, t_out.detach()


def forward_flops(function: Callable[[], Any]) -> tuple[int, Any]:
    """Returns the FLOPs of a call, and its result."""
    with FlopCounterMode(display=False) as counter:
        value = function()
    return counter.get_total_flops(), value


def _backward(outputs: Activation, cut: Activation | None = None) -> int:
    """Returns the FLOPs of the backward pass from ``outputs``, starting with the gradients of ``cut``, or with ones."""
    pairs = []
    for output, leaf in zip(_tensors(outputs), _tensors(outputs if cut is None else cut), strict=True):
        gradient = torch.ones_like(output) if cut is None else leaf.grad
        if output.requires_grad and gradient is not None:
            pairs.append((output, gradient))
    if not pairs:
        return 0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
    return counter.get_total_flops()


def _leaves(s: Activation) -> Activation:
    """Returns detached leaf copies that accumulate gradients."""
    if isinstance(s, Tensor):
        return s.detach().requires_grad_(s.is_floating_point())
    return tuple(part.detach().requires_grad_(part.is_floating_point()) for part in s)


def _tensors(s: Activation) -> tuple[Tensor, ...]:
    return (s,) if isinstance(s, Tensor) else s


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
