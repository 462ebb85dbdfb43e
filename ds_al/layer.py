"""Associated learning in plain torch: one layer, its two local losses, and inference through a stack.

    s_i = f_i(sg s_{i-1})                               f  forward: the network's own block
    t_i = g_i(sg t_{i-1})                               g  target encoder
    A_i = D_A(b_i(reduce(s_i)), sg t_i)                 b  bridge; trains f_i and b_i only
    E_i = D_E(h_i(t_i), sg t_{i-1})                     h  target decoder; trains g_i and h_i only
    exit at m   x -> f_1 .. f_m -> b_m -> h_m .. h_1    m = N is the full inference path

These are the equations of the published objective, ``mse``; other objectives define t, A, E and the exits differently
(:mod:`ds_al.objectives`). ``sg`` stops the gradient, ``s_0 = x``, ``t_0`` is the one-hot label. Source: Kao & Chen,
"Associated Learning", Neural Computation 33(1), 2021, section 3; Wu, Lin, Chen & Chen, ICLR 2022.

Shapes: ``B`` batch, ``K`` width of a target code, ``V`` classes. This module imports neither DeepSpeed nor
``torch.distributed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds_al import objectives
from ds_al.errors import ALError, ALLayerError
from ds_al.lending import Lender
from ds_al.objectives import Objective, losses
from ds_al.tensors import Activation, Target, first, to_float32


class LocalLosses(NamedTuple):
    """The two losses of one layer, each a scalar tensor. The autoencoder loss is a constant 0 where there is none."""

    associated: Tensor
    autoencoder: Tensor


class ALLayer(nn.Module):
    """One AL layer: the functions f, b, g, h and the local losses that train them.

    Args:
        f: ``s_{i-1} -> s_i``. Takes and returns an :data:`Activation`.
        b: ``reduce(s_i) -> (B, K)``, the bridge: an auxiliary head that maps the output of f into the space of codes.
        g: ``t_{i-1} -> t_i``; ``(B, V)`` one-hot labels of the default float type for the first layer,
            ``(B, K_{i-1})`` after it.
        h: ``t_i -> t_{i-1}``, the inverse of ``g``. For the first layer its output are label scores.
        objective: name, ``{"name": ..., option: value}`` or instance, see :mod:`ds_al.objectives`.
        associated_loss: name (``"mse"``, ``"cross_entropy"``) or callable ``D_A``, of the objective ``mse`` alone.
        autoencoder_loss: name or callable ``D_E``. Text models use ``"cross_entropy"`` in the first layer.
        reduce: maps ``s_i`` to the input of the bridge, a tensor or a tuple; by default the first tensor of a tuple.
        target_gradient: whether the associated loss also trains ``g``; off in the published code.
        name: shown in errors, logs and reports.

    Example:
        >>> layer = ds_al.ALLayer(f=nn.Linear(8, 16), b=nn.Linear(16, 4), g=nn.Linear(3, 4), h=nn.Linear(4, 3))
        >>> labels = nn.functional.one_hot(torch.tensor([0, 2]), 3).float()
        >>> s, t = layer(torch.randn(2, 8), labels)  # (B, D), (B, K)
        >>> losses = layer.local_losses(s, t, labels)
        >>> sum(losses).backward()
    """

    ends = True
    """Whether b, g and h are here: false for all but the last part of a layer (:mod:`ds_al.partition.part`)."""
    recomputed: Callable[[Activation], Activation] | None = None
    """Runs f in training, if set: activation checkpointing (:mod:`ds_al.compute.recompute`)."""
    copies_inputs = False
    """Whether its functions get copies of their inputs in every call, see :mod:`ds_al.lending`."""

    def __init__(
        self,
        f: nn.Module,
        b: nn.Module,
        g: nn.Module,
        h: nn.Module,
        *,
        objective: str | Mapping[str, Any] | Objective = "mse",
        associated_loss: str | losses.Loss = "mse",
        autoencoder_loss: str | losses.Loss = "mse",
        reduce: Callable[[Activation], Activation] = first,
        target_gradient: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.f, self.b, self.g, self.h = f, b, g, h
        self.objective = objectives.resolve(objective)
        self.associated_loss = losses.resolve(associated_loss)
        self.autoencoder_loss = losses.resolve(autoencoder_loss)
        self.reduce = reduce
        self.target_gradient = target_gradient
        self.name = name
        self._lenders: dict[tuple[str, bool], Lender] = {}

    def forward(self, s: Activation, t: Target) -> tuple[Activation, Target]:
        """Computes ``(s_i, t_i)``, with a graph, from inputs without one: the input of the next layer."""
        s_out, t_out = self.activation(s), self._lend("g", partial(self.objective.encode, self), t)
        self._check("g", t_out)
        return s_out, t_out

    def local_losses(self, s_out: Activation, t_out: Target, t_in: Target) -> LocalLosses:
        """Computes ``A_i`` and ``E_i`` of one micro-batch from the output of :meth:`forward` and ``t_{i-1}``."""
        associated = self._lend("the associated loss", partial(self.objective.associated_loss, self), s_out, t_out)
        autoencoder = self._lend("the autoencoder loss", partial(self.objective.autoencoder_loss, self), t_out, t_in)
        associated = to_float32(associated)  # a user's loss may return the precision of the layer
        return LocalLosses(associated, torch.zeros_like(associated) if autoencoder is None else to_float32(autoencoder))

    def activation(self, s: Activation) -> Activation:
        """Computes ``s_i`` from ``s_{i-1}``, which stays as it is even if f works in place.

        Raises:
            ALLayerError: f returned something other than tensors that can be sent.
        """
        recomputes = self.recomputed is not None and self.training
        s_out = self.recomputed(s) if recomputes else self._lend("f", self.f, s)  # type: ignore[misc]
        self._check("f", s_out)
        return s_out

    def codes(self, table: Tensor) -> Tensor:
        """Computes ``g(table)``: the codes of all classes ``(V, K)`` after this layer."""
        return self._lend("g", self.g, table)

    def scores(self, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Computes the label scores ``(B, V)`` of the exit after this layer, see :meth:`Objective.scores`."""
        return self._lend("the exit", partial(self.objective.scores, self, earlier=earlier, table=table), s)

    def bridge(self, s: Activation) -> Tensor:
        """Returns ``b_i(reduce(s_i))``, the predicted target code ``(B, K)``."""
        return self.b(self.reduce(s))

    def associated_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that the associated loss trains: of f, b, ``reduce`` if a module, and the objective."""
        yield from self.f.parameters()
        yield from self.b.parameters()
        if isinstance(self.reduce, nn.Module):
            yield from self.reduce.parameters()
        yield from self.objective.extra_parameters(self)

    def autoencoder_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that the autoencoder loss trains: of g and of h."""
        yield from self.g.parameters()
        if not self.objective.trains_decoder:
            yield from self.h.parameters()

    @property
    def label(self) -> str:
        """Name of this layer in errors."""
        return f"AL layer {self.name or type(self.f).__name__}"

    def _lend(self, what: str, function: Callable[..., Any], *given: Activation) -> Any:
        """Returns ``function(*given)``, and keeps ``given`` as it is (:mod:`ds_al.lending`)."""
        lender = self._lenders.get((what, self.training))
        if lender is None:
            module = self.f if what == "f" else None
            lender = self._lenders[what, self.training] = Lender(what, module=module, always_copies=self.copies_inputs)
        return lender(function, *given)

    def _check(self, function: str, value: Any) -> None:
        parts = value if type(value) is tuple else (value,)
        if not parts or not all(isinstance(part, Tensor) and part.layout is torch.strided for part in parts):
            raise ALLayerError(
                f"{self.label}: {function} returned {_kind(value)}; expected a tensor or a plain tuple of tensors, "
                "neither sparse nor nested, since only those can be sent to the next layer"
            )
        if any(part.is_meta or part.is_quantized for part in parts):
            raise ALLayerError(
                f"{self.label}: {function} returned {_kind(value)}, on the meta device or quantized; expected tensors "
                "with values of their own"
            )
        if function == "f" and not parts[0].dim():
            raise ALLayerError(
                f"{self.label}: f returned a tensor without dimensions; expected (B, ...), the activations of the "
                "samples, or a tuple whose first tensor holds them"
            )


def located(error: Exception, layer: ALLayer, *, stage: int, what: str) -> ALError:
    """Returns the error of a layer with its place in the message: an error of ds_al with its own type."""
    where = f"stage {stage}, {layer.label}, {what}"
    if isinstance(error, ALError):
        return type(error)(f"{where}: {str(error).removeprefix(f'{layer.label}: ')}")
    return ALLayerError(f"{where}: {type(error).__name__}: {error}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of layout {value.layout}" if value.layout is not torch.strided else "a tensor"
    if type(value) is tuple:
        return f"a tuple of ({', '.join(_kind(part) for part in value)})"
    return f"a {'NamedTuple ' if isinstance(value, tuple) else ''}{type(value).__name__}"


@torch.no_grad()
def predict(
    layers: Sequence[ALLayer], x: Activation, *, exit: int | None = None, num_classes: int | None = None
) -> Tensor:
    """Returns the label scores ``(B, V)`` of the inference path, or of an early exit after ``exit`` layers (1-based).

    Example:
        >>> layer = ds_al.ALLayer(f=nn.Linear(8, 16), b=nn.Linear(16, 4), g=nn.Linear(3, 4), h=nn.Linear(4, 3))
        >>> ds_al.predict([layer], torch.randn(2, 8)).shape
        torch.Size([2, 3])

    Args:
        num_classes: V; required where the objective scores with a table of codes (``contrast``).

    Raises:
        ValueError: ``exit`` is not in 1..N, or ``num_classes`` is missing.
    """
    depth = len(layers) if exit is None else exit
    if not 1 <= depth <= len(layers):
        raise ValueError(f"exit={exit}: expected 1..{len(layers)}, the number of layers that x passes")
    s, last, table = x, layers[depth - 1], None
    for layer in layers[:depth]:
        s = layer.activation(s)
    if last.objective.has_code_table:
        if num_classes is None:
            raise ValueError("this objective scores with the codes of all classes: give predict(num_classes=V)")
        table = last.objective.all_classes(num_classes, device=first(s).device)
        for layer in layers[:depth]:
            table = layer.codes(table)
    return last.scores(s, earlier=[layer.h for layer in layers[: depth - 1]], table=table)


def seed_layer(base_seed: int, *, layer: int, step: int, part: int) -> None:
    """Seeds torch's generators for one layer, one micro-batch and one part of it (0 forward, 1 losses).

    The draw of a dropout mask therefore depends neither on other layers nor on the partition or the schedule.
    SplitMix64 mixes the four numbers, since torch's CPU generator uses 32 bits of a seed.
    """
    z = ((base_seed * 1_000_003 + layer) * 1_000_003 + step) * 2 + part
    z = (z + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    seed = (z ^ (z >> 31)) & 0xFFFFFFFF
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would ask every kind of device, each time
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
