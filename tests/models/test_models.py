"""Each model: both forms share f, and shapes, gradients and groups are as promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import nn
from torch.nn import functional as F

from ds_al.errors import ALConfigError
from ds_al.layer import predict
from ds_al.models import AL_MODELS, TWINS, build_al, build_twin
from ds_al.models.grouping import block_groups
from ds_al.models.vision import Subsampled
from ds_al.tensors import is_channels_last, stop_gradient
from tests.support.model_cases import BATCH, CASES, CLASSES, CODE, Case, al_layers, one_hot, parts, twin_layers


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


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
    """The AL engine sends what ``stop_gradient`` returns, which may have channels last; DeepSpeed's pipeline what the
    twin's layers return."""
    local = [layer.f.eval() for layer in al_layers(case)]
    for modules in (local, [module.eval() for module in twin_layers(case)]):
        s = case.x()
        for module in modules:
            s = stop_gradient(module(s)) if modules is local else module(s)
            assert all(part.is_contiguous() or (modules is local and is_channels_last(part)) for part in parts(s))
            assert all(len(part) == BATCH for part in parts(s))
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


def test_labels_are_read_by_cross_entropy_in_the_first_layer_alone():
    names = [layer.autoencoder_loss.__name__ for layer in al_layers(CASES["lstm"])]
    assert names == ["cross_entropy", "mse", "mse"]
    first, second, _ = al_layers(CASES["vgg"], code="sigmoid")
    assert not isinstance(first.h[-1], nn.Sigmoid)  # its scores would lie in [0, 1]
    assert isinstance(second.h[-1], nn.Sigmoid)


@pytest.mark.parametrize("key", ["mlp grouped", "vgg", "resnet", "transformer", "lstm"])
def test_grouping_changes_what_learns_but_not_what_is_computed(key: str):
    case = CASES[key]
    blocks = {"resnet": 6}.get(case.name, 3)
    x, single = case.x(), [layer.f for layer in al_layers(case, num_layers=blocks)]
    weights = [value for f in single for value in f.state_dict().values()]
    for count in range(1, blocks + 1):
        grouped = [layer.f for layer in al_layers(case, num_layers=count)]
        assert len(grouped) == count
        own = [value for f in grouped for value in f.state_dict().values()]
        for value, weight in zip(own, weights, strict=True):
            value.copy_(weight)
        outputs = []
        for functions in (single, grouped):
            s = x
            for f in functions:
                s = f.eval()(s)
            outputs.append(parts(s))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
        assert len(twin_layers(case, num_layers=count)) in (count, count + 1)  # an LSTM's head is within its last layer


def test_blocks_are_grouped_evenly():
    sizes = {(8, 3): [2, 3, 3], (8, 4): [2, 2, 2, 2], (4, 1): [4], (3, None): [1, 1, 1]}
    for (blocks, layers), want in sizes.items():
        assert [len(group) for group in block_groups(blocks, layers)] == want
    assert [len(group) for group in block_groups(8, None, default=4)] == [2, 2, 2, 2]
    with pytest.raises(ALConfigError, match=r"num_layers=9: expected 1\.\.8"):
        block_groups(8, 9)
    assert block_groups(8, [1, 5, 2]) == [range(0, 1), range(1, 6), range(6, 8)]
    for sizes in ([4, 5], [8, 0], []):
        with pytest.raises(ALConfigError, match="add up to 8"):
            block_groups(8, sizes)


def test_a_group_norm_does_not_look_at_other_samples():
    f = al_layers(CASES["resnet"], norm="group")[0].f
    x = CASES["resnet"].x()
    torch.testing.assert_close(f(x)[:1], f(x[:1]))
    f = al_layers(CASES["resnet"])[0].f
    assert not torch.allclose(f(x)[:1], f(x[:2])[:1])


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
        ("vgg", {"in_shape": (1, 28, 28), "bridge_width": 0}, "bridge_width=0"),
        ("vgg", {"in_shape": (1, 28, 28), "bridge_depth": -1}, "bridge_depth=-1"),
        ("resnet", {"in_shape": (28, 28)}, r"in_shape=\(28, 28\): expected \(C, H, W\)"),
        ("resnet", {"in_shape": (1, 28, 28), "num_layers": 9}, r"num_layers=9: expected 1\.\.8"),
        ("resnet", {"in_shape": (1, 28, 28), "widths": ()}, r"widths=\(\)"),
        ("resnet", {"in_shape": (1, 28, 28), "blocks_per_stage": 0}, "blocks_per_stage=0"),
        ("resnet", {"in_shape": (1, 28, 28), "norm": "layer"}, "norm='layer'.*'batch' or 'group'"),
        ("mlp", {"in_shape": (4,), "num_layers": 5}, r"num_layers=5: expected 1\.\.4"),
        ("lstm", {"vocab_size": 9, "num_layers": 0}, "num_layers=0"),
        ("lstm", {"vocab_size": 9, "num_blocks": 0}, "num_blocks=0"),
        ("lstm", {"vocab_size": 9, "bridge": "mimic"}, "bridge='mimic'.*'linear' or 'block'"),
        ("lstm", {"vocab_size": 9, "bridge_stride": 0}, "bridge_stride=0"),
        ("lstm", {"vocab_size": 9, "scores": "relu"}, "scores='relu'"),
        ("transformer", {"vocab_size": 9, "heads": 5}, "width=64 and heads=5"),
        ("transformer", {"vocab_size": 9, "bridge_width": -1}, "bridge_width=-1"),
        ("transformer", {"vocab_size": 9, "num_layers": 0}, "num_layers=0"),
    ],
)
def test_impossible_networks_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ALConfigError, match=message):
        build_al(name, num_classes=3, **options)


@pytest.mark.parametrize("build", [build_al, build_twin])
def test_scores_and_codes_are_left_to_adamw_in_both_forms(build: Any) -> None:
    """Like with like: what ends a head, a bridge, g or h is no matrix for Muon, whichever form trains it."""
    specs = build("vgg", preset="small", in_shape=(3, 32, 32), num_classes=10)
    modules = [module for spec in specs for module in spec.build().modules()]
    linear = [module.weight for module in modules if isinstance(module, torch.nn.Linear)]
    assert linear and not any(getattr(weight, "use_muon", True) for weight in linear)
    convolutions = [module.weight for module in modules if isinstance(module, torch.nn.Conv2d)]
    assert convolutions and all(getattr(weight, "use_muon", True) for weight in convolutions)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shortcut_is_the_strided_convolution_and_leaves_memory_whole(layout: torch.memory_format) -> None:
    """oneDNN's strided 1x1 convolution corrupted the heap in its backward pass: `free(): invalid size`, or worse."""
    x = torch.randn(4, 4, 9, 10).to(memory_format=layout).requires_grad_()
    for _ in range(50):
        ours = Subsampled(4, 6, stride=2)
        y = ours(x)
        torch.testing.assert_close(y, nn.functional.conv2d(x, ours.weight, stride=2))
        y.backward(torch.ones_like(y).to(memory_format=layout))
        _ = [torch.randn(size) for size in range(1, 50)]  # walks the heap
    assert y.shape == (4, 6, 5, 5)
