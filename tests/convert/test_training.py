"""Converted models train through the pipeline, bit for bit as in one process, and go back to plain models."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import utils as ds_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

import ds_al
from ds_al.__main__ import main
from ds_al.convert.hugging_face import layer_specs
from ds_al.convert.layers import layer_specs as list_specs
from ds_al.launch.ranks import run_ranks
from ds_al.layer import ALLayer, predict, seed_layer
from ds_al.tensors import stop_gradient
from tests.convert.test_layers import V, cnn
from tests.support import reference, reference_objectives
from tests.support.engines import SEED, State, different, engine_config, merge
from tests.support.hugging_face_models import CASES, WORDS

pytestmark = pytest.mark.distributed

STEPS, MICRO_BATCHES, LR = 12, 4, 3e-3
CONFIG: dict[str, Any] = {"micro_batches": MICRO_BATCHES, "params": {"lr": LR, "torch_adam": True}}


def texts(count: int = STEPS) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Micro-batches ``((ids, mask), labels)``, padded."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = torch.randint(4, WORDS, (8, 7), generator=generator)
        lengths = torch.randint(2, 8, (8, 1), generator=generator)
        mask = (torch.arange(7) < lengths).long()
        batches.append(((ids.masked_fill(mask == 0, 1), mask), torch.randint(V, (8,), generator=generator)))
    return batches


def images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(V, (8,), generator=generator))
        for _ in range(STEPS)
    ]


# ---- the calling pattern of Megatron-DeepSpeed ---------------------------------------------------------


def get_batch_pipe(data: dict[str, Tensor] | None, *, length: int) -> Any:
    """Tokens to ``(inputs, labels)``, cut to the length that the curriculum has reached."""
    if data is None:
        return None
    tokens = data["text"][:, :length].contiguous()
    mask = torch.ones_like(tokens)
    return (tokens, mask), tokens


def token_stream() -> list[dict[str, Tensor]]:
    return [{"text": ids} for (ids, _), _ in texts()]


def curriculum(batch: int) -> int:
    """Length of text of a batch."""
    return (4, 4, 7)[batch]


def megatron_loop(engine: ds_al.ALPipelineEngine, folder: str) -> tuple[State, Any]:
    """Trains and evaluates as Megatron-DeepSpeed's training loop calls a PipelineEngine."""
    assert not engine.is_gradient_accumulation_boundary() or engine.is_first_stage() or engine.is_last_stage()
    # Megatron gives an iterator to the first and the last stage, None to those between.
    stream = token_stream()
    data_iterator: Iterator[Any] | None = iter(stream)
    last_length = None
    for batch in range(STEPS // MICRO_BATCHES):
        length = curriculum(batch)
        engine.set_batch_fn(partial(get_batch_pipe, length=length))
        if last_length not in (None, length):
            engine.reset_activation_shape()
        last_length = length
        loss = engine.train_batch(data_iter=data_iterator)
        assert torch.isfinite(loss) and engine.global_steps == batch + 1
    evaluated = float(engine.eval_batch(iter(stream), bcast_loss=True, reduce_output="avg"))
    rest = engine.evaluate(stream[:2])
    assert ds_al.export(engine, folder) == "classifier"
    engine.save_checkpoint(f"{folder} saved")
    return weights(engine), (evaluated, rest)


# ---- the workers ---------------------------------------------------------------------------------------


def weights(engine: ds_al.ALPipelineEngine) -> State:
    return {f"{i}.{name}": v.clone() for i, layer in engine.layers for name, v in layer.state_dict().items()}


WRONG_EXITS: list[dict[str, Any]] = [
    {"exit": 0},
    {"exit": 3},
    {"exit": True},
    {"average": 3},
    {"exit": 1, "average": 2},
]
WRONG_EXITS += [{"average": "2"}]


def exits_refused(engine: ds_al.ALPipelineEngine, folder: str, **wrong: Any) -> str:
    try:
        ds_al.export(engine, f"{folder}/nowhere", **wrong)
    except ds_al.ALConfigError as error:
        return str(error)
    return "written"


def averaging(pooling: str | None) -> ds_al.ALPipelineModule:
    options: dict[str, Any] = {"task": "sequence-classification", "num_al_layers": 2, "objective": "contrast"}
    return ds_al.from_pretrained(
        CASES["bert"].build(), **options, code_width=6, base_seed=SEED, classifier_pooling=pooling
    )


def trained(folder: str) -> dict[str, Any]:
    """Worker: one converted network after the other; weights, and what was written."""
    results: dict[str, Any] = {}
    config = engine_config(**CONFIG)

    module = ds_al.from_pretrained(
        f"{folder}/bert", task="sequence-classification", num_al_layers=3, objective="mse", code_width=6, base_seed=SEED
    )
    assert any(p.is_meta for p in module._layer_specs[2 if module.stage_id == 0 else 0].parts["f"].parameters())
    engine, *_ = ds_al.initialize(model=module, config=config)
    batches = iter(texts())
    for _ in range(STEPS // MICRO_BATCHES):
        engine.train_batch(batches)
    results["bert"] = weights(engine)
    results["bert scores"] = engine.predict(texts(1)[0][0])
    results["bert written"] = ds_al.export(engine, f"{folder}/bert back")
    engine.save_checkpoint(f"{folder}/bert saved", tag="end")
    results["bert again"] = weights(engine)

    engine, *_ = ds_al.initialize(model=averaging("mean"), config=config)
    batches = iter(texts())
    for _ in range(STEPS // MICRO_BATCHES):
        engine.train_batch(batches)
    results["mean"] = weights(engine)
    results["mean written"] = ds_al.export(engine, f"{folder}/mean back")
    results["mean scores"] = engine.predict(texts(1)[0][0])
    results["first written"] = ds_al.export(engine, f"{folder}/first", exit=1)
    results["first scores"] = engine.predict(texts(1)[0][0], exit=1)
    results["both written"] = ds_al.export(engine, f"{folder}/both", average=2)
    results["both scores"] = engine.predict(texts(1)[0][0], average=2)
    results["exits refused"] = [exits_refused(engine, folder, **wrong) for wrong in WRONG_EXITS]
    engine.save_checkpoint(f"{folder}/mean saved")
    engine, *_ = ds_al.initialize(model=averaging(None), config=config)
    try:
        engine.load_checkpoint(f"{folder}/mean saved")
    except ds_al.ALCheckpointError as error:
        results["mean refused"] = str(error)
    engine.load_checkpoint(f"{folder}/mean saved", load_module_only=True)
    results["mean again"] = weights(engine)

    module = ds_al.from_pretrained(
        CASES["llama lm tied"].build(), task="causal-lm", num_al_layers=2, code_width=6, base_seed=SEED
    )
    engine, *_ = ds_al.initialize(model=module, config=config)
    results["llama"], results["llama evaluated"] = megatron_loop(engine, f"{folder}/llama back")

    module = ds_al.from_layers(
        cnn(), num_classes=V, example=images()[0][0], num_al_layers=2, objective="contrast", base_seed=SEED,
        partition_method="parameters",
    )  # fmt: skip
    engine, *_ = ds_al.initialize(model=module, config=config)
    stream = iter(images())
    for _ in range(STEPS // MICRO_BATCHES):
        engine.train_batch(stream)
    results["cnn"] = weights(engine)
    results["cnn written"] = ds_al.export(engine, f"{folder}/cnn back", program="torch.export", example=images()[0][0])
    results["cnn scores"] = engine.predict(images()[0][0])
    engine.save_checkpoint(f"{folder}/cnn saved")
    try:
        ds_al.export(engine, f"{folder}/nowhere")
    except ds_al.ALConfigError as error:
        results["cnn refused"] = str(error)
    return results


# ---- the same in one process ---------------------------------------------------------------------------


def built(specs: list[Any]) -> list[ALLayer]:
    layers = []
    for index, spec in enumerate(specs):
        ds_utils.set_random_seed(SEED + index)
        layers.append(spec.build())
    return layers


def state(layers: list[ALLayer]) -> State:
    return {f"{i}.{name}": v for i, layer in enumerate(layers) for name, v in layer.state_dict().items()}


def bert_alone() -> State:
    task = "sequence-classification"
    layers = built(layer_specs(CASES["bert"].build(), task=task, num_al_layers=3, objective="mse", code_width=6)[0])
    reference.train(
        layers,
        texts(),
        num_classes=V,
        base_seed=SEED,
        make_optimizer=lambda group: torch.optim.AdamW(group, lr=LR, fused=True),
    )
    return state(layers)


def mean_alone() -> State:
    options: dict[str, Any] = {"task": "sequence-classification", "num_al_layers": 2, "objective": "contrast"}
    layers = built(layer_specs(CASES["bert"].build(), **options, code_width=6, classifier_pooling="mean")[0])
    reference_objectives.train("contrast", layers, texts(), num_classes=V, base_seed=SEED, lr=LR)
    return state(layers)


def llama_alone() -> State:
    """Next-token losses layer by layer, from their formula."""
    layers = built(layer_specs(CASES["llama lm tied"].build(), task="causal-lm", num_al_layers=2, code_width=6)[0])
    optimizers = [torch.optim.AdamW(layer.train().parameters(), lr=LR, fused=True) for layer in layers]
    for step, data in enumerate(token_stream()):
        s, labels = get_batch_pipe(data, length=curriculum(step // MICRO_BATCHES))
        for index, layer in enumerate(layers):
            seed_layer(SEED, layer=index, step=step, part=0)
            s_out = layer.f(s)
            seed_layer(SEED, layer=index, step=step, part=1)
            scores = layer.h(layer.b(layer.reduce(s_out)))
            loss = torch.nn.functional.cross_entropy(
                scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / labels[:, 1:].numel()).backward()
            optimizers[index].step()
            optimizers[index].zero_grad()
            s = stop_gradient(s_out)
    return state(layers)


def cnn_alone() -> State:
    layers = built(
        list_specs(cnn(), num_classes=V, example=images()[0][0], num_al_layers=2, objective="contrast", base_seed=SEED)
    )
    reference_objectives.train("contrast", layers, images(), num_classes=V, base_seed=SEED, lr=LR)
    return state(layers)


def test_converted_models_train_exactly_and_come_back(tmp_path: Path) -> None:
    import transformers

    CASES["bert"].build().save_pretrained(tmp_path / "bert")
    ranks = run_ranks(f"{__name__}:trained", 2, folder=str(tmp_path))
    one = ranks[0]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone_here:
        alone_here.submit(checkpoints_export_by_themselves, tmp_path).result()
    for name, alone in (("bert", bert_alone), ("mean", mean_alone), ("llama", llama_alone), ("cnn", cnn_alone)):
        assert different(merge([rank[name] for rank in ranks]), alone()) == [], name
    assert all(different(rank["bert"], rank["bert again"]) == [] for rank in ranks), "export changes nothing"
    assert [rank["bert written"] for rank in ranks] == ["classifier"] * 2 and one["cnn written"] == "program"

    (ids, mask), _ = texts(1)[0]
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert back").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids, attention_mask=mask).logits, one["bert scores"], rtol=1e-4, atol=1e-5)
    assert one["mean written"] == "program", "no class of transformers computes these scores"
    for how in ("back", "from folder"):
        program = torch.export.load(tmp_path / f"mean {how}" / "inference.pt2").module()
        torch.testing.assert_close(program(ids, mask), one["mean scores"], rtol=1e-4, atol=1e-5)
    program = torch.export.load(tmp_path / "both from folder" / "inference.pt2").module()
    torch.testing.assert_close(program(ids, mask), one["both scores"], rtol=1e-4, atol=1e-5)
    for what in ("first", "both"):
        assert one[f"{what} written"] == "program"
        assert [path.name for path in (tmp_path / what).iterdir()] == ["inference.pt2"], "no plain model, no trunk"
        program = torch.export.load(tmp_path / what / "inference.pt2").module()
        torch.testing.assert_close(program(ids, mask), one[f"{what} scores"], rtol=1e-4, atol=1e-5)
    assert [text.partition(":")[0] for text in one["exits refused"]] == [
        "got exit=0", "got exit=3", "got exit=True", "got average=3", "got average=2", "got average='2'"
    ]  # fmt: skip
    assert ranks[1]["exits refused"] == one["exits refused"] and not (tmp_path / "nowhere").exists()
    assert "classifier_pooling='mean', this network has None" in one["mean refused"]
    assert all(different(rank["mean"], rank["mean again"]) == [] for rank in ranks), "the weights alone are loaded"
    program = torch.export.load(tmp_path / "cnn back" / "inference.pt2").module()
    torch.testing.assert_close(program(images()[0][0]), one["cnn scores"], rtol=1e-4, atol=1e-5)
    assert "program=" in one["cnn refused"] and not (tmp_path / "nowhere").exists()

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama back").eval()
    assert [rank["llama evaluated"] for rank in ranks] == [one["llama evaluated"]] * 2
    loss, evaluated = one["llama evaluated"]
    with torch.no_grad():
        losses = [model(data["text"], labels=data["text"]).loss for data in token_stream()[:MICRO_BATCHES]]
        hits = [
            (model(data["text"]).logits[:, :-1].argmax(dim=2) == data["text"][:, 1:]).float().mean()
            for data in token_stream()[:2]
        ]
    assert loss == pytest.approx(float(sum(losses)) / MICRO_BATCHES, rel=1e-5)
    assert evaluated["loss"][-1] == pytest.approx(float(sum(losses[:2])) / 2, rel=1e-5)
    assert evaluated["accuracy"][-1] == pytest.approx(float(sum(hits)) / 2)
    assert evaluated["samples"] == 2 * 8 * 6, "tokens that have a successor"


def checkpoints_export_by_themselves(folder: Path) -> None:
    """Two stages saved them; this process has no ranks, no engine and no module, and writes the same bits. It is a new
    one, since other tests may have made a world in the one that collects the results."""
    assert not torch.distributed.is_initialized()
    assert ds_al.export(folder / "bert saved", folder / "bert from folder") == "classifier"
    assert main(["export", str(folder / "llama back saved"), str(folder / "llama from folder")]) == 0
    assert ds_al.export(folder / "mean saved", folder / "mean from folder") == "program"
    both = ["export", str(folder / "mean saved"), str(folder / "both from folder"), "--average", "2"]
    assert main(both) == 0 and main([*both[:2], str(folder / "nowhere"), "--exit", "3"]) == 1
    assert not torch.distributed.is_initialized()
    for name in ("bert", "llama"):
        want, got = (load_file(folder / f"{name} {how}" / "model.safetensors") for how in ("back", "from folder"))
        assert different(want, got) == [], name
        configs = [json.loads((folder / f"{name} {how}/config.json").read_text()) for how in ("back", "from folder")]
        assert configs[0] == configs[1], name
    # A network of from_layers is made of functions, which no folder holds: its module has to be given.
    with pytest.raises(ds_al.ALCheckpointError, match=r"does not say how its network was made.*weights=checkpoint"):
        ds_al.export(folder / "cnn saved", folder / "nowhere", program="torch.export")
    assert main(["export", str(folder / "cnn saved"), str(folder / "nowhere")]) == 1
    with pytest.raises(ds_al.ALCheckpointError, match="Complete checkpoints there: end"):
        ds_al.export(folder / "bert saved", folder / "nowhere", tag="epoch_9")
    cut = folder / "bert saved/end/layer_01-model_states.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    with pytest.raises(ds_al.ALCheckpointError, match=r"of AL layer 1 .* it was cut"):
        ds_al.export(folder / "bert saved", folder / "nowhere")
    assert not (folder / "nowhere").exists()


def test_a_language_model_on_one_stage(tmp_path: Path) -> None:
    import transformers

    ((one, two, loss, foreign, scores),) = run_ranks(f"{__name__}:language_model", 1, folder=str(tmp_path))
    assert "labels of (8,): expected (B, ...) and (B, T)" in one and "labels from 4 to 99" in two
    assert torch.isfinite(loss)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(model(*texts(1)[0][0][:1]).logits, scores), "weights of the file, not those of memory"
    saved = load_file(tmp_path / "of checkpoint/model.safetensors")
    assert not saved["transformer.wte.weight"].any(), "of the checkpoint, which was saved with zeroed words"
    assert "AL layer 1" in foreign and "missing" in foreign.lower()


def language_model(folder: str) -> list[Any]:
    """Worker: a language model with a label per sample, with labels beyond the vocabulary, with some ignored; then
    weights of a file are exported."""
    module = ds_al.from_pretrained(CASES["gpt2 lm"].build(), task="causal-lm", num_al_layers=2, code_width=6)
    engine, *_ = ds_al.initialize(model=module, config=engine_config(micro_batches=1))
    (ids, mask), labels = texts(1)[0]
    found: list[Any] = []
    for wrong in (labels, ids.masked_fill(ids == ids.max(), 99).clamp(min=4)):
        with pytest.raises(ds_al.ALDataError) as error:
            engine.train_batch(iter([((ids, mask), wrong)]))
        found.append(str(error.value))
    found.append(engine.train_batch(iter([((ids, mask), ids.masked_fill(mask == 0, -100))])))
    layers = [layer.eval() for _, layer in engine.layers]
    scores = predict(layers, (ids, torch.ones_like(ids)))
    assert scores.shape == (8, 7, WORDS)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    save_file(weights, f"{folder}/weights.safetensors")
    with torch.no_grad():
        layers[0].f[0].embed.words.weight.zero_()
    assert ds_al.export(engine, f"{folder}/back", weights=f"{folder}/weights.safetensors") == "classifier"
    engine.save_checkpoint(f"{folder}/saved")
    module = ds_al.from_pretrained(CASES["gpt2 lm"].build(), task="causal-lm", num_al_layers=2, code_width=6)
    assert ds_al.export(module, f"{folder}/of checkpoint", weights=f"{folder}/saved") == "classifier"
    module = ds_al.from_pretrained(CASES["gpt2 lm"].build(), task="causal-lm", num_al_layers=4, code_width=6)
    with pytest.raises(ds_al.ALCheckpointError, match="has 2 AL layers, this network 4"):
        ds_al.export(module, f"{folder}/no", weights=f"{folder}/saved")
    save_file({name: value for name, value in weights.items() if name != "1.h.weight"}, f"{folder}/cut.safetensors")
    with pytest.raises(ds_al.ALCheckpointError) as error:
        ds_al.export(engine, f"{folder}/no", weights=f"{folder}/cut.safetensors")
    return [*found, str(error.value), scores]
