"""Evaluation and prediction through the stages equal plain inference on the same layers, at every exit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

import ds_al
from ds_al.errors import ALLayerError
from ds_al.exits import confidence_of, leaves_at
from ds_al.launch.ranks import run_ranks
from ds_al.layer import ALLayer, predict
from tests.support import reference
from tests.support.engines import MICRO_BATCHES, SEED, different, engine_config, engine_state, make_engine, merge
from tests.support.networks import NETWORKS, tokens

pytestmark = pytest.mark.distributed

NETS = ("vgg", "lstm")


def held_out(network: str) -> list[tuple[Any, Tensor]]:
    """27 samples as batches of 8, 8, 8 and 3; the sequences of the second batch are longer."""
    net = NETWORKS[network]
    batches = net.batches(3, seed=1) + net.batches(1, size=3, seed=2)
    if network == "lstm":
        batches[1] = tokens(torch.Generator().manual_seed(3), 8, length=9), batches[1][1]
    return batches


def score(network: str) -> dict[str, Any]:
    """Worker: trains 2 batches, looks at all exits in every way there is, and trains 4 batches more."""
    engine = make_engine(network)
    batches = iter(NETWORKS[network].batches(6 * MICRO_BATCHES))
    for _ in range(2):
        engine.train_batch(batches)
    first = engine.is_first_stage()
    held = held_out(network)
    found: dict[str, Any] = {
        "evaluate": engine.evaluate(held if first else None),
        "predict": [
            [engine.predict(x if first else None, exit=m) for x, _ in held]
            for m in range(1, engine.module.num_layers + 1)
        ],
        "default": engine.predict(held[0][0] if first else None),
        "exit 0": refusal(engine, held[0][0], exit=0),
        "exit 5": refusal(engine, held[0][0], exit=5),
    }
    found["averaged"] = engine.inference.evaluate(held if first else None, averaged=True)["averaged"]
    found["average of 3"] = [engine.predict(x if first else None, average=3) for x, _ in held]
    found["average of 2 at exit 3"] = engine.predict(held[0][0] if first else None, exit=3, average=2)
    median = sorted(confidence_of(found["predict"][0][0]).tolist())[4]
    found["confidence"] = [0.01, median, 1.0]
    found["early"] = [
        [engine.inference.predict_early(x if first else None, confidence=c) for x, _ in held]
        for c in found["confidence"]
    ]
    found["early_exit"] = engine.inference.evaluate(held if first else None, exit_confidence=found["confidence"])
    for _ in range(2):
        engine.train_batch(batches)
    held_iter = iter(held) if first else None
    found["training"] = engine.module.training
    found["eval_batch"] = engine.eval_batch(held_iter, return_logits=True, num_micro_batches=3)
    found["single"] = engine.eval_batch(held_iter, num_micro_batches=1)
    found["no loss"] = engine.eval_batch(iter(held), compute_loss=False)
    found["losses"] = engine.eval_batch(iter(held), reduce_output=None)
    for _ in range(2):
        engine.train_batch(batches)
    return {**found, "state": engine_state(engine)}


def refusal(engine: Any, x: Any, exit: int) -> str:
    try:
        engine.predict(x, exit=exit)
    except ValueError as error:
        return str(error)
    return ""


def score_all() -> dict[str, dict[str, Any]]:
    """Worker: :func:`score` of each network."""
    return {network: score(network) for network in NETS}


@pytest.fixture(scope="module", params=[1, 2, 3])
def found(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Any]]]:
    """What each rank found, on 1, 2 and 3 stages."""
    return run_ranks(f"{__name__}:score_all", request.param)


def trained(network: str, batches: int) -> tuple[list[ALLayer], reference.Optimizers]:
    """The plain loop's layers after so many batches, in eval mode."""
    net = NETWORKS[network]
    layers = net.build(SEED)
    optimizers = reference.train(
        layers,
        net.batches(batches * MICRO_BATCHES),
        num_classes=net.classes,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, fused=True),
        base_seed=SEED,
    )
    for layer in layers:
        layer.eval()
    return layers, optimizers


@pytest.mark.parametrize("network", NETS)
def test_predict_at_every_exit(found: Any, network: str) -> None:
    layers, _ = trained(network, 2)
    for rank in found:
        for m in range(1, 5):
            for scores, (x, _) in zip(rank[network]["predict"][m - 1], held_out(network), strict=True):
                assert torch.equal(scores, predict(layers, x, exit=m))
        assert torch.equal(rank[network]["default"], predict(layers, held_out(network)[0][0]))
        for m in (0, 5):
            assert f"exit={m}: expected 1..4" in rank[network][f"exit {m}"]


@pytest.mark.parametrize("network", NETS)
def test_evaluate_counts_every_sample_once(found: Any, network: str) -> None:
    layers, _ = trained(network, 2)
    for rank in found:
        result = rank[network]["evaluate"]
        assert result["samples"] == 27
        assert len(result["accuracy"]) == len(result["loss"]) == 4
        for m in range(1, 5):
            scores = torch.cat([predict(layers, x, exit=m) for x, _ in held_out(network)])
            labels = torch.cat([y for _, y in held_out(network)])
            assert result["accuracy"][m - 1] == pytest.approx((scores.argmax(1) == labels).double().mean().item())
            assert result["loss"][m - 1] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)


@pytest.mark.parametrize("network", NETS)
def test_exits_of_all_stages_are_averaged(found: Any, network: str) -> None:
    layers, _ = trained(network, 2)
    held = held_out(network)
    labels = torch.cat([y for _, y in held])
    exits = [torch.cat([predict(layers, x, exit=m).softmax(dim=1) for x, _ in held]) for m in range(1, 5)]
    for rank in found:
        for n, accuracy in enumerate(rank[network]["averaged"], start=1):
            mean = torch.stack(exits[-n:]).mean(0)
            assert accuracy == pytest.approx((mean.argmax(1) == labels).double().mean().item())
        scores = torch.cat(rank[network]["average of 3"])
        assert torch.allclose(scores.exp(), torch.stack(exits[-3:]).mean(0), atol=1e-6)
        scores = rank[network]["average of 2 at exit 3"]
        assert torch.allclose(scores.exp(), torch.stack(exits[1:3]).mean(0)[: len(scores)], atol=1e-6)


@pytest.mark.parametrize("network", NETS)
def test_samples_leave_at_the_first_confident_exit(found: Any, network: str) -> None:
    """At once, some of them at once, and none before the end; what leaves has the scores of its exit."""
    layers, _ = trained(network, 2)
    for rank in found:
        used = set()
        for threshold, early in zip(rank[network]["confidence"], rank[network]["early"], strict=True):
            right = []
            for (scores, exits), (x, labels) in zip(early, held_out(network), strict=True):
                each = torch.stack([predict(layers, x, exit=m) for m in range(1, 5)])
                expected = leaves_at(torch.stack([confidence_of(s) for s in each]), threshold)
                assert exits.tolist() == (expected + 1).tolist()
                torch.testing.assert_close(scores, each[expected, torch.arange(len(labels))])
                right.append(scores.argmax(dim=1) == labels)
                used |= set(exits.tolist())
            outcome = rank[network]["early_exit"]["early_exit"][rank[network]["confidence"].index(threshold)]
            assert outcome.accuracy == pytest.approx(torch.cat(right).double().mean().item())
            assert sum(outcome.left) == pytest.approx(1.0)
        assert {1, 4} <= used
        assert rank[network]["early_exit"]["accuracy"] == rank[network]["evaluate"]["accuracy"]


@pytest.mark.parametrize("network", NETS)
def test_eval_batch_keeps_the_signature_of_deepspeed(found: Any, network: str) -> None:
    layers, _ = trained(network, 4)
    held = held_out(network)
    scores = [predict(layers, x) for x, _ in held]
    losses = [F.cross_entropy(s, y) for s, (_, y) in zip(scores, held, strict=True)]
    for rank in found:
        loss, logits = rank[network]["eval_batch"]
        assert torch.equal(logits, torch.cat(scores[:3]))
        assert loss.item() == pytest.approx(torch.stack(losses[:3]).mean().item())
        assert rank[network]["single"].item() == pytest.approx(losses[3].item())
        assert rank[network]["no loss"] is None
        assert [x.item() for x in rank[network]["losses"]] == pytest.approx([x.item() for x in losses])


@pytest.mark.parametrize("network", NETS)
def test_training_is_exact_around_evaluations(found: Any, network: str) -> None:
    assert all(rank[network]["training"] for rank in found)
    expected = reference.state(*trained(network, 6))
    assert different(merge([rank[network]["state"] for rank in found]), expected) == []


def test_module_predicts_where_one_process_holds_all_layers() -> None:
    (result,) = run_ranks(f"{__name__}:module_scores", 1)
    layers, _ = trained("vgg", 1)
    x = held_out("vgg")[0][0]
    for m in range(1, 5):
        assert torch.equal(result[m - 1], predict(layers, x, exit=m))


def module_scores() -> list[Tensor]:
    """Worker: ``module(x, exit=m)`` after one batch."""
    engine = make_engine("vgg")
    engine.train_batch(iter(NETWORKS["vgg"].batches(MICRO_BATCHES)))
    engine.module.eval()
    return [engine.module(held_out("vgg")[0][0], exit=m) for m in range(1, 5)]


def kept_norms() -> dict[str, Any]:
    """Worker: every norm stays in evaluation mode, as for fine-tuning, and evaluations come between the batches."""
    engine = make_engine("vgg")
    norms = [part for part in engine.module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    held, first = held_out("vgg"), engine.is_first_stage()
    means = [norm.running_mean.clone() for norm in norms]
    batches = iter(NETWORKS["vgg"].batches(2 * MICRO_BATCHES))
    for _ in range(2):
        engine.train_batch(batches)
        engine.evaluate(held if first else None)
        engine.predict(held[0][0] if first else None)
    return {
        "norms": len(norms),
        "modes": {norm.training for norm in norms},
        "others": all(layer.training for _, layer in engine.layers),
        "same": all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, means, strict=True)),
    }


@pytest.mark.parametrize("stages", [1, 2])
def test_evaluation_leaves_every_module_in_its_mode(stages: int) -> None:
    """The first evaluation once ended the evaluation mode of norms: the next batches changed their statistics."""
    for found in run_ranks(f"{__name__}:kept_norms", stages):
        assert found["norms"] > 0
        assert found["modes"] == {False} and found["others"] and found["same"]


class WithTable(nn.Linear):
    """Hands a table on that has no row per sample."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), torch.ones(3, 2)


class FromTable(nn.Linear):
    """Reads what :class:`WithTable` returns."""

    def forward(self, s: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(s[0]) + s[1].mean()


def early_with_a_table() -> str:
    """Worker: what ``predict_early`` says of the table."""
    linear = partial(LayerSpec, nn.Linear)
    layers = [
        ds_al.ALLayerSpec(
            f=LayerSpec(WithTable, 6, 8),
            b=linear(8, 5),
            g=linear(4, 5),
            h=linear(5, 4),
            autoencoder_loss="cross_entropy",
        ),
        ds_al.ALLayerSpec(f=LayerSpec(FromTable, 8, 8), b=linear(8, 5), g=linear(5, 5), h=linear(5, 5)),
    ]
    module = ds_al.ALPipelineModule(layers, num_classes=4)
    engine, *_ = ds_al.initialize(model=module, config=engine_config())
    x = torch.randn(8, 6) if engine.is_first_stage() else None
    assert engine.predict(x).shape == (8, 4)
    with pytest.raises(ALLayerError) as caught:
        engine.inference.predict_early(x, confidence=0.9)
    return str(caught.value)


def test_samples_cannot_leave_early_where_a_layer_returns_no_row_for_each() -> None:
    """Rows of the table were once left out as if they were samples."""
    (told,) = run_ranks(f"{__name__}:early_with_a_table", 1)
    assert "f of AL layer 0 returns a tensor of (3, 2) for 8 samples" in told
