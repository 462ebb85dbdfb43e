"""Converted networks whose AL layers span stages: the bits, scores, exports and checkpoints of one stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ds_al
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from tests.support.engines import SEED, different, engine_config, engine_state, merge
from tests.support.hugging_face_models import CASES, WORDS, V

pytestmark = pytest.mark.distributed

BATCHES, MICRO_BATCHES, LM = 2, 4, "causal-lm"
LAYERS: dict[str, dict[str, Any]] = {
    "from_layers": {"schedule": "zb_h1", "objective": "contrast"},
    "bert": {"layers": 1, "schedule": "zb_h2", "options": {"objective": "mse", "code_width": 6}},
    "llama lm tied": {"schedule": "1f1b", "options": {}},
    "llama lm": {
        "schedule": "zb_h1",
        "options": {
            "objective": {"name": "readout", "token_share": 0.8, "vocabulary_share": 0.8, "last_layer": True},
            "bridge_blocks": 1,
        },
    },
}


def texts(*, lm: bool) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Micro-batches ``((ids, mask), labels)``, padded."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(BATCHES * MICRO_BATCHES):
        ids = torch.randint(4, WORDS, (8, 7), generator=generator)
        mask = (torch.arange(7) < torch.randint(3, 8, (8, 1), generator=generator)).long()
        ids = ids.masked_fill(mask == 0, 1)
        labels = ids.masked_fill(mask == 0, -100) if lm else torch.randint(V, (8,), generator=generator)
        batches.append(((ids, mask), labels))
    return batches


def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(V, (8,), generator=generator))
        for _ in range(BATCHES * MICRO_BATCHES)
    ]


def cnn() -> list[Any]:
    """Two convolutions with batch norm, functions and dropout among the layers, and a classifier."""
    return [
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), torch.relu, nn.Dropout(0.2), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), torch.relu, nn.Flatten(1), nn.Linear(96, V),
    ]  # fmt: skip


def make_engine(name: str, stages: int, models: str) -> tuple[ds_al.ALPipelineEngine, list[Any]]:
    case = LAYERS[name]
    if name == "from_layers":
        torch.manual_seed(SEED)
        module = ds_al.from_layers(
            cnn(), num_classes=V, example=images()[0][0], num_al_layers=1, num_stages=stages, base_seed=SEED,
            objective=case["objective"],
        )  # fmt: skip
        batches = images()
    else:
        lm = CASES[name].task == LM
        module = ds_al.from_pretrained(
            f"{models}/{name}", task=CASES[name].task, num_al_layers=case.get("layers", 2), base_seed=SEED,
            num_stages=stages, **case["options"],
        )  # fmt: skip
        batches = texts(lm=lm)
    config = engine_config(
        micro_batches=MICRO_BATCHES,
        group_schedule=case["schedule"],
        steps_per_batch=2,
        count="step",
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 4}},
    )
    return ds_al.initialize(model=module, config=config)[0], batches


def trained(stages: int, folder: str, models: str) -> dict[str, Any]:
    """Worker: weights, rates, scores, measures, and what was exported, by network."""
    found = {}
    for name in LAYERS:
        engine, batches = make_engine(name, stages, models)
        stream = iter(batches)
        for _ in range(BATCHES):
            engine.train_batch(stream)
        scores = [engine.predict(batches[0][0], exit=exit) for exit in range(1, engine.module.num_layers + 1)]
        measures = engine.evaluate(batches[:2])
        options = {"program": "torch.export", "example": batches[0][0]} if name == "from_layers" else {}
        written = ds_al.export(engine, f"{folder}/{name} back", **options)
        engine.save_checkpoint(f"{folder}/{name} saved", tag="end")
        found[name] = engine_state(engine), scores, measures, written, engine.global_steps
    return found


def refused(models: str) -> str:
    """Worker: the error of a model whose output embedding, part of h of the first layer, is its input embedding."""
    with pytest.raises(ALConfigError) as error:
        ds_al.from_pretrained(f"{models}/gpt2 lm", task=LM, num_al_layers=2, objective="readout", num_stages=3)
    return str(error.value)


def test_converted_networks_train_and_come_back_as_on_one_stage(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name in {*LAYERS, "gpt2 lm"} - {"from_layers"}:
        CASES[name].build().save_pretrained(models / name)
    for message in run_ranks(f"{__name__}:refused", 3, models=str(models)):
        assert "AL layer 0: f.0." in message and "h." in message and "learn a copy" in message
    folders = {stages: tmp_path / str(stages) for stages in (1, 3)}
    ranks = {
        stages: run_ranks(f"{__name__}:trained", stages, stages=stages, folder=str(folder), models=str(models))
        for stages, folder in folders.items()
    }
    for name in LAYERS:
        (alone,) = (rank[name] for rank in ranks[1])
        assert different(merge([rank[name][0] for rank in ranks[3]]), alone[0]) == [], name
        for rank in ranks[3]:
            _, scores, *rest = rank[name]
            assert all(torch.equal(one, two) for one, two in zip(scores, alone[1], strict=True)), name
            assert rest == list(alone[2:]), name
        for part in ("back", "saved/end"):  # what is left out are the random states of the stages
            one, two = (
                {file.name: load_file(file) for file in (folder / f"{name} {part}").glob("[!s]*.safetensors")}
                for folder in folders.values()
            )
            assert one.keys() == two.keys() and (one or name == "from_layers"), name
            assert [file for file in one if different(one[file], two[file])] == [], name
