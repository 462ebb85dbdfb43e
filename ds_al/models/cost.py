"""What a network costs: floating-point operations and parameters of f, b, g, h of every AL layer, and of the twin.

Operations are those that ``torch.utils.flop_counter`` counts, forward and backward: matrix products, convolutions
and attention, a multiplication and an addition as two. Element-wise work, norms, losses and optimizers are
left out. Modules are built and run on torch's meta device, which has shapes but no values, so that counting takes
neither memory nor time; a network that needs values (an LSTM packs by lengths) is run on two real samples instead.
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

_REAL_BATCH = 2  # batch norm refuses to train on a single sample


@dataclass(frozen=True)
class Cost:
    """Of one function, or of a whole network.

    Attributes:
        flops: operations of a forward and its backward, per sample.
        parameters: number of parameters.
    """

    flops: int = 0
    parameters: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.parameters + other.parameters)


@dataclass(frozen=True)
class LayerCost:
    """Of one AL layer, function by function. ``b`` counts the layer's ``reduce``, too."""

    f: Cost
    b: Cost
    g: Cost
    h: Cost

    @property
    def total(self) -> Cost:
        """All four functions."""
        return sum((getattr(self, field.name) for field in fields(self)), Cost())


@dataclass(frozen=True)
class NetworkCost:
    """Of both forms of a network.

    Attributes:
        layers: of each AL layer.
        twin: of the backprop twin, as a whole.
    """

    layers: tuple[LayerCost, ...]
    twin: Cost

    @property
    def al(self) -> Cost:
        """The AL form as a whole."""
        return sum((layer.total for layer in self.layers), Cost())

    @property
    def rho(self) -> float:
        """Operations of the AL form over those of its twin.

        Raises:
            ALLayerError: the twin has no operation that is counted.
        """
        if not self.twin.flops:
            raise ALLayerError("the twin has no operation that torch's counter counts, so rho is undefined")
        return self.al.flops / self.twin.flops

    @property
    def bridge_share(self) -> float:
        """Operations of all bridges over those of the twin: the part of :attr:`rho` that bridges are.

        Raises:
            ALLayerError: the twin has no operation that is counted.
        """
        return self.rho * self.flops()["b"] / self.al.flops

    def flops(self) -> dict[str, int]:
        """Operations per sample of f, b, g and h, each over all layers, and of the twin."""
        return {key: cost.flops for key, cost in self._parts().items()}

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters of f, b, g and h, each over all layers, and of the twin."""
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
    """Counts what both forms of a network cost. Leaves torch's random state as it is.

    Args:
        al: what :func:`~ds_al.models.build_al` returns.
        twin: what :func:`~ds_al.models.build_twin` returns for the same options.
        shape: of one micro-batch of x: images ``(B, C, H, W)``, token ids ``(B, T)``.
        num_classes: V; the first g reads one-hot labels ``(B, V)``.
        dtype: of x; ``torch.int64`` for token ids.

    Raises:
        ALLayerError: the network runs neither on the meta device nor on two real samples.
    """
    return counted(
        lambda shape, device: _count(al, twin, shape=shape, num_classes=num_classes, dtype=dtype, device=device),
        shape=shape,
        dtype=dtype,
    )


def model_cost(name: str, *, shape: Sequence[int], dtype: torch.dtype = torch.float32, **options: Any) -> NetworkCost:
    """Counts what both forms of a model cost, by its name and options: :func:`network_cost`.

    Args:
        name: a key of :data:`~ds_al.models.AL_MODELS`.
        shape, dtype: of one micro-batch of x.
        options: those of :func:`~ds_al.models.build_al`, a preset among them.
    """
    al, twin = build_al(name, **options), build_twin(name, **options)
    return network_cost(al, twin, shape=shape, num_classes=options["num_classes"], dtype=dtype)


def counted(count: Callable[[Sequence[int], str], Result], *, shape: Sequence[int], dtype: torch.dtype) -> Result:
    """What ``count(shape, device)`` finds on the meta device or, where operations need values, on two real samples.

    Raises:
        ALLayerError: it fails on both.
    """
    try:
        return count(shape, "meta")
    except Exception:  # whatever an operation raises that needs values
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
        # Ids of 1: an id of 0 is padding as a rule, and a sequence of padding alone costs less.
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
    """Makes tensors on a device, ``"meta"`` or ``"cpu"``, and leaves nothing behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of devices that this machine does not have
        with (
            torch.backends.mkldnn.flags(enabled=False),  # its LSTM is one operation that torch's counter does not know
            torch.random.fork_rng(devices=[]),
            torch.device(device),
            torch.enable_grad(),
        ):
            yield


def _layer(layer: ALLayer, s: Activation, t: Tensor) -> tuple[LayerCost, Activation, Tensor]:
    """Costs of a layer, and its outputs without graph.

    The graph is cut behind f and behind g, so that each function is counted alone; gradients cross the cut, so
    that the backward passes are the very ones of training.
    """
    batch = t.shape[0]
    f, s_out = forward_flops(lambda: layer.f(s))
    s_cut = _leaves(s_out)
    b, code = forward_flops(lambda: layer.bridge(s_cut))
    b += _backward(code)
    f += _backward(s_out, s_cut)
    if layer.objective.trains_decoder:  # there is no target side: h reads the bridge
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
    """Operations of a call, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        value = function()
    return counter.get_total_flops(), value


def _backward(outputs: Activation, cut: Activation | None = None) -> int:
    """Operations of the backward pass from some outputs, with the gradients that reached ``cut``, or ones."""
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
    """Copies without graph that gather gradients."""
    if isinstance(s, Tensor):
        return s.detach().requires_grad_(s.is_floating_point())
    return tuple(part.detach().requires_grad_(part.is_floating_point()) for part in s)


def _tensors(s: Activation) -> tuple[Tensor, ...]:
    return (s,) if isinstance(s, Tensor) else s


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
