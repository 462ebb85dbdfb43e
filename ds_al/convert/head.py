"""Head of a network, split into the body that pools the last activation and the linear layer that computes the
scores."""

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
    """Head of a network whose last activation is ``s``.

    Attributes:
        body: ``s -> (B, D)``, or ``(B, T, D)`` of a causal language model.
        scores: the ``nn.Linear`` that follows, ``D -> V``.
        width: D.
        bias: whether ``scores`` has a bias.
    """

    body: Part
    scores: Part
    width: int
    bias: bool

    def twin(self) -> LayerSpec:
        """Returns both parts as one spec, for a plain ``PipelineModule``."""
        return LayerSpec(WholeHead, self.body, self.scores)


class WholeHead(nn.Module):
    """The network's own head: scores ``(B, V)`` of an activation."""

    def __init__(self, body: Part, scores: Part) -> None:
        super().__init__()
        self.body, self.scores = _build(body), _build(scores)

    def forward(self, s: Activation) -> Tensor:
        """Computes ``scores(body(s))``."""
        return self.scores(self.body(s))


class CodeHead(nn.Module):
    """The last layer's bridge: the network's head with a code in place of its scores, ``s -> (B, K)``.

    Args:
        body: body of the head.
        width: D.
        code_width: K.
        code: set of codes, see :mod:`ds_al.models.targets`.
        bias: whether the linear layer has a bias, like the network's own, which it can then replace on export.
    """

    def __init__(self, body: Part, width: int, code_width: int, *, code: str, bias: bool) -> None:
        super().__init__()
        self.body = _build(body)
        self.code = nn.Linear(width, code_width, bias=bias)
        self.code.weight.use_muon = False  # type: ignore[attr-defined]  # as in every linear layer onto codes
        self.end = code_end(code, code_width)

    def forward(self, s: Activation) -> Tensor:
        """Computes ``end(code(body(s)))``."""
        return self.end(self.code(self.body(s)))


def last_linear(module: nn.Module, num_classes: int) -> str | None:
    """Returns the path of a module's last linear layer if that has ``num_classes`` outputs; "" is the module itself."""
    found = None
    for path, part in module.named_modules():
        if next(part.children(), None) is None and any(True for _ in part.parameters()):
            found = path, part
    if found is not None and isinstance(found[1], nn.Linear) and found[1].out_features == num_classes:
        return found[0]
    return None


def without(module: nn.Module, path: str) -> nn.Module:
    """Returns the module with ``nn.Identity`` at a path. All other parts are shared with the argument, which is
    unchanged."""
    if not path:
        return nn.Identity()
    name, _, rest = path.partition(".")
    changed = copy.copy(module)
    changed._modules = dict(module._modules)
    child = module._modules[name]
    assert child is not None
    changed._modules[name] = without(child, rest)
    return changed
