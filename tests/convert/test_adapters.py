"""LoRA of peft inside a model: trained, exported merged and as an adapter. Skipped where peft is not installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_al
from ds_al.convert.hugging_face import layer_specs
from ds_al.convert.loading import load
from ds_al.errors import ALConfigError
from ds_al.launch.ranks import run_ranks
from tests.support.engines import engine_config
from tests.support.hugging_face_models import CASES

peft = pytest.importorskip("peft")

TARGETS = {"bert": ["query", "word_embeddings"], "gpt2 lm": ["c_attn", "c_fc"], "llama lm": ["q_proj", "down_proj"]}


def adapted(name: str, way: str = "wrapped", **options: Any) -> tuple[Any, Any]:
    """The model as it was, and with an adapter whose product is not zero."""
    model = CASES[name].build()
    before = copy.deepcopy(model)
    config = peft.LoraConfig(**{"r": 2, "target_modules": TARGETS[name], "init_lora_weights": False, **options})
    return before, peft.get_peft_model(model, config) if way == "wrapped" else peft.inject_adapter_in_model(
        config, model
    )


@pytest.mark.parametrize("way", ["wrapped", "injected"])
@pytest.mark.parametrize("name", list(TARGETS))
def test_scores_are_those_of_the_adapted_model(name: str, way: str) -> None:
    case = CASES[name]
    _, model = adapted(name, way)
    with torch.no_grad():
        wanted = model.eval()(**case.inputs()).logits
        specs, _ = layer_specs(load(model, task=case.task), task=case.task, num_al_layers=2, objective="greedy")
        found = ds_al.predict([spec.build().eval() for spec in specs], case.x())
    assert torch.equal(found, wanted)


def work(name: str, folder: str) -> Any:
    """Worker: trains, exports, and exports from the checkpoint."""
    case = CASES[name]
    before, model = adapted(name, "wrapped")
    start = {path: weight.detach().clone() for path, weight in model.named_parameters()}
    network = ds_al.from_pretrained(model, task=case.task, num_al_layers=2, objective="greedy")
    config = engine_config(micro_batches=1, params={"lr": 1e-2, "torch_adam": True})
    engine, *_ = ds_al.initialize(model=network, config={**config, "train_micro_batch_size_per_gpu": 3})
    labels = torch.tensor([0, 1, 2]) if case.task == "sequence-classification" else case.x()[0]
    stages = {f"{index}." for index, _ in network.local_layers}
    for _ in range(3):
        engine.train_batch(iter([(case.x(), labels)]))
    moved = {path for path, weight in model.named_parameters() if not torch.equal(weight, start[path])}
    written = [ds_al.export(engine, f"{folder}/engine", adapter=True)]
    engine.save_checkpoint(f"{folder}/checkpoints")
    written.append(ds_al.export(f"{folder}/checkpoints", f"{folder}/checkpoint", adapter=True))
    return moved, written, engine.predict(case.x()), before, stages


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(TARGETS))
def test_adapters_train_alone_and_are_exported(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ranks = run_ranks(f"{__name__}:work", 2, name=name, folder=str(tmp_path))
    moved = set().union(*(rank[0] for rank in ranks))
    assert moved and all(".lora_" in path for path in moved), "frozen weights stay as they were"
    scores, before = ranks[0][2], ranks[0][3]
    for folder in ("engine", "checkpoint"):
        plain = type(before).from_pretrained(tmp_path / folder).eval()
        again = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / folder / "adapter").eval()
        assert not any(".lora_" in path for path, _ in plain.named_parameters())
        for model in (plain, again):
            with torch.no_grad():
                torch.testing.assert_close(model(**case.inputs()).logits, scores, rtol=1e-5, atol=1e-5)
    assert all(rank[1] == ["classifier", "classifier"] for rank in ranks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "the kind LORA, use_dora"),
        ({"modules_to_save": ["classifier"]}, "the kind LORA, modules_to_save"),
        ({"task_type": "SEQ_CLS"}, "modules_to_save.*leave task_type out"),
        ({"target_modules": ["classifier"]}, "adapter at classifier"),
    ],
)
def test_other_adapters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ALConfigError, match=message):
        ds_al.from_pretrained(adapted("bert", **options)[1], task="sequence-classification", num_al_layers=2)


def test_adapters_that_do_not_train_are_refused() -> None:
    task = {"task": "sequence-classification", "num_al_layers": 2}
    _, model = adapted("bert")
    model.merge_adapter()
    with pytest.raises(ALConfigError, match="is merged: expected one that trains"):
        layer_specs(load(model, task=task["task"]), **task)
    _, model = adapted("bert")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ALConfigError, match="adapters default, second: expected one"):
        layer_specs(load(model, task=task["task"]), **task)
    prompts = peft.get_peft_model(
        CASES["bert"].build(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    )
    with pytest.raises(ALConfigError, match="the kind PROMPT_TUNING"):
        load(prompts, task=task["task"])
