"""The strongest back-propagation pipelines, beside DeepSpeed's 1F1B: the same weights, evaluation and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.utils import set_random_seed
from torch import Tensor, nn

import ds_al
from ds_al.baseline import build
from ds_al.config.base import BLOCK
from ds_al.errors import ALConfigError
from ds_al.models import build_twin
from ds_al.parallel.world import join_world
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SIZE, CLASSES, BATCHES, SEED = 4, 3, 3, 7
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"in_shape": (1, 4, 4), "widths": (8,) * 6},
    "vgg": {"in_shape": (1, 8, 8), "blocks": ((4, "M"), (6, "M"), (8,), (8,))},
    "transformer": {"vocab_size": 20, "width": 8, "heads": 2, "feed_forward": 12, "dropout": 0.2, "num_blocks": 8},
    "lstm": {"vocab_size": 20, "embedding_width": 6, "width": 5, "dropout": 0.2, "num_blocks": 4},
}
State = dict[str, Tensor]


def batches(network: str, count: int, *, size: int = SIZE, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = SMALL[network].get("in_shape")
    return [
        (
            torch.randint(1, 20, (size, 7), generator=generator)
            if shape is None
            else torch.randn(size, *shape, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def config(method: str, micro_batches: int, **keys: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 10}},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        **keys,
        BLOCK: {"method": method, **keys.get(BLOCK, {})},
    }


def twin(network: str, *, stages: int, kind: type[PipelineModule] = PipelineModule) -> PipelineModule:
    return kind(
        build_twin(network, num_classes=CLASSES, **SMALL[network]),
        num_stages=stages,
        loss_fn=nn.CrossEntropyLoss(),
        seed_layers=True,
        seed_fn=lambda number: set_random_seed(int(number)),
        base_seed=SEED,
        partition_method="uniform",
    )


def state(engine: Any) -> State:
    """Weights, buffers and optimizer state of this rank."""
    found = {name: value.clone() for name, value in engine.module.state_dict().items()}
    for name, parameter in engine.module.named_parameters():
        for key, value in engine.optimizer.state[parameter].items():
            found[f"{name}/{key}"] = torch.as_tensor(value).clone()
    return found


def trained(cases: list[dict[str, Any]]) -> list[Any]:
    """Worker: trains case after case, and evaluates in between; state, losses and evaluations."""
    join_world()
    results = []
    for case in cases:
        module = twin(case["network"], stages=case["stages"], kind=build.module_class(case["method"]))
        engine, *_ = ds_al.initialize(model=module, config=config(case["method"], case["micro_batches"]))
        replicas, replica = engine.topology.replicas, engine.topology.replica
        stream: Iterator[Any] = iter(
            batches(case["network"], BATCHES * case["micro_batches"] * replicas)[replica::replicas]
        )
        held = [*batches(case["network"], 2, seed=5), *batches(case["network"], 1, size=2, seed=6)]
        losses, found = [], []
        for _ in range(BATCHES):
            losses.append(float(engine.train_batch(stream)))
            found.append(engine.evaluate(held))
        results.append((state(engine), losses, found, engine.get_lr()))
        engine.destroy()
    return results


@pytest.mark.parametrize("stages", [*(pytest.param(stages, marks=pytest.mark.slow) for stages in (2, 3)), 4])
def test_zero_bubble_leaves_the_bits_of_1f1b(stages: int) -> None:
    cases = [
        {"network": network, "stages": stages, "micro_batches": m, "method": method}
        for network, m in (("mlp", 1), ("mlp", 6), ("vgg", 4), ("transformer", 8), ("lstm", 4))
        for method in ("bp_1f1b", "bp_zb_h1", "bp_zb_h2")
    ]
    for rank in run_ranks(f"{__name__}:trained", stages, cases=cases):
        for start in range(0, len(cases), 3):
            (want, *rest), *others = rank[start : start + 3]
            for case, (got, *own) in zip(cases[start + 1 :], others, strict=False):
                assert got.keys() == want.keys()
                assert [name for name in want if not torch.equal(got[name], want[name])] == [], case
                assert own == rest, case


def test_replicas_of_a_zero_bubble_pipeline_average_their_gradients() -> None:
    cases = [
        {"network": "mlp", "stages": 2, "micro_batches": 4, "method": method} for method in ("bp_1f1b", "bp_zb_h1")
    ]
    for (want, *rest), (got, *own) in run_ranks(f"{__name__}:trained", 4, cases=cases):
        assert [name for name in want if not torch.equal(got[name], want[name])] == []
        assert own == rest


@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_dualpipev_leaves_the_bits_of_1f1b(stages: int) -> None:
    """Each weight is in one part, and a part takes the micro-batches in order.

    DeepSpeed calls backward once for each tensor of a tuple, so sums in an LSTM depend on where the network is cut: it
    is equal within rounding.
    """
    cases = [
        {"network": network, "stages": stages, "micro_batches": 2 * stages, "method": method}
        for network in ("mlp", "vgg", "transformer", "lstm")
        for method in ("bp_1f1b", "bp_dualpipev")
    ]
    ranks = run_ranks(f"{__name__}:trained", stages, cases=cases)
    for start in range(0, len(cases), 2):
        want, got = ({k: v for rank in ranks for k, v in rank[n][0].items()} for n in (start, start + 1))
        assert got.keys() == want.keys()
        if cases[start]["network"] == "lstm":
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
            continue
        assert [name for name in want if not torch.equal(got[name], want[name])] == [], cases[start]
        for rank in ranks:
            assert rank[start + 1][1:] == rank[start][1:], cases[start]


def delayed(folder: str) -> dict[str, Any]:
    """Worker: ``bp_async``, and the same from a checkpoint after the second batch; weights after each batch."""
    join_world()
    found: dict[str, Any] = {}
    for name in ("whole", "resumed"):
        engine = sgd_engine("bp_async")
        found["start"] = weights(engine)
        stream, found[name] = iter(batches("mlp", 2 * DELAYED)), []
        for number in range(DELAYED):
            if name == "resumed" and number == 2:
                engine.save_checkpoint(folder)
                engine = sgd_engine("bp_async")
                engine.load_checkpoint(folder)
            engine.train_batch(stream)
            found[name].append(weights(engine))
    return found


DELAYED, RATE = 4, 0.1


def sgd_engine(method: str) -> Any:
    optimizer = {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}}
    keys = {key: value for key, value in config(method, 2, optimizer=optimizer).items() if key != "scheduler"}
    return ds_al.initialize(model=twin("mlp", stages=1), config=keys)[0]


def weights(engine: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def test_async_applies_gradients_of_the_weights_before_the_latest_step(tmp_path: Path) -> None:
    (found,) = run_ranks(f"{__name__}:delayed", 1, folder=str(tmp_path))
    network = nn.Sequential(*(spec.build() for spec in build_twin("mlp", num_classes=CLASSES, **SMALL["mlp"])))
    latest, data = list(network.parameters()), batches("mlp", 2 * DELAYED)
    history = [found["start"]]
    with torch.no_grad():
        for parameter, value in zip(latest, found["start"], strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.SGD(latest, lr=RATE, momentum=0.9)
    for number in range(DELAYED):
        used = copy.deepcopy(network)
        with torch.no_grad():
            for parameter, value in zip(used.parameters(), history[max(number - 1, 0)], strict=True):
                parameter.copy_(value)
        for x, labels in data[2 * number : 2 * number + 2]:
            (nn.functional.cross_entropy(used(x), labels) / 2).backward()
        for parameter, source in zip(latest, used.parameters(), strict=True):
            parameter.grad = source.grad
        optimizer.step()
        history.append([parameter.detach().clone() for parameter in latest])
        torch.testing.assert_close(found["whole"][number], history[-1])
        assert all(torch.equal(a, b) for a, b in zip(found["whole"][number], found["resumed"][number], strict=True))


def refused() -> dict[str, str]:
    """Worker: messages of what two stages refuse."""
    join_world()
    v = build.module_class("bp_dualpipev")
    low = {"bf16": {"enabled": True}}
    cases: dict[str, Any] = {
        "plain module": ("bp_dualpipev", {}, 4, PipelineModule),
        "micro-batches": ("bp_dualpipev", {}, 3, v),
        "bf16": ("bp_zb_h1", low, 4, PipelineModule),
        "zero": ("bp_zb_h2", {"zero_optimization": {"stage": 1}}, 4, PipelineModule),
        "stages": ("bp_async", {}, 4, PipelineModule),
        "v module": ("bp_zb_h1", {}, 4, v),
    }
    found = {}
    for name, (method, keys, micro_batches, kind) in cases.items():
        with pytest.raises(ALConfigError) as error:
            ds_al.initialize(model=twin("mlp", stages=2, kind=kind), config=config(method, micro_batches, **keys))
        found[name] = str(error.value)
    at_rest = twin("mlp", stages=2)
    if at_rest.stage_id == 0:
        at_rest.requires_grad_(False)
    with pytest.raises(ALConfigError) as error:
        ds_al.initialize(model=at_rest, config=config("bp_1f1b", 4))
    found["at rest"] = str(error.value)
    return found


def test_what_a_rival_cannot_honour_is_refused_by_name() -> None:
    words = {
        "plain module": "bp_dualpipev got a PipelineModule: expected DeepSpeed's DualPipeVModule",
        "micro-batches": "got 3 for 2 stages of bp_dualpipev: expected at least 4",
        "bf16": '"bf16": bp_zb_h1 trains in float32',
        "zero": '"zero_optimization": bp_zb_h2 trains in float32',
        "stages": "bp_async got a PipelineModule of 2 stages: expected 1",
        "v module": "bp_zb_h1 got a DualPipeVTwin: it is for bp_dualpipev",
        "at rest": "rank 0 (",
    }
    for found in run_ranks(f"{__name__}:refused", 2):
        assert found.keys() == words.keys()
        for name, part in words.items():
            assert part in found[name], found[name]
        assert "stage 0 of 2 has no weight with requires_grad: expected one on each stage" in found["at rest"]


def test_a_deepspeed_without_dualpipev_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.util, "find_spec", lambda name: None)
    with pytest.raises(ALConfigError, match=r"of release 0\.19\.8 and later: got 0\.19"):
        build.check_release()
