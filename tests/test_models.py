"""Each model: both forms share f, shapes are as promised, padding and state do as they should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer, predict, stop_gradient
from ds_al.models import AL_MODELS, TWINS, build_al, build_twin

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
TEXT = {"vocab_size": 50, "num_layers": 3, "width": 8, "dropout": 0.2}
CASES = {
    "mlp": Case("mlp", lambda: torch.randn(BATCH, 3, 4), [[(9,)], [(7,)]], {"in_shape": (3, 4), "widths": (9, 7)}),
    "vgg": Case(
        "vgg",
        images(1, 14),
        [[(8, 7, 7)], [(8, 4, 4)], [(12, 4, 4)]],
        {"in_shape": (1, 14, 14), "blocks": BLOCKS},
    ),
    "vgg merged": Case(
        "vgg",
        images(3, 12),
        [[(8, 6, 6)], [(12, 3, 3)]],
        {"in_shape": (3, 12, 12), "blocks": BLOCKS, "num_layers": 2, "bridge_pool_first": False},
    ),
    "vgg published": Case(
        "vgg",
        images(1, 14),
        [[(8, 7, 7)], [(8, 4, 4)], [(12, 4, 4)]],
        {
            "in_shape": (1, 14, 14),
            "blocks": BLOCKS,
            "bridge": "published",
            "bridge_hidden": 16,
            "head": "published",
        },
    ),
    "transformer": Case(
        "transformer", tokens, [[(TOKENS, 8), (TOKENS,)]] * 3, {**TEXT, "heads": 2, "max_length": TOKENS}
    ),
    "lstm": Case(
        "lstm",
        tokens,
        [[(TOKENS, 10), (TOKENS,)], *[[(TOKENS, 16), (2, 8), (2, 8), (TOKENS,)]] * 2],
        {**TEXT, "embedding_width": 10},
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def build(specs: list[Any], seed: int = 0) -> list[Any]:
    """Builds as ``PipelineModule`` does: each layer under a seed of its own."""
    modules = []
    for index, spec in enumerate(specs):
        torch.manual_seed(seed + index)
        modules.append(spec.build())
    return modules


def al_layers(case: Case, **options: Any) -> list[ALLayer]:
    return build(build_al(case.name, num_classes=CLASSES, code_width=CODE, **{**case.options, **options}))


def twin_layers(case: Case) -> list[nn.Module]:
    return build(build_twin(case.name, num_classes=CLASSES, **case.options))


def one_hot() -> Tensor:
    return F.one_hot(torch.arange(BATCH) % CLASSES, CLASSES).float()


def parts(s: Any) -> tuple[Tensor, ...]:
    return s if isinstance(s, tuple) else (s,)


def test_shapes_of_every_layer_and_of_every_exit(case: Case):
    layers, s, t = al_layers(case), case.x(), one_hot()
    assert len(layers) == len(case.shapes)
    for layer, shapes in zip(layers, case.shapes, strict=True):
        s, t_in = layer(s, t)[0], t
        t = layer.g(t_in)
        assert [tuple(part.shape) for part in parts(s)] == [(BATCH, *shape) for shape in shapes]
        assert t.shape == layer.bridge(s).shape == (BATCH, CODE)
        assert layer.h(t).shape == t_in.shape
    for exit in range(1, len(layers) + 1):
        assert predict(layers, case.x(), exit=exit).shape == (BATCH, CLASSES)


def test_what_travels_between_layers_is_contiguous_with_the_batch_first(case: Case):
    layers, s = al_layers(case), case.x()
    for module in layers:
        s = module.eval().f(s)
        assert all(part.is_contiguous() and len(part) == BATCH for part in parts(s))
        assert parts(s)[0].is_floating_point()  # DeepSpeed's receive buffers want a float first


def test_both_losses_train_every_parameter_and_share_none(case: Case):
    layers, s, t = al_layers(case), case.x(), one_hot()
    owners = [p for layer in layers for p in (*layer.associated_parameters(), *layer.autoencoder_parameters())]
    assert len(owners) == len(set(owners)) == sum(len(list(layer.parameters())) for layer in layers)
    for layer in layers:
        s_out, t_out = layer(s, t)
        losses = layer.local_losses(s_out, t_out, t)
        losses.associated.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.associated_parameters())
        assert all(p.grad is None for p in layer.autoencoder_parameters())
        losses.autoencoder.backward()
        assert all(p.grad is not None for p in layer.autoencoder_parameters())
        s, t = stop_gradient(s_out), stop_gradient(t_out)


def test_a_layer_gives_the_same_bits_twice(case: Case):
    (x, t), results = (case.x(), one_hot()), []
    for _ in range(2):
        layer = al_layers(case)[0]
        torch.manual_seed(5)
        s_out, t_out = layer(x, t)
        sum(layer.local_losses(s_out, t_out, t)).backward()
        results.append([*parts(s_out), t_out, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_twin_has_the_same_f_with_the_same_weights(case: Case):
    f = [value for layer in al_layers(case) for value in layer.f.state_dict().values()]
    twin = [value for layer in twin_layers(case) for value in layer.state_dict().values()]
    assert len(twin) > len(f)  # and a head after them
    for own, other in zip(f, twin, strict=False):
        assert torch.equal(own, other)


def test_the_twin_learns_from_the_loss_of_its_scores(case: Case):
    network = nn.Sequential(*twin_layers(case))
    scores = network(case.x())
    assert scores.shape == (BATCH, CLASSES)
    F.cross_entropy(scores, torch.arange(BATCH)).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_what_a_twin_sends_comes_back_as_gradients(case: Case):
    """DeepSpeed's pipeline asks for a gradient of every float that crossed a boundary."""
    s = case.x()
    layers = twin_layers(case)
    for layer, following in zip(layers, layers[1:], strict=False):
        s = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in parts(layer(s)))
        s = s if len(s) > 1 else s[0]
        sum(part.sum() for part in parts(following(s)) if part.is_floating_point()).backward()
        assert all(part.grad is not None for part in parts(s) if part.is_floating_point())


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_padding_changes_nothing(name: str):
    case = CASES[name]
    layers = [layer.eval() for layer in al_layers(case, **({"max_length": 20} if name == "transformer" else {}))]
    x = torch.randint(1, 50, (BATCH, TOKENS))
    padded = F.pad(x, (0, 5))
    junk = torch.cat([x, torch.randint(1, 50, (BATCH, 5))], dim=1)
    for exit in range(1, len(layers) + 1):
        expected = predict(layers, x, exit=exit)
        torch.testing.assert_close(predict(layers, padded, exit=exit), expected)
        torch.testing.assert_close(predict(layers, (junk, padded != 0), exit=exit), expected)


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_a_sequence_of_padding_alone_gives_finite_losses(name: str):
    case = CASES[name]
    s, t = torch.zeros(BATCH, TOKENS, dtype=torch.int64), one_hot()
    for layer in al_layers(case):
        s_out, t_out = layer(s, t)
        sum(layer.local_losses(s_out, t_out, t)).backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        s, t = stop_gradient(s_out), stop_gradient(t_out)


def test_an_lstm_layer_starts_from_the_state_of_the_one_before():
    layers = [layer.eval() for layer in al_layers(CASES["lstm"])]
    hidden, h, c, mask = layers[1].f(layers[0].f(tokens()))
    states = [(h, c), (h + 1, c), (h, c + 1)]
    outputs = [layers[2].f((hidden, *state, mask))[0] for state in states]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert torch.equal(layers[1].reduce((hidden, h, c, mask)), h[:, 0] + h[:, 1])


def test_an_lstm_reads_backwards_from_the_last_token_and_not_from_padding():
    layers = [layer.eval() for layer in al_layers(CASES["lstm"])]
    x = tokens()
    x[:, 3:] = 0
    _, h_padded, *_ = layers[1].f(layers[0].f(x))
    _, h, *_ = layers[1].f(layers[0].f(x[:, :3]))
    torch.testing.assert_close(h_padded, h)


def test_a_narrow_bridge_costs_less_than_the_network_it_mimics():
    specs = build_al("vgg", in_shape=(1, 28, 28), num_classes=10)
    layers = build(specs)
    later = sum(p.numel() for layer in layers[1:] for p in layer.f.parameters())
    assert sum(p.numel() for p in layers[0].b.parameters()) < later / 2


def test_published_vision_codes_are_sigmoids_read_by_mean_squared_error():
    for layer in al_layers(CASES["vgg published"]):
        assert [type(part[-1]) for part in (layer.b, layer.g, layer.h)] == [nn.Sigmoid] * 3
        assert layer.autoencoder_loss.__name__ == "mse"


def test_labels_are_read_by_cross_entropy_in_the_first_layer_alone():
    names = [layer.autoencoder_loss.__name__ for layer in al_layers(CASES["lstm"])]
    assert names == ["cross_entropy", "mse", "mse"]
    first, second, _ = al_layers(CASES["vgg"], code="sigmoid")
    assert not isinstance(first.h[-1], nn.Sigmoid)  # its scores would lie in [0, 1]
    assert isinstance(second.h[-1], nn.Sigmoid)


def test_both_forms_are_known_by_the_same_names():
    assert AL_MODELS.keys() == TWINS.keys() == {case.name for case in CASES.values()}


@pytest.mark.parametrize("build_specs", [build_al, build_twin])
def test_unknown_names_and_options_are_refused_by_name(build_specs: Callable[..., list[LayerSpec]]):
    with pytest.raises(ALConfigError, match=r"'resnext': expected one of \['lstm', 'mlp'"):
        build_specs("resnext", num_classes=3)
    with pytest.raises(ALConfigError, match=r"option 'widht'.*expected one of .*'widths'"):
        build_specs("mlp", in_shape=(4,), num_classes=3, widht=8)
    with pytest.raises(ALConfigError, match="needs in_shape"):
        build_specs("mlp", num_classes=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg", {"in_shape": (28, 28)}, r"in_shape=\(28, 28\): expected \(C, H, W\)"),
        ("vgg", {"in_shape": (1, 28, 28), "num_layers": 5}, r"num_layers=5: expected 1\.\.4"),
        ("vgg", {"in_shape": (1, 28, 28), "bridge": "wide"}, "bridge='wide'"),
        ("vgg", {"in_shape": (1, 28, 28), "code": "relu"}, r"code='relu': expected one of \['layer_norm'"),
        ("vgg", {"in_shape": (1, 28, 28), "blocks": ((8, "P"),)}, "'P' in block"),
        ("mlp", {"in_shape": (4,), "widths": ()}, "at least one hidden layer"),
        ("lstm", {"vocab_size": 9, "num_layers": 0}, "num_layers=0"),
        ("transformer", {"vocab_size": 9, "num_layers": 0}, "num_layers=0"),
    ],
)
def test_impossible_networks_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ALConfigError, match=message):
        build_al(name, num_classes=3, **options)
