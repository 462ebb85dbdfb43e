"""Base class of objectives: target message, the two local losses, and exit scores.

An objective calls the functions of a layer as ``layer.f, layer.b, layer.g, layer.h``; ``layer.bridge(s)`` is
``b(reduce(s))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.tensors import Activation, Target


class Layer(Protocol):
    """The members of an AL layer that an objective uses, see :class:`~ds_al.layer.ALLayer`."""

    f: nn.Module
    b: nn.Module
    g: nn.Module
    h: nn.Module
    associated_loss: Callable[[Tensor, Tensor], Tensor]
    autoencoder_loss: Callable[[Tensor, Tensor], Tensor]
    target_gradient: bool

    @property
    def objective(self) -> Any:
        """The layer's own objective instance."""

    def bridge(self, s: Activation) -> Tensor:
        """Returns ``b(reduce(s))``, of shape ``(B, K)``."""


class Objective(nn.Module):
    """Base class of objectives, which train f and b of an AL layer. Each layer has its own instance of the same class.

    A subclass defines the target message (:meth:`first_target`, :meth:`encode`), the two losses and the exit scores.
    The associated loss also trains the objective's own parameters, if it has any.
    """

    target_tensors = 1
    """Number of tensors in a target message."""
    trains_decoder = False
    """Whether the associated loss, and no other loss, trains h."""
    untrained: tuple[str, ...] = ()
    """Functions of a layer, of f, b, g and h, that no loss trains."""
    needs_earlier_decoders = False
    """Whether :attr:`earlier` holds copies of ``h_1 .. h_{i-1}``, which are refreshed at fixed micro-batch numbers."""
    refresh_every = 0
    """Number of micro-batches between two refreshes."""
    has_code_table = False
    """Whether exits are scored with the codes of all classes, ``(V, K_i)``, which evaluation then sends downstream."""

    per_token = False
    """Whether labels are ``(B, T)``, one per token (-100: none), instead of ``(B,)``."""

    def __init__(self) -> None:
        super().__init__()
        # A plain list does not register submodules, so they are neither trained, saved nor counted with this module.
        self.earlier: list[nn.Module] = []
        """Frozen copies of the decoders of all earlier layers, if :attr:`needs_earlier_decoders`."""

    def first_target(self, labels: Tensor, one_hot: Tensor) -> Target:
        """Returns ``t_0``.

        Args:
            labels: ``(B,)``; ``(B, T)`` if :attr:`per_token`.
            one_hot: the labels as floats ``(B, V)``; the labels again if :attr:`per_token`.
        """
        raise NotImplementedError

    def encode(self, layer: Layer, t: Target) -> Target:
        """Computes ``t_i`` from ``t_{i-1}``."""
        raise NotImplementedError

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """Computes ``A_i``, a scalar that trains f and b."""
        raise NotImplementedError

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> Tensor | None:
        """Computes ``E_i``, a scalar that trains g and h; returns ``None`` if there is no target side."""
        raise NotImplementedError

    def all_classes(self, num_classes: int, *, device: torch.device | str) -> Tensor:
        """Returns the input of the first g for the codes of all classes: the identity ``(V, V)``."""
        return torch.eye(num_classes, device=device)

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Computes the label scores ``(B, V)`` of the exit after this layer.

        Args:
            s: ``s_i``.
            earlier: the current ``h_1 .. h_{i-1}``.
            table: the codes of all classes at this layer ``(V, K_i)``, if :attr:`has_code_table`.
        """
        raise NotImplementedError

    def label_loss(self, layer: Layer, scores: Tensor, target: Tensor) -> Tensor:
        """Computes the evaluation loss of label scores ``(B, V)`` against one-hot labels ``(B, V)``."""
        return F.cross_entropy(scores, target)

    def hits(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how many labels ``(B,)`` the highest score ``(B, V)`` predicts, and the number of labels."""
        return (scores.argmax(dim=1) == labels).sum(), labels.new_tensor(len(labels))

    def extra_parameters(self, layer: Layer) -> Iterator[nn.Parameter]:
        """Yields the parameters that the associated loss trains besides those of f and b."""
        yield from self.parameters()
        if self.trains_decoder:
            yield from layer.h.parameters()
