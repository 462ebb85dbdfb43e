"""Users' blocks and values: what f may return, what a micro-batch may be, which modules layers may share."""

from __future__ import annotations

import copy
import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

import ds_al
from ds_al import errors
from ds_al.batch import BatchPreparation
from ds_al.layer import ALLayer
from ds_al.objectives import Mse
from ds_al.partition.shared import refuse_shared
from ds_al.spec import ALLayerSpec
from ds_al.stage import LocalStage
from tests.support.engines import SEED, engine_config
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks
from tests.support.robustness import Case, Kind, by_name, meet

SECTION = "Users' blocks"
KINDS: list[Kind] = [
    Kind(
        section=SECTION,
        name="a block that works in place on what it is given, or on the user's own tensors",
        outcome="honoured",
        what="Functions that write get copies, in training, evaluation and prediction: the bits are those of the same "
        "block out of place.",
        tests=(
            "tests/test_exactness.py::test_every_schedule_leaves_the_bits_of_the_plain_loop",
            "tests/test_lending.py::test_what_every_function_is_given_stays_as_it_is",
            "tests/test_users.py::test_blocks_that_work_in_place_are_evaluated_alike_and_leave_the_users_tensors",
        ),
    ),
    Kind(
        section=SECTION,
        name="a block that works in place at times only, and not in its first calls",
        outcome="refused",
        what="The call that writes raises an error that names the function and the key `copy_inputs`.",
        tests=("tests/test_lending.py::test_a_function_that_first_writes_later_raises_or_gets_copies_by_a_key",),
    ),
    Kind(
        section=SECTION,
        name="a block that checkpoints itself, reentrant or not",
        outcome="honoured",
        what="It trains as without: its input requires a gradient where the graph of the first call has such a block.",
        tests=(
            "tests/test_lending.py::test_a_block_that_checkpoints_itself_gets_the_gradients_of_one_that_does_not",
            "tests/test_exactness.py::test_every_schedule_leaves_the_bits_of_the_plain_loop",
        ),
    ),
    Kind(
        section=SECTION,
        name="a trained weight that gets no gradient",
        outcome="refused",
        what="After the first batch an error names stage, layer, function, weights; `unused_parameters` allows them.",
        tests=("tests/test_users.py::test_a_trained_weight_without_a_gradient_is_named_unless_it_is_allowed",),
    ),
    Kind(
        section=SECTION,
        name="replicas whose branches differ",
        outcome="honoured",
        what="Gradients are averaged weight by weight, zeros where a replica has none; a weight that none has used "
        "keeps no gradient.",
        tests=("tests/parallel/test_replicas.py::test_replicas_that_use_different_experts_train_as_one_process_does",),
    ),
    Kind(
        section=SECTION,
        name="random numbers in transforms, functions of batches and layers",
        outcome="honoured",
        what="The user's generators (torch, Python, numpy) are as he left them after every call; layers draw from "
        "seeds of their own.",
        tests=(
            "tests/test_users.py::test_random_transforms_and_layers_follow_the_users_seed_and_no_partition",
            "tests/test_users.py::test_every_call_leaves_the_generators_as_the_user_left_them",
        ),
    ),
    Kind(
        section=SECTION,
        name="a weight, module or buffer in two AL layers",
        outcome="refused",
        what="The constructor names both places, on every number of stages.",
        tests=("tests/robustness/test_blocks.py::test_modules_in_two_layers",),
    ),
    Kind(
        section=SECTION,
        name="evaluation, prediction and data inside torch.inference_mode",
        outcome="honoured",
        what="Engine and data can be used for training afterwards.",
        tests=("tests/test_users.py::test_inference_mode_around_evaluation_and_data_leaves_the_engine_usable",),
    ),
    Kind(
        section=SECTION,
        name="a norm, or any module, that is kept in evaluation mode",
        outcome="honoured",
        what="It stays so through evaluations and predictions between batches, as for fine-tuning.",
        tests=("tests/test_evaluation.py::test_evaluation_leaves_every_module_in_its_mode",),
    ),
    Kind(
        section=SECTION,
        name="exits of language models: their mean, and exits by confidence",
        outcome="refused",
        what="predict_early and accuracies of averaged exits name the objective; predict(average=n) averages over the "
        "vocabulary.",
        tests=("tests/convert/test_language_training.py::test_exits_of_every_token_are_averaged_over_the_vocabulary",),
    ),
    Kind(
        section=SECTION,
        name="a layer that returns a tensor without a row for each sample",
        outcome="honoured",
        what="It trains and predicts; predict_early, which lets samples leave, refuses it by layer and shape.",
        tests=("tests/test_evaluation.py::test_samples_cannot_leave_early_where_a_layer_returns_no_row_for_each",),
    ),
    Kind(
        section=SECTION,
        name="weights and inputs whose channels lie last",
        outcome="honoured",
        what="They keep their layout, with the same bits on any number of stages.",
        tests=("tests/test_users.py::test_channels_last_weights_and_inputs_leave_the_same_bits",),
    ),
    Kind(
        section=SECTION,
        name="what f returns",
        outcome="refused",
        what="NamedTuples, dicts, sparse, nested, quantized and meta tensors, scalars, and shapes or types that change "
        "are named by the stage that has them.",
        tests=("tests/robustness/test_blocks.py::test_what_f_returns",),
    ),
    Kind(
        section=SECTION,
        name="what a micro-batch is",
        outcome="refused",
        what="What cannot be trained on is named by the first stage; graphs of the user's are left alone.",
        tests=("tests/robustness/test_blocks.py::test_micro_batches",),
    ),
    Kind(
        section=SECTION,
        name="arguments of the module and of calls of the engine",
        outcome="refused",
        what="Seeds, partition methods, batch sizes and data of a wrong kind are named with what is expected.",
        tests=("tests/robustness/test_blocks.py::test_arguments_and_calls",),
    ),
    Kind(
        section=SECTION,
        name="what an engine keeps of every batch",
        outcome="honoured",
        what="Nothing grows with the number of batches; of losses that nobody gathers the latest 65,536 are kept.",
        tests=("tests/test_users.py::test_nothing_grows_with_the_number_of_batches",),
    ),
]


def given(name: str, value: Any, message: str | None = None) -> Case:
    return Case(name=name, given=value, message=message)


# ---- what f returns ---------------------------------------------------------------------------------

State = namedtuple("State", "hidden mask")
H = torch.randn(8, 4)


class Returns(nn.Module):
    """Returns values of its own, one after another, the last one again and again."""

    def __init__(self, *values: Any) -> None:
        super().__init__()
        self.linear, self.values = nn.Linear(4, 4), list(values)

    def forward(self, x: Tensor) -> Any:
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return value + 0 * self.linear(x) if value is H else value


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(H, 0.1, 0, torch.qint8)


def _nested() -> Tensor:
    return torch.nested.nested_tensor([H[0], H[1, :2]], layout=torch.jagged)


RETURNED: list[Case] = [
    given("a tensor", (H,)),
    given("a tuple with a mask", ((H, H > 0),)),
    given("a tuple with whole numbers and float64", ((H, torch.arange(8), H.double()),)),
    given("a tensor whose channels lie last", (torch.randn(8, 4, 2, 2).to(memory_format=torch.channels_last),)),
    given("a list", ([H],), r"f returned a list; expected a tensor or a plain tuple"),
    given("a dict", ({"h": H},), r"f returned a dict"),
    given("None", (None,), r"f returned a NoneType"),
    given("a number", (1.0,), r"f returned a float"),
    given("an empty tuple", ((),), r"f returned a tuple of \(\)"),
    given("a tuple with a number", ((H, 3),), r"a tuple of \(a tensor, a int\)"),
    given("a tuple of tuples", ((H, (H, H)),), r"a tuple of \(a tensor, a tuple of"),
    given("a NamedTuple", (State(H, H > 0),), r"f returned a NamedTuple State"),
    given("a scalar", (torch.tensor(1.0),), r"without dimensions; expected \(B, \.\.\.\)"),
    given("a sparse tensor", (H.to_sparse(),), r"a tensor of layout torch.sparse_coo"),
    given("a sparse mask", ((H, H.to_sparse_csr()),), r"layout torch.sparse_csr"),
    given("a nested tensor", (_nested(),), r"layout torch.jagged"),
    given("a tensor on meta", (torch.empty(8, 4, device="meta"),), r"meta device or quantized"),
    given("a quantized tensor", (_quantized(),), r"meta device or quantized"),
    given("later a scalar", (H, torch.tensor(1.0)), r"without dimensions"),
    given("later another width", (H, H[:, :3]), r"f returned \(8, 3\) float32 after \(8, 4\) float32"),
    given("later another type", (H, H.double()), r"\(8, 4\) float64 after \(8, 4\) float32"),
    given("later complex", (H, H * 1j), r"complex64 after \(8, 4\) float32.*dynamic_shape=True"),
    given("later a tuple", (H, (H, H)), r"\(8, 4\) float32 and \(8, 4\) float32 after"),
    given("later sparse", (H, H[:, :2].to_sparse()), r"layout torch.sparse_coo"),
    given("later None", (H, None), r"f returned a NoneType"),
]


@by_name(RETURNED)
def test_what_f_returns(case: Case) -> None:
    """On a stage that sends to a next one."""
    layer = ALLayer(Returns(*case.given), *(nn.Linear(4, 4) for _ in "bgh"), reduce=_nothing, name="named")
    stage = LocalStage([(3, layer)], stage_id=1, base_seed=7, device=torch.device("cpu"), fixed_shapes=True)

    def train() -> None:
        for _ in range(2):
            stage.forward(torch.randn(8, 4), torch.randn(8, 4))

    found = meet(case, train)
    assert found is None


def _nothing(s: Any) -> Tensor:
    return H


# ---- micro-batches ----------------------------------------------------------------------------------

X, LABELS = torch.randn(8, 4), torch.arange(8) % 3
WITH_GRAPH = (torch.randn(8, 4, requires_grad=True) * 2, LABELS)
with torch.inference_mode():
    INFERRED = (torch.randn(8, 4), LABELS * 1)
BATCHES: list[Case] = [
    given("a pair", (X, LABELS)),
    given("a list of two", [X, LABELS]),
    given("a NamedTuple of two", State(X, LABELS)),
    given("x in a list", ([X, X > 0], LABELS)),
    given("x with a graph", WITH_GRAPH),
    given("tensors of inference mode", INFERRED),
    given("x whose channels lie last", (torch.randn(8, 2, 3, 3).to(memory_format=torch.channels_last), LABELS)),
    given("x that is a view", (torch.randn(4, 8).t(), LABELS)),
    given("complex x", (X * 1j, LABELS)),
    given("labels of uint8", (X, LABELS.to(torch.uint8))),
    given("None", None, r"no data: pass an iterator"),
    given(
        "a dict",
        {"input_ids": X, "labels": LABELS},
        r"a dict of input_ids, labels: expected \(x, labels\); engine.set_batch_fn",
    ),
    given("three", (X, X, LABELS), r"a tuple of 3: expected \(x, labels\)"),
    given("x in a dict", ({"x": X}, LABELS), r"got x a dict and labels a Tensor: expected tensors"),
    given("x as a NamedTuple", (State(X, X > 0), LABELS), r"NamedTuple State.*pass tuple\(x\)"),
    given("x as numpy", (X.numpy(), LABELS), r"got x a ndarray.*expected tensors"),
    given("x sparse", (X.to_sparse(), LABELS), r"layout torch.sparse_coo.*x.to_dense\(\)"),
    given("x sparse by rows", (X.to_sparse_csr(), LABELS), r"layout torch.sparse_csr"),
    given("x on meta", (X.to("meta"), LABELS), r"on the meta device"),
    given("labels sparse", (X, LABELS.to_sparse()), r"layout torch.sparse_coo"),
    given("labels of floats", (X, LABELS.float()), r"expected integer class numbers"),
    given("labels of bools", (X, LABELS > 0), r"expected integer class numbers"),
    given("complex labels", (X, LABELS * 1j), r"expected integer class numbers"),
    given("labels one-hot", (X, torch.eye(8, 3)), r"expected \(B, \.\.\.\) and \(B,\)"),
    given("labels as a list", (X, [0] * 8), r"labels a list of 8: expected tensors"),
    given("fewer labels", (X, LABELS[:5]), r"expected \(B, \.\.\.\) and \(B,\)"),
    given("a scalar mask", ((X, torch.tensor(1)), LABELS), r"expected \(B, \.\.\.\) and \(B,\)"),
    given("infinite x", (X / 0, LABELS), r"32 values of an input are NaN or infinite"),
]


@by_name(BATCHES)
def test_micro_batches(case: Case) -> None:
    prepare = BatchPreparation(
        objective=Mse(),
        num_classes=3,
        micro_batch_size=8,
        device=torch.device("cpu"),
        check=True,
        dynamic_shape=False,
    )
    found = meet(case, lambda: prepare(case.given))
    if found:
        parts = found[0] if isinstance(found[0], tuple) else (found[0],)
        assert not any(part.requires_grad or part.is_inference() for part in (*parts, found[1]))


# ---- shared modules ---------------------------------------------------------------------------------


class Holding(nn.Module):
    """Uses a module as it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Copying(nn.Module):
    """Uses a copy of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(inner)


def linear() -> LayerSpec:
    return LayerSpec(nn.Linear, 4, 4)


def spec(f: Any, **parts: Any) -> ALLayerSpec:
    return ALLayerSpec(**{"f": f, "b": linear(), "g": linear(), "h": linear(), **parts})


def assigned(to: nn.Module, *, data: bool = False) -> nn.Module:
    """A layer whose weight is that of another one."""
    module = nn.Linear(4, 4)
    if data:
        module.weight.data = to.weight.data
    else:
        module.weight = to.weight
    return module


def with_statistics_of(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    module = nn.BatchNorm1d(4)
    module.running_mean = norm.running_mean
    return module


def made() -> nn.Module:
    return BLOCK


def made_and_copied() -> nn.Module:
    return copy.deepcopy(CACHE["block"])


BLOCK, NORM = nn.Linear(4, 4), nn.BatchNorm1d(4)
CACHE = {"block": BLOCK}
FROZEN = nn.Linear(4, 4).requires_grad_(False)
TABLE = nn.Module()
TABLE.register_buffer("positions", torch.arange(4.0), persistent=False)
LAYER = ALLayer(*(nn.Linear(4, 4) for _ in "fbgh"))
PLACES = r"AL layers 0 and 1 share a tensor, 0\.{}.* and 1\.{}"
SHARED: list[Case] = [
    given("a module", lambda: [spec(BLOCK), spec(BLOCK)], PLACES.format("f", "f")),
    given(
        "a module inside others",
        lambda: [spec(nn.Sequential(linear().build(), BLOCK)), spec(Holding(BLOCK))],
        r"0\.f\.1\.weight and 1\.f\.inner\.weight",
    ),
    given("f of one as b of the other", lambda: [spec(BLOCK), spec(linear(), b=BLOCK)], PLACES.format("f", "b")),
    given("one bridge", lambda: [spec(linear(), b=BLOCK), spec(linear(), b=BLOCK)], PLACES.format("b", "b")),
    given("one g", lambda: [spec(linear(), g=BLOCK), spec(linear(), g=BLOCK)], PLACES.format("g", "g")),
    given("one h", lambda: [spec(linear(), h=BLOCK), spec(linear(), h=BLOCK)], PLACES.format("h", "h")),
    given(
        "one reduce",
        lambda: [spec(linear(), reduce=BLOCK), spec(linear(), reduce=BLOCK)],
        PLACES.format("reduce", "reduce"),
    ),
    given("an assigned weight", lambda: [spec(BLOCK), spec(assigned(BLOCK))], PLACES.format("f", "f")),
    given("the memory of a weight", lambda: [spec(BLOCK), spec(assigned(BLOCK, data=True))], PLACES.format("f", "f")),
    given(
        "the statistics of a batch norm",
        lambda: [spec(NORM), spec(with_statistics_of(NORM))],
        r"0\.f\.running_mean and 1\.f\.running_mean",
    ),
    given("a LayerSpec of a shared module", lambda: [spec(LayerSpec(Holding, BLOCK))] * 2, PLACES.format("f", "f")),
    given(
        "a LayerSpec by keyword", lambda: [spec(LayerSpec(Holding, inner=BLOCK)), spec(BLOCK)], PLACES.format("f", "f")
    ),
    given("a partial", lambda: [spec(functools.partial(Holding, BLOCK)), spec(BLOCK)], PLACES.format("f", "f")),
    given(
        "a closure",
        lambda: (lambda block: [spec(lambda: block), spec(lambda: block)])(nn.Linear(4, 4)),
        PLACES.format("f", "f"),
    ),
    given("a function that returns a global module", lambda: [spec(made), spec(made)], PLACES.format("f", "f")),
    given("an AL layer twice", lambda: [LAYER, LAYER], PLACES.format("f", "f")),
    given("a specification of a module twice", lambda: [spec(BLOCK)] * 2, PLACES.format("f", "f")),
    given("a trained weight frozen elsewhere", lambda: [spec(FROZEN), spec(assigned(FROZEN))]),
    given("a frozen module", lambda: [spec(FROZEN), spec(FROZEN)]),
    given("a module without weights", lambda: [spec(nn.ReLU())] * 2),
    given("a buffer that is not part of the state", lambda: [spec(TABLE), spec(TABLE)]),
    given("a module twice in one layer", lambda: [spec(nn.Sequential(BLOCK, BLOCK)), spec(linear())]),
    given("f and b of one layer", lambda: [spec(BLOCK, b=BLOCK), spec(linear())]),
    given("copies by a LayerSpec", lambda: [spec(LayerSpec(Copying, BLOCK))] * 2),
    given("copies by a closure", lambda: [spec(lambda: copy.deepcopy(BLOCK))] * 2),
    given("copies by a function", lambda: [spec(made_and_copied), spec(made_and_copied)]),
    given("a specification twice", lambda: [spec(linear())] * 2),
]


@by_name(SHARED)
def test_modules_in_two_layers(case: Case) -> None:
    meet(case, lambda: refuse_shared(list(enumerate(case.given()))))


# ---- arguments and calls, in one world of a rank ----------------------------------------------------


def module(**options: Any) -> ds_al.ALPipelineModule:
    return ds_al.ALPipelineModule(NETWORKS["mlp"].layers(), num_classes=4, **{"base_seed": SEED, **options})


def building(**options: Any) -> Callable[[], Any]:
    return functools.partial(module, **options)


def called(method: str, *args: Any, **config: Any) -> Callable[[], Any]:
    def call() -> Any:
        engine = ds_al.initialize(model=module(), config=engine_config(**config))[0]
        return getattr(engine, method)(*args)

    return call


def _batches() -> list[Any]:
    return NETWORKS["mlp"].batches(4)


def _loader() -> Any:
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*NETWORKS["mlp"].batches(1, size=32)[0]), batch_size=8
    )


SEEDS = r"expected an integer from 0 to 4294967291"
CALLS: list[Case] = [
    *(
        given(f"base_seed {seed!r}", building(base_seed=seed), SEEDS)
        for seed in (2**70, 2**32, -1, True, 1.0, "7", None, float("nan"))
    ),
    *(given(f"base_seed {seed}", building(base_seed=seed)) for seed in (0, 2**32 - 5)),
    given("partition by a class", building(partition_method="type:block")),
    given("partition by ALLayer", building(partition_method="type:^ALLayer$")),
    given("partition by parameters", building(partition_method="parameters")),
    given("partition by a group of names", building(partition_method="type:(?:block|linear)")),
    given(
        "partition by a bad expression",
        building(partition_method="type:["),
        r"type:\[.*expected a regular expression over the classes of f: Block",
    ),
    given(
        "partition by a class that is not there",
        building(partition_method="type:attention"),
        r"matches no layer.*Block",
    ),
    given("partition_method text", building(partition_method="x"), r"got partition_method='x': expected uniform"),
    given("partition_method empty", building(partition_method=""), r"expected uniform"),
    given("partition_method profile", building(partition_method="profile"), r"expected uniform"),
    given("partition_method a number", building(partition_method=2), r"expected uniform"),
    given("partition_method None", building(partition_method=None), r"expected uniform"),
    *(
        given(
            f"set_train_batch_size {size!r}", called("set_train_batch_size", size), r"expected a positive multiple of 8"
        )
        for size in (-8, 0, 12, 7, 8.0, True, "16")
    ),
    given("set_train_batch_size 40", called("set_train_batch_size", 40)),
    given(
        "set_train_batch_size that steps do not divide",
        called("set_train_batch_size", 24, steps_per_batch=2),
        r"which steps_per_batch=2 does not divide",
    ),
    given("train with a list", called("train_batch", _batches()), r"got a list: expected an iterator.*iter\(loader\)"),
    given("train with a DataLoader", called("train_batch", _loader()), r"got a DataLoader: expected an iterator"),
    given("train with a tensor", called("train_batch", _batches()[0][0]), r"got a Tensor: expected an iterator"),
    given("train with a batch", called("train_batch", _batches()[0]), r"got a tuple: expected an iterator"),
    given("eval_batch with a list", called("eval_batch", _batches()), r"got a list: expected an iterator"),
    given("evaluate with an iterator", called("evaluate", iter(())), r"expected a sized iterable"),
    given("evaluate with nothing", called("evaluate", []), r"empty data set"),
    given(
        "predict another width",
        called("predict", torch.zeros(2, 5)),
        r"stage 0, AL layer 0 \(Block\), forward in evaluation: RuntimeError: mat1",
    ),
    given("predict a list", called("predict", [1, 2]), r"expected tensors"),
    given("unused_parameters text", called("flush", unused_parameters="maybe"), r"unused_parameters"),
    given("unused_parameters a number", called("flush", unused_parameters=3), r"unused_parameters"),
    given("copy_inputs", called("flush", copy_inputs=True)),
]


CASES: list[Case] = [*RETURNED, *BATCHES, *SHARED, *CALLS]


def answers() -> dict[str, tuple[str, str] | None]:
    """Worker: the error of each case, by name."""
    found: dict[str, tuple[str, str] | None] = {}
    for case in CALLS:
        try:
            case.given()
            found[case.name] = None
        except Exception as error:
            found[case.name] = type(error).__name__, str(error)
    return found


@pytest.fixture(scope="module")
def answered() -> dict[str, tuple[str, str] | None]:
    return run_ranks(f"{__name__}:answers", 1, timeout=150)[0]


@pytest.mark.distributed
@by_name(CALLS)
def test_arguments_and_calls(case: Case, answered: dict[str, tuple[str, str] | None]) -> None:
    def again() -> None:
        if answer := answered[case.name]:
            raise getattr(errors, answer[0], RuntimeError)(answer[1])

    meet(case, again)
