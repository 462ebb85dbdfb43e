"""What an objective decides: the message beside ``s``, the two local losses, and how an exit is scored.

Functions of a layer are called as ``layer.f, layer.b, layer.g, layer.h``; ``layer.bridge(s)`` is ``b(reduce(s))``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.tensors import Activation, Target


class Layer(Protocol):
    """What an objective uses of an AL layer, see :class:`~ds_al.layer.ALLayer`."""

    f: nn.Module
    b: nn.Module
    g: nn.Module
    h: nn.Module
    associated_loss: Callable[[Tensor, Tensor], Tensor]
    autoencoder_loss: Callable[[Tensor, Tensor], Tensor]
    target_gradient: bool

    @property
    def objective(self) -> Any:
        """The layer's own instance of its objective."""

    def bridge(self, s: Activation) -> Tensor:
        """``b(reduce(s))``, of shape ``(B, K)``."""


class Objective(nn.Module):
    """Defines the losses of one AL layer. Each layer has its own instance, all of one class.

    A subclass defines a layer's target message (:meth:`first_target`, :meth:`encode`), the two losses and the scores of
    the exit. The associated loss trains its own parameters, if any.
    """

    target_tensors = 1
    """Tensors in a target message."""
    trains_decoder = False
    """Whether the associated loss trains h, and nothing else does."""
    needs_earlier_decoders = False
    """Whether :attr:`earlier` is to hold copies of ``h_1 .. h_{i-1}``, refreshed at fixed micro-batch numbers."""
    refresh_every = 0
    """Micro-batches between two refreshes."""
    has_code_table = False
    """Whether exits are scored with the codes of all classes, ``(V, K_i)``, which then travel at evaluation."""

    per_token = False
    """Whether labels are ``(B, T)``, one per token (-100: none), instead of ``(B,)``."""

    def __init__(self) -> None:
        super().__init__()
        # A list: modules in it are no submodules, and so neither trained, nor saved, nor counted with this one.
        self.earlier: list[nn.Module] = []
        """Frozen copies of the decoders of all earlier layers, where :attr:`needs_earlier_decoders`."""

    def first_target(self, labels: Tensor, one_hot: Tensor) -> Target:
        """``t_0``, from labels ``(B,)`` and the same as floats ``(B, V)``; twice the labels where :attr:`per_token`."""
        raise NotImplementedError

    def encode(self, layer: Layer, t: Target) -> Target:
        """``t_i`` from ``t_{i-1}``."""
        raise NotImplementedError

    def associated_loss(self, layer: Layer, s_out: Activation, t_out: Target) -> Tensor:
        """``A_i``, which trains f and b: a scalar."""
        raise NotImplementedError

    def autoencoder_loss(self, layer: Layer, t_out: Target, t_in: Target) -> Tensor | None:
        """``E_i``, which trains g and h: a scalar; ``None`` without a target side."""
        raise NotImplementedError

    def all_classes(self, num_classes: int, *, device: torch.device | str) -> Tensor:
        """Input of the chain of g that gives the codes of all classes: the identity ``(V, V)``."""
        return torch.eye(num_classes, device=device)

    def scores(self, layer: Layer, s: Activation, *, earlier: Sequence[nn.Module], table: Tensor | None) -> Tensor:
        """Label scores ``(B, V)`` of the exit after this layer.

        Args:
            s: ``s_i``.
            earlier: the present ``h_1 .. h_{i-1}``.
            table: the codes of all classes at this layer ``(V, K_i)``, where :attr:`has_code_table`.
        """
        raise NotImplementedError

    def label_loss(self, layer: Layer, scores: Tensor, target: Tensor) -> Tensor:
        """Loss of label scores ``(B, V)`` against one-hot labels ``(B, V)``, for evaluation."""
        return F.cross_entropy(scores, target)

    def hits(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Number of labels ``(B,)`` that the highest score ``(B, V)`` predicts, and number of labels."""
        return (scores.argmax(dim=1) == labels).sum(), labels.new_tensor(len(labels))

    def extra_parameters(self, layer: Layer) -> Iterator[nn.Parameter]:
        """Parameters that the associated loss trains in addition to f and b."""
        yield from self.parameters()
        if self.trains_decoder:
            yield from layer.h.parameters()
