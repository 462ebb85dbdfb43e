"""The head of a network, in two parts: what sums the last activation up, and the linear layer that scores it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_al.models.targets import code_end
from ds_al.spec import Part, _build
from ds_al.tensors import Activation


@dataclass(frozen=True)
class Head:
    """Of a network whose last activation is ``s``.

    Attributes:
        body: ``s -> (B, D)``, or ``(B, T, D)`` of a causal language model.
        scores: the ``nn.Linear`` that follows, ``D -> V``.
        width: D.
        bias: whether ``scores`` has one.
    """

    body: Part
    scores: Part
    width: int
    bias: bool

    def twin(self) -> LayerSpec:
        """Both parts as one, for a plain ``PipelineModule``."""
        return LayerSpec(WholeHead, self.body, self.scores)


class WholeHead(nn.Module):
    """Scores of an activation, as the network itself gives them: ``(B, V)``."""

    def __init__(self, body: Part, scores: Part) -> None:
        super().__init__()
        self.body, self.scores = _build(body), _build(scores)

    def forward(self, s: Activation) -> Tensor:
        """``scores(body(s))``."""
        return self.scores(self.body(s))


class CodeHead(nn.Module):
    """The last layer's bridge: the network's head, with a code in the place of its scores, ``s -> (B, K)``.

    Args:
        body: of the head.
        width: D.
        code_width: K.
        code: where codes live, see :mod:`ds_al.models.targets`.
        bias: of the linear layer; as the network's own, so that it can take the place of it again.
    """

    def __init__(self, body: Part, width: int, code_width: int, *, code: str, bias: bool) -> None:
        super().__init__()
        self.body = _build(body)
        self.code = nn.Linear(width, code_width, bias=bias)
        self.code.weight.use_muon = False  # type: ignore[attr-defined]  # as of every linear layer that gives codes
        self.end = code_end(code, code_width)

    def forward(self, s: Activation) -> Tensor:
        """``end(code(body(s)))``."""
        return self.end(self.code(self.body(s)))


def last_linear(module: nn.Module, num_classes: int) -> str | None:
    """Path of the linear layer with which a module ends, where that has ``num_classes`` outputs; "" is itself."""
    found = None
    for path, part in module.named_modules():
        if next(part.children(), None) is None and any(True for _ in part.parameters()):
            found = path, part
    if found is not None and isinstance(found[1], nn.Linear) and found[1].out_features == num_classes:
        return found[0]
    return None


def without(module: nn.Module, path: str) -> nn.Module:
    """The module with ``nn.Identity`` at this path. It shares all other parts with the given one, which stays whole."""
    if not path:
        return nn.Identity()
    name, _, rest = path.partition(".")
    changed = copy.copy(module)
    changed._modules = dict(module._modules)
    child = module._modules[name]
    assert child is not None
    changed._modules[name] = without(child, rest)
    return changed
