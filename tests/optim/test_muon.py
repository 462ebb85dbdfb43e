"""MuonAdamW steps matrices as torch's Muon and all else as torch's AdamW, under one LR schedule."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupLR
from torch import Tensor, nn

from ds_al.config.associated_learning import ALConfig
from ds_al.errors import ALConfigError
from ds_al.layer import ALLayer
from ds_al.optim import names as optimizer_names
from ds_al.optim.local import LocalOptimizer
from ds_al.optim.muon import MuonAdamW, orthogonalized, tag_embeddings
from tests.support.networks import NETWORKS

needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
DTYPES = (torch.float32, torch.bfloat16)

MUON: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1}
ADAMW: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.05}
BOTH: dict[str, Any] = {**MUON, "ns_dtype": "bfloat16", **{f"adamw_{key}": value for key, value in ADAMW.items()}}
Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def stepped(
    value: nn.Parameter,
    make: Maker,
    *,
    steps: int = 4,
    after: Callable[[torch.optim.Optimizer, int], None] | None = None,
) -> Tensor:
    """What some steps on the same random gradients leave of a parameter."""
    optimizer = make([value])
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        value.grad = torch.randn(value.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(optimizer, step)
    return value.detach().clone()


@needs_torch_muon
@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (1, 6), (6, 1)])
def test_a_matrix_steps_as_with_muon_alone(shape: tuple[int, int]) -> None:
    ours = stepped(parameter(*shape), lambda p: MuonAdamW(p, **BOTH))
    assert torch.equal(ours, stepped(parameter(*shape), lambda p: torch.optim.Muon(p, **MUON)))


@needs_torch_muon
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_its_other_options_are_those_of_muon(adjust: str) -> None:
    options: dict[str, Any] = {**MUON, "nesterov": True, "adjust_lr_fn": adjust, "ns_steps": 3}
    ours = stepped(parameter(8, 5), lambda p: MuonAdamW(p, ns_dtype="bfloat16", **options))
    assert torch.equal(ours, stepped(parameter(8, 5), lambda p: torch.optim.Muon(p, **options)))


@pytest.mark.parametrize("shape", [(7,), ()])
def test_all_else_steps_as_with_adamw_alone(shape: tuple[int, ...]) -> None:
    ours = stepped(parameter(*shape), lambda p: MuonAdamW(p, **BOTH))
    assert torch.equal(ours, stepped(parameter(*shape), lambda p: torch.optim.AdamW(p, **ADAMW)))


def test_a_gradient_that_lies_otherwise_than_its_parameter_steps_the_same_numbers() -> None:
    """The fused AdamW of a CPU reads both as they lie in memory, and mixed up the elements of such a gradient."""
    alike, otherwise = ([nn.Parameter(parameter(4, 4, 3, 3).detach().clone())] for _ in range(2))
    alike[0].use_muon = otherwise[0].use_muon = False  # type: ignore[attr-defined]
    grad = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    alike[0].grad, otherwise[0].grad = grad, grad.clone(memory_format=torch.channels_last)
    MuonAdamW(alike, **BOTH).step()
    MuonAdamW(otherwise, **BOTH).step()
    assert torch.equal(alike[0], otherwise[0])


@needs_torch_muon
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_steps_as_the_matrix_of_its_rows(layout: torch.memory_format) -> None:
    kernel = parameter(6, 4, 3, 3)
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel = nn.Parameter(kernel.detach().clone(memory_format=layout))
    grads = torch.randn(3, 6, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    ours, theirs = MuonAdamW([kernel], **BOTH), torch.optim.Muon([matrix], **MUON)
    for grad in grads:
        kernel.grad = grad.clone(memory_format=layout)
        matrix.grad = grad.flatten(1)
        ours.step()
        theirs.step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert kernel.is_contiguous(memory_format=layout)
    assert torch.equal(ours.state[kernel]["momentum_buffer"], theirs.state[matrix]["momentum_buffer"])


def test_embeddings_and_tagged_matrices_step_as_with_adamw() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    model[2].weight.use_muon = False
    tag_embeddings(model)
    optimizer = MuonAdamW(model.parameters())
    methods = {id(p): group["method"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: methods[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": "adamw",
        "1.weight": "muon",
        "1.bias": "adamw",
        "2.weight": "adamw",
        "2.bias": "adamw",
    }
    table = parameter(9, 4)
    table.use_muon = False  # type: ignore[attr-defined]
    ours = stepped(table, lambda p: MuonAdamW(p, **BOTH))
    assert torch.equal(ours, stepped(parameter(9, 4), lambda p: torch.optim.AdamW(p, **ADAMW)))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (2 + n)),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
    "WarmupCosineLR": lambda optimizer: WarmupCosineLR(optimizer, total_num_steps=9, warmup_num_steps=3),
    "WarmupLR": lambda optimizer: WarmupLR(optimizer, warmup_max_lr=0.04, warmup_num_steps=5),  # one rate for all
}


@needs_torch_muon
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_drives_both_and_keeps_their_ratio(name: str) -> None:
    """Each half follows the rates that the schedule gives a Muon alone: AdamW's scaled by adamw_lr / lr."""
    rates: list[float] = []

    def run(value: nn.Parameter, make: Maker, *, ratio: float | None = None) -> Tensor:
        schedule: list[Any] = []

        def scheduled(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = make(parameters)
            if ratio is None:
                schedule.append(SCHEDULES[name](optimizer))
                rates[:] = [optimizer.param_groups[0]["lr"]]
            else:
                optimizer.param_groups[0]["lr"] = rates[0] * ratio
            return optimizer

        def after(optimizer: torch.optim.Optimizer, step: int) -> None:
            if ratio is None:
                schedule[0].step()
                rates.append(optimizer.param_groups[0]["lr"])
            else:
                optimizer.param_groups[0]["lr"] = rates[step + 1] * ratio

        return stepped(value, scheduled, steps=7, after=after)

    ours = run(parameter(8, 5), lambda p: MuonAdamW(p, **BOTH))
    assert len(set(rates)) > 4
    assert torch.equal(ours, run(parameter(8, 5), lambda p: torch.optim.Muon(p, **MUON), ratio=1.0))
    ours = run(parameter(7), lambda p: MuonAdamW(p, **BOTH))
    theirs = run(parameter(7), lambda p: torch.optim.AdamW(p, **ADAMW), ratio=ADAMW["lr"] / MUON["lr"])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def model_and_step(seed: int = 3) -> tuple[nn.Module, Callable[[torch.optim.Optimizer], None]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(5, 1, 6, 6)

    def step(optimizer: torch.optim.Optimizer) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_its_state_goes_around_exactly() -> None:
    model, step = model_and_step()
    optimizer = MuonAdamW(model.parameters(), **BOTH)
    for _ in range(3):
        step(optimizer)
    weights, saved = copy.deepcopy(model.state_dict()), pickle.loads(pickle.dumps(optimizer.state_dict()))
    for _ in range(3):
        step(optimizer)
    other, step_other = model_and_step()
    loaded = MuonAdamW(other.parameters(), lr=1.0)
    step_other(loaded)  # whatever it has done before is forgotten
    other.load_state_dict(weights)
    loaded.load_state_dict(saved)
    for _ in range(3):
        step_other(loaded)
    assert same(model, other)


def test_a_copy_goes_on_by_itself() -> None:
    model, step = model_and_step()
    optimizer = MuonAdamW(model.parameters(), **BOTH)
    step(optimizer)
    other, copied = copy.deepcopy((model, optimizer))
    for parameter_, twin in zip(model.parameters(), other.parameters(), strict=True):
        parameter_.grad = torch.ones_like(parameter_)
        twin.grad = torch.ones_like(twin)
    before = copy.deepcopy(model)
    copied.step()
    assert same(before, model) and not same(before, other)
    optimizer.step()
    assert same(model, other)


def test_gradients_are_let_go_and_parameters_without_one_stay() -> None:
    model, step = model_and_step()
    optimizer = MuonAdamW(model.parameters(), **BOTH)
    model[3].weight.requires_grad_(False)
    before = model[3].weight.clone()
    step(optimizer)
    assert torch.equal(model[3].weight, before) and model[3].weight not in optimizer.state
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer._adamw.param_groups


def test_a_closure_is_called_with_gradients() -> None:
    model, _ = model_and_step()
    optimizer = MuonAdamW(model.parameters())

    def closure() -> Tensor:
        loss = model(torch.ones(2, 1, 6, 6)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad


def test_groups_keep_their_names_and_options() -> None:
    optimizer = MuonAdamW(
        [
            {"params": [parameter(4, 4), parameter(4)], "name": "first", "lr": 0.1},
            {"params": [parameter(4)], "name": "second", "adamw_lr": 0.5},
        ]
    )
    found = [(g["name"], g["method"], g["lr"], g["base_lr"], g["adamw_lr"]) for g in optimizer.param_groups]
    assert found == [
        ("first", "muon", 0.1, 0.1, 1e-3),
        ("first", "adamw", 0.1, 0.1, 1e-3),
        ("second", "adamw", 0.02, 0.02, 0.5),
    ]


def layers() -> list[tuple[int, ALLayer]]:
    return list(enumerate(NETWORKS["vgg"].build(base_seed=1)))


def test_a_stage_clips_what_belongs_to_a_layer_together() -> None:
    """Not each of the two halves that the optimizer makes of a layer's group."""
    stage = layers()
    local = LocalOptimizer(stage, associated=MuonAdamW, autoencoder=MuonAdamW, clip=0.1)
    for _, layer in stage:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
    local.step()
    for _, layer in stage:
        for side in (layer.associated_parameters(), layer.autoencoder_parameters()):
            norms = [p.grad.norm() for p in side if p.grad is not None]
            torch.testing.assert_close(torch.stack(norms).norm(), torch.tensor(0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("block", ["optimizer", "autoencoder_optimizer"])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"momentums": 0.9}, "momentums\" is not a key of this block: did you mean 'momentum'"),
        ({"adam_lr": 0.1}, "did you mean 'adamw_lr'"),
        ({"lr": 0}, 'lr": got 0: .*greater than 0'),
        ({"adamw_betas": [0.9, 1.0]}, 'adamw_betas.1": got 1.0'),
        ({"adjust_lr_fn": "none"}, "match_rms_adamw"),
    ],
)
def test_unknown_options_are_refused_by_name(block: str, params: dict[str, Any], message: str) -> None:
    named = {"type": "MuonAdamW", "params": params}
    al = ALConfig.model_validate({"autoencoder_optimizer": named} if block == "autoencoder_optimizer" else {})
    with pytest.raises(ALConfigError, match=f'"(associated_learning.)?{block}.params.*{message}'):
        optimizer_names.check({"optimizer": named} if block == "optimizer" else {}, al)


def test_options_of_other_optimizers_are_left_to_deepspeed() -> None:
    optimizer_names.check({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, ALConfig())


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"momentum": 1.0}, {"adamw_betas": (0.9, 1.0)}, {"ns_steps": 0}, {"ns_dtype": "half"}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: got .*expected"):
        MuonAdamW([parameter(2, 2)], **options)


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (24, 24), (64, 288)])
@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_the_iteration_on_the_gram_matrix_is_that_on_the_matrix(shape: tuple[int, int], decay: float) -> None:
    """Also where singular values lie five powers of ten apart, though the Gram matrix has their squares."""
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -decay, shape[1])
    plain = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = plain @ plain.T
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
    torch.testing.assert_close(orthogonalized(matrix, steps=5, dtype=torch.float64), plain, rtol=0, atol=1e-7)
    torch.testing.assert_close(orthogonalized(matrix, steps=5, dtype=torch.float32).double(), plain, rtol=0, atol=1e-3)


def test_on_a_cpu_the_iteration_runs_in_float32_and_comes_nearer_to_the_exact_direction() -> None:
    """bfloat16, as in torch's own, took ten times the time of float32 on CPUs that have no instructions for it."""
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    by_default = stepped(parameter(24, 40), lambda p: MuonAdamW(p))
    assert torch.equal(by_default, stepped(parameter(24, 40), lambda p: MuonAdamW(p, ns_dtype="float32")))
    assert not torch.equal(by_default, stepped(parameter(24, 40), lambda p: MuonAdamW(p, ns_dtype="bfloat16")))
    double = orthogonalized(matrix, steps=5, dtype=torch.float64)
    errors = [(orthogonalized(matrix, steps=5, dtype=d).double() - double).norm() for d in DTYPES]
    assert errors[0] < 1e-4 < 1e-2 < errors[1]
    values = torch.linalg.svdvals(double)
    assert values.min() > 0.6 and values.max() < 1.3
    tall = orthogonalized(matrix.T, steps=5, dtype=torch.float64)
    torch.testing.assert_close(tall, double.T)
