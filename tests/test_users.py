"""What users do around an engine: own random numbers, ``inference_mode``, blocks that no one here wrote."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ds_al
from ds_al.errors import ALLayerError
from ds_al.trace import metrics
from tests.support.blocks import Skipped
from tests.support.engines import SEED, State, different, engine_config, engine_state, make_engine, merge
from tests.support.networks import NETWORKS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Noisy(torch.utils.data.Dataset[Any]):
    """Samples with noise of torch's, numpy's and Python's generator."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(12) + float(np.random.rand()) + random.random(), index % 4


def states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def noisy(number: int) -> tuple[State, list[float]]:
    """Trains on such samples, with a function of batches that draws, and layers left out at random."""
    layers = NETWORKS["mlp"].layers()
    layers[1].parts["f"] = layers[3].parts["f"] = SkippedBlock
    module = ds_al.ALPipelineModule(layers, num_classes=4, base_seed=SEED)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(), training_data=Noisy())
    engine.set_batch_fn(lambda batch: (batch[0] * torch.rand(1), batch[1]))
    seed(number)
    for _ in range(8):
        engine.train_batch()
    found = engine.evaluate([(torch.ones(3, 12), torch.zeros(3, dtype=torch.int64))])
    engine.flush()
    return engine_state(engine), found["loss"]


class SkippedBlock(nn.Sequential):
    """For layers of width 16."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 12), Skipped(), nn.Linear(12, 16), nn.Dropout(0.1))


def calls_that_keep_the_generators(folder: str) -> list[str]:
    """Names of calls after which a generator is not as the user left it; one more for an iterator that draws."""
    seed(5)
    before, changed = states(), []
    engine = make_engine("mlp")
    x, labels = NETWORKS["mlp"].batches(1)[0]
    calls = {
        "initialize": lambda: None,
        "train_batch": lambda: engine.train_batch(iter([(x, labels)] * 4)),
        "evaluate": lambda: engine.evaluate([(x, labels)]),
        "eval_batch": lambda: engine.eval_batch(iter([(x, labels)]), num_micro_batches=1),
        "predict": lambda: engine.predict(x),
        "predict early": lambda: engine.inference.predict_early(x, confidence=0.5),
        "save": lambda: engine.save_checkpoint(folder),
        "load of weights": lambda: engine.load_checkpoint(folder, load_module_only=True),
    }
    for name, call in calls.items():
        call()
        if states() != before:
            changed.append(name)
            before = states()
    if engine.is_first_stage():
        expected = [torch.rand(()).item() for _ in range(6)]
        seed(5)
        drawn: list[float] = []

        def stream() -> Iterator[Any]:
            while True:
                drawn.append(torch.rand(()).item())
                yield x, labels

        batches = stream()
    else:
        batches = None
    engine.train_batch(batches)
    engine.eval_batch(batches, num_micro_batches=1)
    if engine.is_first_stage():
        drawn.append(torch.rand(()).item())
        if drawn != expected:
            changed.append("an iterator that draws")
    return changed


def inside_inference_mode(objective: str) -> bool:
    """Evaluates and predicts inside, on tensors made inside, and trains between; the losses are those of no_grad."""
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3)]
    torch.manual_seed(1)
    x, labels = torch.randn(8, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    module = ds_al.from_layers(layers, num_al_layers=2, num_classes=3, example=x, objective=objective)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(micro_batches=1))
    with torch.inference_mode():
        inside = engine.evaluate([(x.clone(), labels.clone())])
        engine.predict(x.clone())
        made_inside = x * 1, labels * 1
    same = inside == engine.evaluate([(x, labels)])
    engine.train_batch(iter([made_inside]))
    with torch.inference_mode():
        engine.eval_batch(iter([made_inside]), num_micro_batches=1)
    engine.train_batch(iter([(x.requires_grad_(), labels)]))
    engine.flush()
    return same and x.grad is None


def channels_last() -> State:
    """Convolutions whose weights and inputs have their channels last."""
    module = ds_al.ALPipelineModule(NETWORKS["vgg"].layers(), num_classes=4, base_seed=SEED)
    module.to(memory_format=torch.channels_last)
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    for x, labels in NETWORKS["vgg"].batches(2):
        x = x.contiguous(memory_format=torch.channels_last)
        engine.train_batch(iter([(x, labels)] * 4))
    engine.flush()
    return engine_state(engine)


class Unused(nn.Linear):
    """Has a branch that nothing uses."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.branch = nn.Linear(16, 16)


def unused(allowed: Any = "raise") -> str:
    """The error of the second layer's stage."""
    layers = NETWORKS["mlp"].layers()
    layers[3].parts["f"] = Unused
    module = ds_al.ALPipelineModule(layers, num_classes=4, base_seed=SEED)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(unused_parameters=allowed))
    try:
        engine.train_batch(iter(NETWORKS["mlp"].batches(4)))
        engine.flush()
    except ALLayerError as error:
        return str(error)
    return ""


def evaluated_in_place() -> tuple[bool, Any]:
    """Whether the user's tensors are as before evaluation; and what it found."""
    engine = make_engine("users")
    batches = NETWORKS["users"].batches(4)
    before = [tuple(part.clone() for part in x) for x, _ in batches]
    for _ in range(10):
        engine.train_batch(iter(batches))
    found = [engine.evaluate(batches), engine.predict(batches[0][0]), engine.predict(batches[0][0], exit=2)]
    found.append(engine.inference.predict_early(batches[0][0], confidence=0.3))
    kept = zip(before, batches, strict=True)
    return all(torch.equal(a, b) for x, (y, _) in kept for a, b in zip(x, y, strict=True)), found


def growing() -> tuple[int, int]:
    """Objects that are left of 40 batches after the first 40, and losses that are kept."""
    metrics.LOSSES_KEPT = 10
    engine = make_engine("mlp", micro_batches=1)
    batch = NETWORKS["mlp"].batches(1)

    def train() -> int:
        for _ in range(40):
            engine.train_batch(iter(batch))
        engine.flush()
        gc.collect()
        return len(gc.get_objects())

    train()
    first = train()
    grown = train() - first
    return grown, len(engine.gather_losses())


def everything(folder: str) -> dict[str, Any]:
    """Worker: all of these."""
    return {
        "noisy": [noisy(number) for number in (1, 1, 2)],
        "changed": calls_that_keep_the_generators(folder),
        "inside": [inside_inference_mode(objective) for objective in ("mse", "decoded", "contrast")],
        "channels last": channels_last(),
        "evaluated": evaluated_in_place(),
        "grown": growing(),
        "allowed": [unused("allow"), unused(["3.f.branch.*"]), unused(["3.f.branch.bias"])],
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What the ranks of 1 and of 2 stages return."""
    return {
        stages: run_ranks(f"{__name__}:everything", stages, timeout=200, folder=str(tmp_path_factory.mktemp("saved")))
        for stages in (1, 2)
    }


Found = dict[int, list[dict[str, Any]]]


def test_random_transforms_and_layers_follow_the_users_seed_and_no_partition(found: Found) -> None:
    (one,), two = found[1], found[2]
    for run in range(3):
        together = merge([rank["noisy"][run][0] for rank in two])
        assert different(one["noisy"][run][0], together) == []
        assert one["noisy"][run][1] == two[0]["noisy"][run][1]
    first, again, other = (state for state, _ in one["noisy"])
    assert different(first, again) == [] and different(first, other)


def test_every_call_leaves_the_generators_as_the_user_left_them(found: Found) -> None:
    assert [rank["changed"] for ranks in found.values() for rank in ranks] == [[]] * 3


def test_inference_mode_around_evaluation_and_data_leaves_the_engine_usable(found: Found) -> None:
    assert [rank["inside"] for ranks in found.values() for rank in ranks] == [[True] * 3] * 3


def test_channels_last_weights_and_inputs_leave_the_same_bits(found: Found) -> None:
    assert different(found[1][0]["channels last"], merge([rank["channels last"] for rank in found[2]])) == []


def test_blocks_that_work_in_place_are_evaluated_alike_and_leave_the_users_tensors(found: Found) -> None:
    (kept, values), *others = (rank["evaluated"] for ranks in found.values() for rank in ranks)
    for other_kept, other in others:
        assert kept and other_kept and values[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(values[1:3], other[1:3], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(values[3], other[3], strict=True))


def test_nothing_grows_with_the_number_of_batches(found: Found) -> None:
    for ranks in found.values():
        for rank in ranks:
            grown, losses = rank["grown"]
            assert abs(grown) < 40 and losses == 10


def test_a_trained_weight_without_a_gradient_is_named_unless_it_is_allowed(found: Found) -> None:
    allowed, by_name, other = found[1][0]["allowed"]
    assert allowed == by_name == ""
    assert "stage 0, AL layer 3 (Unused), f: got no gradient in the first batch" in other
    assert "3.f.branch.weight;" in other and "3.f.branch.bias" not in other
    assert found[2][0]["allowed"] == [""] * 3
    assert "stage 1, AL layer 3 (Unused), f: got no gradient" in found[2][1]["allowed"][2]
