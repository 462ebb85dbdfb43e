"""Language models train bit for bit as their formulas say, whatever the partition, and come back as plain models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import utils as ds_utils
from torch import Tensor

import ds_al
from ds_al.convert.hugging_face import layer_specs
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from ds_al.layer import ALLayer, predict
from tests.support import reference_language
from tests.support.engines import SEED, State, different, engine_config, merge
from tests.support.hugging_face_models import CASES, WORDS

pytestmark = pytest.mark.distributed

LM, K, STEPS, MICRO_BATCHES, LR = "causal-lm", 4, 8, 4, 3e-3
# Micro-batches of 4 x 7 tokens: fewer than the vocabulary's 40, so that candidates are drawn.
BATCH, LENGTH = 4, 7
CASE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "private head": ("gpt2 lm", {"name": "next_token"}, {"bridge_blocks": 1, "code_width": 6}),
    "private head, a third of the tokens": (
        "gpt2 lm",
        {"name": "next_token", "token_share": 0.3},
        {"bridge_blocks": 1, "code_width": 6},
    ),
    "tied readout": ("gpt2 lm", {"name": "readout", "refresh_every": 3}, {}),
    "readout of its own": ("llama lm", {"name": "readout", "refresh_every": 3}, {"bridge_blocks": 2}),
    "readout, half of the tokens": ("gpt2 lm", {"name": "readout", "refresh_every": 3, "token_share": 0.5}, {}),
    "private head, over a part of the vocabulary": (
        "gpt2 lm",
        {"name": "next_token", "vocabulary_share": 0.7},
        {"code_width": 6},
    ),
    "the last layer over a part of the vocabulary, too": (
        "llama lm",
        {"name": "next_token", "vocabulary_share": 0.7, "last_layer": True},
        {"code_width": 6},
    ),
    "readout, part of tokens and vocabulary": (
        "gpt2 lm",
        {"name": "readout", "refresh_every": 3, "token_share": 0.5, "vocabulary_share": 0.6},
        {},
    ),
    "codes": ("gpt2 lm", {"name": "token_codes", "negatives": 3}, {"bridge_blocks": 1}),
    "published codes": ("llama lm", {"name": "token_codes", "codes": "autoencoder"}, {"code_width": 6}),
    "codes by bridges": ("qwen3 lm", {"name": "token_codes", "codes": "associated"}, {"code_width": 6}),
}
"""Model, objective, options of the conversion."""
PARTS_OF_OTHERS = (
    "private head",
    "readout, half of the tokens",
    "private head, over a part of the vocabulary",
    "codes",
)
"""Cases of which other ones have every option."""


def texts(count: int = STEPS, *, seed: int = 3) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Micro-batches ``((ids, mask), labels)``; what is padding is not learned."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, WORDS, (BATCH, LENGTH), generator=generator)
        mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (BATCH, 1), generator=generator)).long()
        ids = ids.masked_fill(mask == 0, 1)
        batches.append(((ids, mask), ids.masked_fill(mask == 0, -100)))
    return batches


def make_engine(name: str, models: str) -> ds_al.ALPipelineEngine:
    """Of a model in memory; the readouts are of models on disk, whose layers of other stages are freed."""
    model, objective, options = CASE[name]
    made = CASES[model].build() if "readout" not in name else f"{models}/{model}"
    module = ds_al.from_pretrained(made, task=LM, num_al_layers=K, objective=objective, base_seed=SEED, **options)
    config = engine_config(micro_batches=MICRO_BATCHES, params={"lr": LR, "torch_adam": True})
    config["train_micro_batch_size_per_gpu"] = BATCH
    engine, *_ = ds_al.initialize(model=module, config=config)
    return engine


def state_of(engine: ds_al.ALPipelineEngine) -> State:
    return {f"{i}.{name}": v.clone() for i, layer in engine.layers for name, v in layer.state_dict().items()}


def trained(names: list[str], folder: str, checkpoint: str, models: str) -> dict[str, tuple[State, Any, str]]:
    """Worker: weights of each case with the scores of every exit, what evaluation says, and what export wrote.

    Two stages save the tied readout after one batch, between two refreshes, and train on; one stage goes on from there.
    """
    results = {}
    for name in names:
        engine = make_engine(name, models)
        batches = texts()
        for batch in range(STEPS // MICRO_BATCHES):
            engine.train_batch(iter(batches[batch * MICRO_BATCHES :]))
            if engine.num_stages == 2 and name == "tied readout" and batch == 0:
                engine.save_checkpoint(checkpoint)
        state = state_of(engine)
        x = texts(1, seed=5)[0][0] if engine.is_first_stage() else None
        scores = {f"exit {exit}": engine.predict(x, exit=exit) for exit in range(1, K + 1)}
        if engine.is_first_stage():
            state |= scores
        evaluated = engine.evaluate(texts(2, seed=6))
        results[name] = state, evaluated, ds_al.export(engine, f"{folder}/{name}")
        engine.flush()
    if engine.num_stages == 1:
        engine = make_engine("tied readout", models)
        engine.load_checkpoint(checkpoint)
        engine.train_batch(iter(texts()[MICRO_BATCHES:]))
        results["resumed"] = state_of(engine), None, ""
    return results


def alone(name: str) -> list[ALLayer]:
    """The same by the plain loop."""
    model, objective, options = CASE[name]
    specs, _ = layer_specs(CASES[model].build(), task=LM, num_al_layers=K, objective=objective, **options)
    layers = []
    for index, spec in enumerate(specs):
        ds_utils.set_random_seed(SEED + index)
        layers.append(spec.build())
    reference_language.train(layers=layers, batches=texts(), vocabulary=WORDS, base_seed=SEED, lr=LR, **objective)
    return [layer.eval() for layer in layers]


def expected(layers: list[ALLayer]) -> State:
    state = {f"{i}.{name}": v for i, layer in enumerate(layers) for name, v in layer.state_dict().items()}
    x = texts(1, seed=5)[0][0]
    return state | {f"exit {e}": predict(layers, x, exit=e, num_classes=WORDS) for e in range(1, K + 1)}


@pytest.mark.parametrize(
    ("partitions", "names"),
    [
        ((2, 1), [name for name in CASE if name not in PARTS_OF_OTHERS]),
        pytest.param((2, 1, 4), list(CASE), marks=pytest.mark.slow),
    ],
    ids=["2-1", "2-1-4"],
)
def test_any_partition_leaves_the_bits_of_the_formula_and_the_model_comes_back(
    tmp_path: Path, partitions: tuple[int, ...], names: list[str]
) -> None:
    import transformers

    models, checkpoint = str(tmp_path / "models"), str(tmp_path / "checkpoint")
    for name in names:
        model, *_ = CASE[name]
        if "readout" in name:
            CASES[model].build().save_pretrained(f"{models}/{model}")
    layers = {name: alone(name) for name in names}
    want = {name: expected(each) for name, each in layers.items()}
    evaluated: dict[str, Any] = {}
    for stages in partitions:
        folder = str(tmp_path / str(stages))
        ranks = run_ranks(
            f"{__name__}:trained", stages, names=names, folder=folder, checkpoint=checkpoint, models=models
        )
        for name in names:
            assert different(merge([rank[name][0] for rank in ranks]), want[name]) == [], (name, stages)
            assert [rank[name][2] for rank in ranks] == ["classifier"] * stages
            assert evaluated.setdefault(name, ranks[0][name][1]) == ranks[0][name][1]
        if stages == 1:
            tied = {key: v for key, v in want["tied readout"].items() if not key.startswith("exit")}
            assert different(ranks[0]["resumed"][0], tied) == [], "saved by two stages, gone on with by one"
            assert torch.equal(tied["0.f.0.embed.words.weight"], tied["0.h.weight"]), "the readout is the embedding"
    for name in names:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "2" / name).eval()
        ids, mask = texts(1, seed=5)[0][0]
        with torch.no_grad():
            scores = model(ids, attention_mask=mask).logits
            made = model.generate(ids[:1, :3], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=1)
            by_hand = ids[:1, :3]
            for _ in range(3):
                best = predict(layers[name], (by_hand, torch.ones_like(by_hand)), num_classes=WORDS)[:, -1:].argmax(2)
                by_hand = torch.cat([by_hand, best], dim=1)
        torch.testing.assert_close(scores, want[name][f"exit {K}"], rtol=1e-4, atol=1e-5)
        assert torch.equal(made, by_hand), name
        losses = [
            model(x, attention_mask=mask, labels=labels).loss * (labels[:, 1:] != -100).sum()
            for (x, mask), labels in texts(2, seed=6)
        ]
        tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in texts(2, seed=6))
        assert evaluated[name]["loss"][-1] == pytest.approx(float(sum(losses)) / tokens, rel=1e-4), "ln of perplexity"
        assert evaluated[name]["samples"] == tokens


def averaged() -> dict[str, Any]:
    """Worker: the mean of two exits, and what asks for one class per sample."""
    engine = make_engine("private head", "")
    first = engine.is_first_stage()
    x, batches = texts(1, seed=5)[0][0] if first else None, texts(2, seed=6) if first else None
    found: dict[str, Any] = {
        "exits": [engine.predict(x, exit=exit) for exit in (K - 1, K)],
        "average": engine.predict(x, average=2),
    }
    for name, call in {
        "predict_early": lambda: engine.inference.predict_early(x, confidence=0.5),
        "averaged": lambda: engine.inference.evaluate(batches, averaged=True),
        "exit_confidence": lambda: engine.inference.evaluate(batches, exit_confidence=(0.5,)),
    }.items():
        with pytest.raises(ALConfigError) as caught:
            call()
        found[name] = str(caught.value)
    return found


def test_exits_of_every_token_are_averaged_over_the_vocabulary() -> None:
    """The softmax was once taken over the tokens of a text."""
    for found in run_ranks(f"{__name__}:averaged", 2):
        mean = torch.stack([scores.softmax(dim=2) for scores in found["exits"]]).mean(0)
        assert found["average"].shape == (BATCH, LENGTH, WORDS)
        torch.testing.assert_close(found["average"].exp(), mean)
        for name in ("predict_early", "averaged", "exit_confidence"):
            assert found[name].startswith(f"{name}: got an objective of language models")
