"""Tiny forms of every model, with the shapes that leave each of their layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.layer import ALLayer
from ds_al.models import build_al, build_twin

CLASSES, CODE, BATCH, TOKENS = 5, 6, 4, 7


def images(channels: int, size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, channels, size, size)


def tokens() -> Tensor:
    ids = torch.randint(1, 50, (BATCH, TOKENS))
    ids[1, 4:] = 0
    return ids


@dataclass(frozen=True)
class Case:
    name: str
    x: Callable[[], Any]
    shapes: list[list[tuple[int, ...]]]
    """Shapes of ``s_i``, without the batch, layer by layer."""
    options: dict[str, Any] = field(default_factory=dict)


BLOCKS = ((4, 8, "M"), (8, "M"), (12,))
VGG = {"in_shape": (1, 14, 14), "blocks": BLOCKS}
VGG_SHAPES: list[list[tuple[int, ...]]] = [[(8, 7, 7)], [(8, 4, 4)], [(12, 4, 4)]]
RESNET = {"in_shape": (3, 10, 10), "widths": (4, 6, 8)}
TEXT = {"vocab_size": 50, "num_blocks": 3, "width": 8, "dropout": 0.2}
GROUPED_TEXT = {**TEXT, "num_blocks": 4, "num_layers": 2}
HIDDEN, STATES = [(TOKENS, 8), (TOKENS,)], [(TOKENS, 16), (2, 8), (2, 8), (TOKENS,)]

CASES = {
    "mlp": Case("mlp", lambda: torch.randn(BATCH, 3, 4), [[(9,)], [(7,)]], {"in_shape": (3, 4), "widths": (9, 7)}),
    "mlp grouped": Case(
        "mlp",
        lambda: torch.randn(BATCH, 12),
        [[(9,)], [(8,)]],
        {"in_shape": (12,), "widths": (9, 7, 8), "num_layers": 2},
    ),
    "vgg": Case("vgg", images(1, 14), VGG_SHAPES, VGG),
    "vgg grouped": Case(
        "vgg",
        images(3, 12),
        [[(8, 6, 6)], [(12, 3, 3)]],
        {"in_shape": (3, 12, 12), "blocks": BLOCKS, "num_layers": 2, "bridge_pool_first": False},
    ),
    "vgg depthwise": Case("vgg", images(1, 14), VGG_SHAPES, {**VGG, "bridge_depthwise": True, "bridge_width": 0.25}),
    "vgg residual": Case("vgg", images(1, 14), VGG_SHAPES, {**VGG, "bridge_residual": True, "bridge_depth": 1}),
    "vgg published": Case(
        "vgg", images(1, 14), VGG_SHAPES, {**VGG, "bridge": "published", "bridge_hidden": 16, "head": "published"}
    ),
    "resnet": Case("resnet", images(3, 10), [[(4, 10, 10)], [(6, 5, 5)], [(8, 3, 3)]], RESNET),
    "resnet by blocks": Case(
        "resnet",
        images(3, 10),
        [[(4, 10, 10)], [(4, 10, 10)], [(6, 5, 5)], [(6, 5, 5)], [(8, 3, 3)], [(8, 3, 3)]],
        {**RESNET, "num_layers": 6, "norm": "group", "bridge_depthwise": True, "bridge_width": 1.0},
    ),
    "resnet grouped": Case(
        "resnet",
        images(3, 10),
        [[(6, 5, 5)], [(8, 3, 3)]],
        {**RESNET, "num_layers": 2, "bridge_residual": False, "bridge_pool_first": False},
    ),
    "resnet published": Case(
        "resnet",
        images(3, 10),
        [[(4, 10, 10)], [(6, 5, 5)], [(8, 3, 3)]],
        {**RESNET, "bridge": "published", "bridge_hidden": 16, "head": "published", "head_hidden": 9},
    ),
    "transformer": Case("transformer", tokens, [HIDDEN] * 3, {**TEXT, "heads": 2, "max_length": TOKENS}),
    "transformer grouped": Case(
        "transformer", tokens, [HIDDEN] * 2, {**GROUPED_TEXT, "heads": 2, "bridge": "block", "bridge_stride": 3}
    ),
    "transformer blocks": Case(
        "transformer", tokens, [HIDDEN] * 3, {**TEXT, "heads": 2, "bridge": "block", "bridge_stride": 1}
    ),
    "lstm": Case("lstm", tokens, [[(TOKENS, 10), (TOKENS,)], STATES, STATES], {**TEXT, "embedding_width": 10}),
    "lstm grouped": Case(
        "lstm", tokens, [STATES] * 2, {**GROUPED_TEXT, "embedding_width": 10, "bridge": "block", "bridge_stride": 3}
    ),
    "lstm blocks": Case(
        "lstm",
        tokens,
        [[(TOKENS, 10), (TOKENS,)], STATES, STATES],
        {**TEXT, "embedding_width": 10, "bridge": "block", "bridge_stride": 2},
    ),
}
TEXT_CASES = {key: case for key, case in CASES.items() if case.name in ("transformer", "lstm")}


def build(specs: list[Any], seed: int = 0) -> list[Any]:
    """Builds as ``PipelineModule`` does: each layer under a seed of its own."""
    modules = []
    for index, spec in enumerate(specs):
        torch.manual_seed(seed + index)
        modules.append(spec.build())
    return modules


def al_layers(case: Case, **options: Any) -> list[ALLayer]:
    return build(build_al(case.name, **{"num_classes": CLASSES, "code_width": CODE, **case.options, **options}))


def twin_layers(case: Case, **options: Any) -> list[nn.Module]:
    return build(build_twin(case.name, **{"num_classes": CLASSES, **case.options, **options}))


def one_hot() -> Tensor:
    return F.one_hot(torch.arange(BATCH) % CLASSES, CLASSES).float()


def parts(s: Any) -> tuple[Tensor, ...]:
    return s if isinstance(s, tuple) else (s,)
