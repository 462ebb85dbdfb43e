"""Optimizers, LR schedules and precision as users bring them: honoured, or refused by name before training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.optim import lr_scheduler

import ds_al
from ds_al.config.optimizers import OptimizerConfig
from ds_al.config.precision import Precision
from ds_al.config.settings import Settings
from ds_al.convert.layers import layer_specs
from ds_al.layer import ALLayer
from ds_al.optim import build, names, schedules
from ds_al.optim.groups import Selection, given_elsewhere
from ds_al.optim.local import LocalOptimizer
from ds_al.optim.masters import stepped
from ds_al.parallel.replicas import Replicas
from tests.support.engines import engine_config
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks
from tests.support.robustness import Case, Kind, by_name, meet
from tests.support.schedules import SCHEDULES

SECTION, PRECISION = "Optimizers and schedules", "Precision"
HERE = "tests/robustness/test_optimizers.py"
GROUPS = "tests/optim/test_groups.py"

KINDS = [
    Kind(
        section=SECTION,
        name="model_parameters: parameter groups with own options, a subset, names, a generator",
        outcome="honoured",
        what="Groups are split by layer and side and keep their options; a warning names weights that are left out.",
        tests=(
            f"{GROUPS}::test_weights_options_and_instances_train_as_in_a_plain_loop",
            f"{HERE}::test_weights_that_are_left_out_are_told",
        ),
    ),
    Kind(
        section=SECTION,
        name="model_parameters that are no weights of the network, that repeat, or whose options are wrong",
        outcome="refused",
        what="An ALConfigError names the group and the weight or option.",
        tests=(f"{HERE}::test_what_cannot_be_trained_is_refused",),
    ),
    Kind(
        section=SECTION,
        name="an optimizer instance, with clipping, bf16, ZeRO-1 and an optimizer of g and h",
        outcome="honoured",
        what="The instance steps the weights, or their masters, between the stage's own clipping and rounding.",
        tests=(
            f"{GROUPS}::test_weights_options_and_instances_train_as_in_a_plain_loop",
            "tests/optim/test_zero.py::test_zero_1_leaves_the_bits_of_plain_copies_in_half_the_memory",
        ),
    ),
    Kind(
        section=SECTION,
        name="an optimizer that contradicts another setting or cannot step by a gradient",
        outcome="refused",
        what="An ALConfigError names it: closures, sparse gradients, foreign weights, two optimizers of g and h.",
        tests=(f"{HERE}::test_what_cannot_be_trained_is_refused", f"{HERE}::test_an_engine_refuses_or_honours"),
    ),
    Kind(
        section=SECTION,
        name="a stage of back-propagation without a weight that trains",
        outcome="refused",
        what="An ALConfigError on all ranks names the stage; an AL stage may be frozen as a whole.",
        tests=(
            "tests/baseline/test_rivals.py::test_what_a_rival_cannot_honour_is_refused_by_name",
            f"{HERE}::test_an_engine_refuses_or_honours",
        ),
    ),
    Kind(
        section=SECTION,
        name="a weight that is frozen after the start",
        outcome="honoured",
        what="It rests while it is frozen and learns again afterwards.",
        tests=(f"{GROUPS}::test_a_weight_that_is_frozen_rests_and_one_that_no_optimizer_has_is_named",),
    ),
    Kind(
        section=SECTION,
        name="a weight that is unfrozen, added or replaced after the start",
        outcome="refused",
        what="The next train_batch names it, since no optimizer steps it.",
        tests=(f"{GROUPS}::test_a_weight_that_is_frozen_rests_and_one_that_no_optimizer_has_is_named",),
    ),
    Kind(
        section=SECTION,
        name="no optimizer",
        outcome="refused",
        what="train_batch says where to give one; evaluation and prediction work without.",
        tests=(f"{HERE}::test_an_engine_refuses_or_honours",),
    ),
    Kind(
        section=SECTION,
        name="a config's optimizer of another type, with unknown keys, or with options that are off their types",
        outcome="refused",
        what='An ALConfigError names the key, what came and what is expected; so with "auto".',
        tests=(f"{HERE}::test_blocks_of_a_config",),
    ),
    Kind(
        section=SECTION,
        name="schedules that cycle momentum (OneCycleLR, CyclicLR, OneCycle), by config, callable and instance",
        outcome="honoured",
        what="They find the momentum or betas of all groups, and checkpoints resume them on any number of stages.",
        tests=(
            f"{HERE}::test_schedules_drive_all_groups_as_they_drive_one_of_torch",
            f"{GROUPS}::test_groups_and_a_momentum_that_cycles_go_on_on_other_stages",
            f"{GROUPS}::test_every_schedule_goes_on_from_a_checkpoint",
        ),
    ),
    Kind(
        section=SECTION,
        name="schedules that are unknown, take a metric or functions, or have wrong parameters",
        outcome="refused",
        what="An ALConfigError names the schedule or its parameter, with the nearest valid one.",
        tests=(f"{HERE}::test_blocks_of_a_config", f"{HERE}::test_an_engine_refuses_or_honours"),
    ),
    Kind(
        section=SECTION,
        name="a schedule of another optimizer than the engine's, or one that ends during training",
        outcome="refused",
        what="An ALConfigError says that nothing would use its rates, or that its steps are over.",
        tests=(f"{HERE}::test_an_engine_refuses_or_honours",),
    ),
    Kind(
        section=PRECISION,
        name="rotary frequencies, constant tables, complex buffers and batch norm under bf16 and fp16",
        outcome="honoured",
        what="They keep their type; all other buffers are cast like the weights.",
        tests=(f"{HERE}::test_what_stays_float32_in_low_precision",),
    ),
    Kind(
        section=PRECISION,
        name='weights in bfloat16, float16 or float64 without "bf16" or "fp16", complex weights with them',
        outcome="refused",
        what="An ALConfigError names the weight, and the block to enable or the conversion.",
        tests=(f"{HERE}::test_what_cannot_be_trained_is_refused",),
    ),
    Kind(
        section=PRECISION,
        name="torch_autocast, amp and data_types",
        outcome="refused",
        what='An ALConfigError names the key; it points to "bf16", or says to remove it.',
        tests=(f"{HERE}::test_blocks_of_a_config",),
    ),
    Kind(
        section=PRECISION,
        name="an embedding with max_norm, under bf16 and fp16",
        outcome="refused",
        what="The forward scales rows of the weights, which a step would set back to their masters.",
        tests=(f"{HERE}::test_what_cannot_be_trained_is_refused",),
    ),
    Kind(
        section=PRECISION,
        name="weights that are set between two batches, by load_state_dict, through .data or from an average (EMA)",
        outcome="honoured",
        what="Masters take them over before the next step and the next save; numbers that stay keep all their digits.",
        tests=(
            "tests/optim/test_precision.py::test_weights_that_the_user_sets_reach_their_masters",
            "tests/test_averages.py::test_an_average_is_that_of_one_process_and_leaves_the_training_alone",
        ),
    ),
    Kind(
        section=PRECISION,
        name="train_batch inside torch.autocast",
        outcome="refused",
        what="Autocast keeps the weights that it has cast, so no forward would read a step; the error points to bf16.",
        tests=("tests/test_bad_input.py::test_what_cannot_train_is_refused_on_every_rank",),
    ),
    Kind(
        section="Defaults",
        name="a network of from_layers or from_pretrained without a word on the objective",
        outcome="honoured",
        what="It learns by greedy, which starts from a model's own scores, at rates at which mse stays near chance.",
        tests=(
            "tests/convert/test_layers.py::test_the_default_objective_learns_at_usual_rates",
            "tests/convert/test_hugging_face.py::test_the_default_objective_fine_tunes_a_small_model",
        ),
    ),
]


# ---- blocks of a config ----------------------------------------------------------------------------------


def optimizer(kind: Any = "AdamW", **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


def schedule(kind: Any, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


NUMBER, FLAG, AUTO = (
    "expected a finite number of at least 0",
    "expected true or false",
    "got .auto., which transformers",
)
ONE_CYCLE = {"max_lr": 0.1, "total_steps": 10}
BLOCKS: list[tuple[str, dict[str, Any], str | None]] = [
    ("optimizer a list", {"optimizer": []}, r'"optimizer": got \[\], expected an object'),
    ("optimizer null", {"optimizer": None}, '"optimizer": got None, expected an object'),
    ("optimizer a name", {"optimizer": "AdamW"}, "\"optimizer\": got 'AdamW', expected an object"),
    ("optimizer empty", {"optimizer": {}}, '"optimizer.type": got None'),
    ("optimizer.type a number", optimizer(3), '"optimizer.type": got 3'),
    ("optimizer.type misspelt", optimizer("AdmaW"), "did you mean 'Adam"),
    ("optimizer.parms", {"optimizer": {"type": "SGD", "parms": {}}}, '"optimizer.parms" is not a key'),
    ("optimizer.params a list", {"optimizer": {"type": "SGD", "params": []}}, '"optimizer.params": got'),
    ("optimizer.legacy_fusion off", {"optimizer": {"type": "Adam", "legacy_fusion": False}}, None),
    ("optimizer.legacy_fusion on", {"optimizer": {"type": "Adam", "legacy_fusion": True}}, "legacy_fusion"),
    ("lr true", optimizer(lr=True), f'"optimizer.params.lr": got True, {NUMBER}'),
    ("lr text", optimizer(lr="0.1"), f"got '0.1', {NUMBER}"),
    ("lr NaN", optimizer(lr=float("nan")), f"got nan, {NUMBER}"),
    ("lr infinite", optimizer(lr=float("inf")), f"got inf, {NUMBER}"),
    ("lr negative", optimizer(lr=-1), f"got -1, {NUMBER}"),
    ("lr a list", optimizer(lr=[0.1]), NUMBER),
    ("lr null", optimizer(lr=None), f"got None, {NUMBER}"),
    ("lr auto", optimizer(lr="auto"), f'"optimizer.params.lr": {AUTO}'),
    ("lr 0", optimizer(lr=0), None),
    ("weight_decay auto", optimizer(weight_decay="auto"), AUTO),
    ("weight_decay negative", optimizer(weight_decay=-0.1), NUMBER),
    ("weight_decay true", optimizer(weight_decay=True), NUMBER),
    ("eps text", optimizer(eps="1e-8"), NUMBER),
    ("eps of Adafactor", optimizer("Adafactor", eps=[1e-30, 1e-3]), None),
    ("momentum true", optimizer("SGD", momentum=True), NUMBER),
    ("betas a number", optimizer(betas=0.9), '"optimizer.params.betas": got 0.9, expected two or more numbers'),
    ("betas of one", optimizer(betas=[0.9]), "expected two or more numbers"),
    ("betas of 1", optimizer(betas=[0.9, 1.0]), "expected two or more numbers"),
    ("betas true", optimizer(betas=[True, 0.9]), "expected two or more numbers"),
    ("betas auto", optimizer(betas="auto"), AUTO),
    ("betas", optimizer(betas=[0.9, 0.99]), None),
    ("amsgrad text", optimizer(amsgrad="false"), f"got 'false', {FLAG}"),
    ("nesterov 1", optimizer("SGD", nesterov=1), FLAG),
    ("fused null", optimizer(fused=None), None),
    ("torch_adam text", optimizer(torch_adam="true"), FLAG),
    ("MuonAdamW ns_dtype auto", optimizer("MuonAdamW", ns_dtype="auto"), None),
    ("MuonAdamW misspelt", optimizer("MuonAdamW", adam_lr=0.1), "did you mean 'adamw_lr'"),
    ("scheduler null", {"scheduler": None}, '"scheduler": got None, expected an object'),
    ("scheduler a name", {"scheduler": "WarmupLR"}, "expected an object"),
    ("scheduler empty", {"scheduler": {}}, '"scheduler.type": got None'),
    ("scheduler unknown", schedule("NoSuchLR"), "got 'NoSuchLR', which neither DeepSpeed nor torch has"),
    ("scheduler misspelt", schedule("WarmpLR"), "did you mean 'WarmupLR'"),
    ("scheduler.type a number", schedule(3), '"scheduler.type": got 3'),
    ("scheduler.type a helper of the module", schedule("Optimizer"), "which neither"),
    ("scheduler.type the base class", schedule("LRScheduler"), "which neither"),
    ("scheduler.parms", {"scheduler": {"type": "WarmupLR", "parms": {}}}, '"scheduler.parms" is not a key'),
    ("scheduler.params a list", {"scheduler": {"type": "WarmupLR", "params": []}}, '"scheduler.params": got'),
    ("ReduceLROnPlateau", schedule("ReduceLROnPlateau"), "whose step takes a metric"),
    ("SequentialLR", schedule("SequentialLR"), "takes functions or schedules"),
    ("LambdaLR", schedule("LambdaLR", lr_lambda="x"), "takes functions or schedules"),
    ("OneCycleLR", schedule("OneCycleLR", **ONE_CYCLE), None),
    ("OneCycleLR rates by group", schedule("OneCycleLR", **{**ONE_CYCLE, "max_lr": [0.1]}), "expected one number"),
    ("OneCycleLR rate true", schedule("OneCycleLR", **{**ONE_CYCLE, "max_lr": True}), "expected a number"),
    ("OneCycleLR no steps", schedule("OneCycleLR", **{**ONE_CYCLE, "total_steps": 0}), "expected 1 or more"),
    ("OneCycleLR flag 1", schedule("OneCycleLR", **ONE_CYCLE, cycle_momentum=1), FLAG),
    ("OneCycleLR name a number", schedule("OneCycleLR", **ONE_CYCLE, anneal_strategy=1), "expected a name"),
    ("CyclicLR function", schedule("CyclicLR", base_lr=0.1, max_lr=0.2, scale_fn="x"), "expected a function"),
    ("StepLR without length", schedule("StepLR"), "missing a required argument: 'step_size'"),
    ("StepLR length 0", schedule("StepLR", step_size=0), '"scheduler.params.step_size": got 0, expected 1 or more'),
    ("MultiStepLR", schedule("MultiStepLR", milestones=[1, 4]), None),
    ("MultiStepLR text", schedule("MultiStepLR", milestones=["1"]), "expected numbers of steps"),
    ("CosineAnnealingLR negative", schedule("CosineAnnealingLR", T_max=5, eta_min=-1), "got -1, expected 0 or more"),
    ("CosineAnnealingWarmRestarts", schedule("CosineAnnealingWarmRestarts", T_0=2, T_mult=2), None),
    ("ExponentialLR from the start", schedule("ExponentialLR", gamma=0.9, last_epoch=-1), None),
    ("ExponentialLR NaN", schedule("ExponentialLR", gamma=float("nan")), "expected a finite number"),
    ("WarmupLR", schedule("WarmupLR", warmup_max_lr=0.1, warmup_type="linear"), None),
    ("WarmupLR misspelt", schedule("WarmupLR", warmup_steps=3), "did you mean 'warmup_num_steps'"),
    ("WarmupLR text", schedule("WarmupLR", warmup_num_steps="10"), "got '10', expected a number"),
    ("WarmupLR auto", schedule("WarmupLR", warmup_max_lr="auto"), f'"scheduler.params.warmup_max_lr": {AUTO}'),
    ("WarmupLR infinite", schedule("WarmupLR", warmup_max_lr=float("inf")), "expected a finite number"),
    ("WarmupDecayLR without steps", schedule("WarmupDecayLR"), "missing a required argument: 'total_num_steps'"),
    ("WarmupDecayLR auto", schedule("WarmupDecayLR", total_num_steps="auto"), AUTO),
    ("LRRangeTest flag 1", schedule("LRRangeTest", lr_range_test_staircase=1), FLAG),
    ("torch_autocast", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, '"torch_autocast".*use "bf16"'),
    ("torch_autocast off", {"torch_autocast": {"enabled": False}}, None),
    ("amp", {"amp": {"enabled": True, "opt_level": "O1"}}, '"amp".*use "bf16"'),
    ("data_types", {"data_types": {"grad_accum_dtype": "bf16"}}, '"data_types"'),
    ("bf16 and fp16", {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "are both enabled"),
    ("bf16 misspelt", {"bf16": {"enable": True}}, "did you mean 'enabled'"),
    ("bf16 a flag", {"bf16": True}, '"bf16" is a bool: expected an object'),
    ("fp16 scale negative", {"fp16": {"enabled": True, "loss_scale": -1}}, "fp16.loss_scale"),
]
CASES = [Case(name=name, given=given, message=message) for name, given, message in BLOCKS]


@by_name(CASES)
def test_blocks_of_a_config(case: Case) -> None:
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, **case.given}

    def start() -> None:
        settings = Settings.of(config, is_al=True)
        names.check(config, settings.al)
        schedules.check(config)

    meet(case, start)


# ---- weights and optimizers ------------------------------------------------------------------------------


def local(
    layers: list[ALLayer],
    *,
    given: Any = None,
    parameters: Any = None,
    elsewhere: tuple[nn.Parameter, ...] = (),
    keys: dict[str, Any] | None = None,
    **al: Any,
) -> LocalOptimizer:
    """The optimizer of a stage with all layers, as an engine makes it."""
    numbered = list(enumerate(layers))
    selection = None
    if parameters is not None:
        selection = Selection.of(parameters, numbered, elsewhere=elsewhere, where="model_parameters")
    config = {"train_micro_batch_size_per_gpu": 8, "associated_learning": al, **(keys or {})}
    default = OptimizerConfig(type="AdamW", params={"lr": 1e-3})
    return build.local_optimizer(
        numbered,
        settings=Settings.of(config, is_al=True),
        replicas=Replicas(0, 1, group=None),
        given=given,
        by_config=lambda block: names.without_engine(block or default, nn.ModuleList(layers)),
        selection=selection,
    )


def weights(layers: list[ALLayer]) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]


class TwoSteps(torch.optim.SGD):
    """Needs the loss anew, as SAM does."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


def in_dtype(layers: list[ALLayer], dtype: torch.dtype) -> list[ALLayer]:
    layers[1].f.to(dtype)
    return layers


def limited(layers: list[ALLayer]) -> list[ALLayer]:
    layers[0].f = nn.Sequential(nn.Embedding(9, 12, max_norm=1.0))
    return layers


BF16 = {"bf16": {"enabled": True}}
SGD_GH = {"autoencoder_optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
Made = Callable[[list[ALLayer]], Any]
TRAINED: list[tuple[str, Made, str | None]] = [
    (
        "model_parameters a number",
        lambda n: local(n, parameters=3),
        "got model_parameters of int: expected an iterable",
    ),
    ("model_parameters one weight", lambda n: local(n, parameters=weights(n)[0]), "model_parameters of Parameter"),
    ("model_parameters text", lambda n: local(n, parameters="f"), "model_parameters of str"),
    ("model_parameters empty", lambda n: local(n, parameters=[]), "model_parameters lists no weights"),
    ("model_parameters empty groups", lambda n: local(n, parameters=[{"params": []}]), "lists no weights"),
    ("model_parameters of names", lambda n: local(n, parameters=["0.f.weight"]), "group 0: got a str: expected param"),
    (
        "model_parameters of tensors",
        lambda n: local(n, parameters=[torch.ones(2)]),
        "got a Tensor: expected parameters",
    ),
    ("a group without params", lambda n: local(n, parameters=[{"lr": 0.1}]), "got a dict with 'lr'"),
    (
        "a weight among groups",
        lambda n: local(n, parameters=[{"params": weights(n)[1:]}, weights(n)[0]]),
        "group 1: got",
    ),
    (
        "a foreign weight",
        lambda n: local(n, parameters=[nn.Parameter(torch.ones(3, 2))]),
        r"shape \[3, 2\] that is not",
    ),
    ("a weight twice", lambda n: local(n, parameters=[*weights(n), weights(n)[0]]), "AL layer 0, f.0.weight is given"),
    (
        "a weight in two groups",
        lambda n: local(n, parameters=[{"params": weights(n)}, {"params": [weights(n)[0]]}]),
        "is given twice: list every weight once",
    ),
    ("group lr true", lambda n: local(n, parameters=[{"params": weights(n), "lr": True}]), f"group 0, lr: .*{NUMBER}"),
    ("group lr text", lambda n: local(n, parameters=[{"params": weights(n), "lr": "1"}]), NUMBER),
    ("group betas", lambda n: local(n, parameters=[{"params": weights(n), "betas": 1}]), "two or more numbers"),
    (
        "group option misspelt",
        lambda n: local(n, parameters=[{"params": weights(n), "weight_decy": 0.1}]),
        "'?weight_decy'? is no option of this optimizer: did you mean 'weight_decay'",
    ),
    (
        "group option of another optimizer",
        lambda n: local(n, given=torch.optim.SGD, parameters=[{"params": weights(n), "betas": (0.9, 0.99)}]),
        "SGD, group layer_00/associated/0, betas is no option of this optimizer, which has lr, momentum",
    ),
    (
        "group option that the optimizer of g and h lacks",
        lambda n: local(n, parameters=[{"params": weights(n), "betas": (0.9, 0.99)}], **SGD_GH),
        "SGD, group layer_00/autoencoder/0, betas is no option",
    ),
    ("groups of generators", lambda n: local(n, parameters=[{"params": iter(weights(n)), "lr": 0.1}]), None),
    ("trained weights by a filter", lambda n: local(n, parameters=filter(lambda p: True, weights(n))), None),
    ("group key for a schedule", lambda n: local(n, parameters=[{"params": weights(n), "lr_scale": 0.1}]), None),
    ("a tuple of weights", lambda n: local(n, parameters=tuple(weights(n))), None),
    ("named weights", lambda n: local(n, parameters=nn.ModuleList(n).named_parameters()), None),
    ("a group of one weight", lambda n: local(n, parameters=[{"params": weights(n)[0], "lr": 0.1}]), None),
    ("weights of f alone", lambda n: local(n, parameters=[p for each in n for p in each.f.parameters()]), None),
    ("weights of other stages, too", lambda n: local(n[:2], parameters=weights(n), elsewhere=(*weights(n[2:]),)), None),
    ("frozen weights among them", lambda n: local([n[0].requires_grad_(False), *n[1:]], parameters=weights(n)), None),
    ("all weights frozen", lambda n: local([each.requires_grad_(False) for each in n]), None),
    ("a class", lambda n: local(n, given=torch.optim.SGD), None),
    ("a partial", lambda n: local(n, given=functools.partial(torch.optim.SGD, lr=0.1)), None),
    (
        "a partial misspelt",
        lambda n: local(n, given=functools.partial(torch.optim.SGD, rate=1)),
        "callable raised TypeE",
    ),
    ("a callable that returns None", lambda n: local(n, given=lambda groups: None), "returned a NoneType: expected"),
    (
        "a callable that ignores its groups",
        lambda n: local(n, given=lambda groups: torch.optim.SGD(weights(n))),
        "returned SGD for other weights than those of the groups",
    ),
    (
        "LBFGS by a callable",
        lambda n: local(n, given=lambda g: torch.optim.LBFGS(g[0]["params"])),
        "other weights|LBFGS",
    ),
    ("LBFGS", lambda n: local(n, given=torch.optim.LBFGS(weights(n))), "LBFGS, whose step evaluates the loss anew"),
    ("SparseAdam", lambda n: local(n, given=torch.optim.SparseAdam(weights(n))), "SparseAdam, which takes sparse"),
    ("a step with a closure", lambda n: local(n, given=TwoSteps(weights(n))), "TwoSteps, whose step evaluates"),
    (
        "differentiable",
        lambda n: local(n, given=torch.optim.SGD(weights(n), differentiable=True)),
        "differentiable: got",
    ),
    ("capturable", lambda n: local(n, given=torch.optim.AdamW(weights(n), capturable=True)), "capturable: got True"),
    ("maximize", lambda n: local(n, given=torch.optim.SGD(weights(n), maximize=True)), None),
    ("foreach", lambda n: local(n, given=torch.optim.AdamW(weights(n), foreach=True)), None),
    ("fused", lambda n: local(n, given=torch.optim.AdamW(weights(n), fused=True)), None),
    ("a rate that is a tensor", lambda n: local(n, given=torch.optim.SGD(weights(n), lr=torch.tensor(0.1))), None),
    ("an instance, bf16", lambda n: local(n, given=torch.optim.SGD(weights(n)), keys=BF16), None),
    (
        "an instance of a foreign weight",
        lambda n: local(n, given=torch.optim.SGD([*weights(n), nn.Parameter(torch.ones(7))])),
        r"optimizer \(SGD\), group 0: got a weight of shape \[7\] that is not in this network",
    ),
    (
        "an instance of g and h, whose optimizer is in the config",
        lambda n: local(n, given=torch.optim.SGD(weights(n)), **SGD_GH),
        r'optimizer \(SGD\) that holds AL layer 0, g.weight, and "associated_learning.autoencoder_optimizer"',
    ),
    ("an instance and its weights", lambda n: local(n, given=torch.optim.SGD(weights(n)), parameters=weights(n)), None),
    (
        "an instance and a subset",
        lambda n: local(n, given=torch.optim.SGD(weights(n)), parameters=weights(n)[:3]),
        "model_parameters that differ from the groups of the optimizer instance",
    ),
    (
        "an instance and groups",
        lambda n: local(n, given=torch.optim.SGD(weights(n)), parameters=[{"params": weights(n), "lr": 1.0}]),
        "model_parameters that differ",
    ),
    (
        "f in bfloat16",
        lambda n: local(in_dtype(n, torch.bfloat16)),
        'AL layer 1, f.0.weight: .*bfloat16.*enable "bf16"',
    ),
    ("f in float16", lambda n: local(in_dtype(n, torch.float16)), 'float16.*enable "fp16"'),
    (
        "f in float64",
        lambda n: local(in_dtype(n, torch.float64)),
        r"float64.*make the model float32, by model.float\(\)",
    ),
    ("f in bfloat16, with bf16", lambda n: local(in_dtype(n, torch.bfloat16), keys=BF16), None),
    ("f in float64, with bf16", lambda n: local(in_dtype(n, torch.float64), keys=BF16), None),
    ("f complex", lambda n: local(in_dtype(n, torch.complex64)), None),
    ("f complex, with bf16", lambda n: local(in_dtype(n, torch.complex64), keys=BF16), "would keep the real part"),
    ("an embedding with max_norm", lambda n: local(limited(n)), None),
    (
        "an embedding with max_norm, with bf16",
        lambda n: local(limited(n), keys=BF16),
        "AL layer 0, f.0: max_norm scales weights in the forward",
    ),
    (
        "frozen f in bfloat16",
        lambda n: local([n[0], in_dtype(n, torch.bfloat16)[1].requires_grad_(False), *n[2:]]),
        None,
    ),
]


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.filterwarnings("ignore:model_parameters lacks")
@by_name([Case(name=name, given=made, message=message) for name, made, message in TRAINED])
def test_what_cannot_be_trained_is_refused(case: Case) -> None:
    meet(case, lambda: case.given(NETWORKS["mlp"].build(7)))


def test_weights_that_are_left_out_are_told() -> None:
    """Such as the bridges, where an optimizer was made of the user's own modules before they became AL layers."""
    layers = NETWORKS["mlp"].build(7)
    of_f = [parameter for layer in layers for parameter in layer.f.parameters()]
    with pytest.warns(
        UserWarning, match=r"optimizer \(SGD\) lacks 24 weights of this stage .*: 0.b.0.weight, .*, \.\.\."
    ):
        local(layers, given=torch.optim.SGD(of_f))
    for layer in layers:
        for part in (layer.b, layer.g, layer.h):
            part.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local(layers, given=torch.optim.SGD(of_f))


def test_weights_of_the_whole_network_are_known_on_every_stage() -> None:
    """Where a user's own modules were given, or a module of each ``LayerSpec``; others are refused."""
    net = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), LayerSpec(nn.Tanh), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    specs = layer_specs(net, num_classes=3, example=torch.randn(2, 4), num_al_layers=2)
    here = [(0, specs[0].build())]
    elsewhere = given_elsewhere(specs, here)
    own = [parameter for layer in net if isinstance(layer, nn.Module) for parameter in layer.parameters()]
    assert {*elsewhere, *here[0][1].parameters()} >= set(own) and not elsewhere & {*here[0][1].parameters()}
    selection = Selection.of(own, here, elsewhere=elsewhere, where="model_parameters")
    assert set(selection.group) == {*here[0][1].f.parameters()}


# ---- schedules -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "instance"])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_drive_all_groups_as_they_drive_one_of_torch(name: str, kind: str) -> None:
    """Rates, momenta and betas, step by step; without a warning that no step was made before."""
    options: dict[str, Any] = {"lr": 0.1, **({"momentum": 0.9} if kind == "SGD" else {})}
    own = torch.optim.SGD if kind == "SGD" else torch.optim.AdamW
    layers = NETWORKS["mlp"].build(7)
    given = own(weights(layers), **options) if kind == "instance" else lambda groups: own(groups, **options)
    ours: Any = local(layers, given=given)
    one: Any = own([nn.Parameter(torch.ones(2))], **options)
    if name == "OneCycle" and kind == "SGD":  # DeepSpeed's cycles the betas of Adam alone
        return
    mine, theirs = SCHEDULES[name](ours), SCHEDULES[name](one)
    metric = (1.0,) if name == "ReduceLROnPlateau" else ()
    for _ in range(8):
        for optimizer, each in ((ours, mine), (one, theirs)):
            optimizer.step()
            each.step(*metric)
        for group in ours.param_groups:
            for key in ("lr", "momentum", "betas"):
                assert group.get(key) == one.param_groups[0].get(key), key


# ---- precision -------------------------------------------------------------------------------------------


class Tables(nn.Module):
    """Buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("positions", torch.rand(4))
        self.register_buffer("inv_freq", torch.rand(4))
        self.register_buffer("full_attention_inv_freq", torch.rand(4))
        self.register_buffer("table", torch.rand(4), persistent=False)
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.rand(4)))
        self.register_buffer("number", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + self.positions


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_what_stays_float32_in_low_precision(low: str) -> None:
    """Bit for bit, and without masters; what is added to activations has their type."""
    layer = ALLayer(f=Tables(), b=nn.Linear(4, 4), g=nn.Linear(3, 4), h=nn.Linear(4, 3))
    before = {name: value.clone() for name, value in [*layer.f.named_parameters(), *layer.f.named_buffers()]}
    dtype = Precision.of({low: {"enabled": True}}).dtype
    optimizer = local([layer], keys={low: {"enabled": True}})
    after = dict([*layer.f.named_parameters(), *layer.f.named_buffers()])
    lowered = {"linear.weight", "linear.bias", "positions"}
    assert {name for name, value in after.items() if value.dtype is dtype} == lowered
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name not in lowered)
    weight = layer.f.norm.weight
    assert stepped(weight) is weight and any(weight is p for g in optimizer.param_groups for p in g["params"])
    assert stepped(layer.f.linear.weight).dtype is torch.float32
    assert layer.f(torch.rand(6, 4, dtype=dtype)).dtype is dtype


# ---- engines ---------------------------------------------------------------------------------------------


def engine_of(**given: Any) -> Any:
    config = engine_config(**given.pop("config", {}))
    if given.pop("without", False):
        del config["optimizer"]
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=7)
    made = {key: value(module) if key.startswith("of_") else value for key, value in given.items()}
    return ds_al.initialize(model=module, config=config, **{key.removeprefix("of_"): v for key, v in made.items()})[0]


def train(engine: Any, batches: int = 1) -> Any:
    data = iter(NETWORKS["mlp"].batches(4 * batches))
    for _ in range(batches):
        engine.train_batch(data)
    return engine


def other_schedule() -> Any:
    return lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), 1)


ENGINES: dict[str, tuple[Callable[[], Any], str | None]] = {
    "no optimizer": (lambda: train(engine_of(without=True)), 'there is no optimizer: give "optimizer" in the config'),
    "no optimizer, back-propagation": (lambda: backprop_without(), "there is no optimizer"),
    "no optimizer, prediction in bf16": (
        lambda: engine_of(without=True, config={"keys": BF16}).predict(torch.zeros(8, 12)), None),
    "a frozen network": (lambda: trained_nothing().get_lr()[0], None),
    "no optimizer, prediction": (lambda: engine_of(without=True).predict(torch.zeros(8, 12)), None),
    "optimizer a number": (lambda: engine_of(optimizer=3), "got optimizer=3: expected a callable"),
    "optimizer a name": (lambda: engine_of(optimizer="AdamW"), "got optimizer='AdamW'"),
    "callable with g and h by the config": (
        lambda: train(engine_of(optimizer=torch.optim.SGD, config=SGD_GH, without=True)), None),
    "schedule a number": (lambda: engine_of(lr_scheduler=3), "got an LR schedule that is a int"),
    "schedule of another optimizer": (lambda: engine_of(lr_scheduler=other_schedule()), "StepLR of another optimizer"),
    "schedule with a metric": (
        lambda: engine_of(lr_scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o)), "ReduceLROnPlateau, whose step"),
    "schedule callable that raises": (
        lambda: engine_of(lr_scheduler=lambda o: 1 / 0), "lr_scheduler cannot be made: ZeroDivisionError"),
    "schedule callable that returns nothing": (lambda: engine_of(lr_scheduler=lambda o: 7), "that is a int: expected"),
    "OneCycleLR without a length": (
        lambda: engine_of(config=schedule("OneCycleLR", max_lr=0.1)),
        r'"scheduler" \(OneCycleLR\) cannot be made with .*ValueError'),
    "OneCycleLR over its end": (
        lambda: train(engine_of(config=schedule("OneCycleLR", max_lr=0.1, total_steps=2)), 4),
        "the LR schedule OneCycleLR cannot be stepped: ValueError: Tried to step"),
    "OneCycleLR over Adam and SGD without momentum to share": (
        lambda: engine_of(config={**SGD_GH, **schedule("OneCycleLR", **ONE_CYCLE)}),
        "Both optimizers of a stage need the momentum that it cycles"),
    "unknown schedule": (lambda: engine_of(config={"scheduler": {"type": "NoSuchLR"}}), "got 'NoSuchLR'"),
    "unknown option": (
        lambda: engine_of(config={"params": {"torch_adam": True, "learning": 1}}), "optimizer.type.*learning"),
    "foreign model_parameters": (
        lambda: engine_of(model_parameters=nn.Linear(2, 2).parameters()), "model_parameters, group 0: got a weight"),
    "instance and schedule instance": (lambda: train(with_instances(), 2), None),
}  # fmt: skip


def backprop_without() -> None:
    module = PipelineModule([nn.Linear(12, 4)], num_stages=1, loss_fn=nn.CrossEntropyLoss())
    config = {key: value for key, value in engine_config(method="bp_1f1b").items() if key != "optimizer"}
    train(ds_al.initialize(model=module, config=config)[0])


def trained_nothing() -> Any:
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=7).requires_grad_(False)
    config = engine_config(optimizer="SGD", params={"lr": 0.1, "momentum": 0.9})
    return train(ds_al.initialize(model=module, config={**config, **schedule("OneCycleLR", **ONE_CYCLE)})[0])


def with_instances() -> Any:
    module = ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, base_seed=7)
    own = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(own, max_lr=0.1, total_steps=9)
    config = engine_config()
    return ds_al.initialize(model=module, config=config, optimizer=own, lr_scheduler=schedule)[0]


def outcomes() -> dict[str, tuple[bool, str]]:
    """Worker: whether each case ended with an error of ours, and its text."""
    found = {}
    for name, (action, _) in ENGINES.items():
        try:
            action()
            found[name] = (True, "")
        except Exception as error:
            found[name] = (isinstance(error, ds_al.ALError), f"{type(error).__name__}: {error}")
    return found


@pytest.fixture(scope="module")
def engines() -> dict[str, tuple[bool, str]]:
    return run_ranks(f"{__name__}:outcomes", 1)[0]


@pytest.mark.distributed
@by_name([Case(name=name, given=name, message=message) for name, (_, message) in ENGINES.items()])
def test_an_engine_refuses_or_honours(case: Case, engines: dict[str, tuple[bool, str]]) -> None:
    ours, text = engines[case.given]

    def again() -> None:
        if text:
            raise ds_al.ALConfigError(text) if ours else AssertionError(text)

    meet(case, again)
