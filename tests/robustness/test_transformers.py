"""Inputs, options and weights of models of transformers, and arguments of ``ALTrainer``."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ds_al.batch import BatchPreparation, input_check
from ds_al.convert import batch_fn
from ds_al.convert.hugging_face import layer_specs
from ds_al.convert.loading import load
from ds_al.errors import ALConfigError
from ds_al.layer import predict
from ds_al.objectives import resolve
from ds_al.trainer import elsewhere
from ds_al.trainer.arguments import ALTrainingArguments
from ds_al.trainer.batches import Batches, check_datasets
from ds_al.trainer.callbacks import check_callback, of_loggers
from tests.convert.test_hugging_face import built
from tests.support.hugging_face_models import CASES as MODELS
from tests.support.hugging_face_models import LM
from tests.support.robustness import Case, Kind, by_name, meet

INPUTS, TRAINER = "Inputs of transformers models", "ALTrainer"
CLASSIFY = "sequence-classification"
HERE = "tests/robustness/test_transformers.py"

KINDS: list[Kind] = [
    Kind(
        section=INPUTS,
        name="masks of any type (B, T)",
        outcome="honoured",
        what="Booleans, integers and floats of 0 and 1 give the model's own scores, rows without a token among them.",
        tests=(
            "tests/convert/test_batches.py::test_a_mask_of_any_type_hides_the_same",
            "tests/convert/test_batches.py::test_a_row_without_tokens_is_as_in_the_model",
        ),
    ),
    Kind(
        section=INPUTS,
        name="masks that are added, of pairs of tokens, or that number packed texts",
        outcome="refused",
        what="The message names the form or the values, and asks for one text per row.",
        tests=(f"{HERE}::test_batches", f"{HERE}::test_tensors"),
    ),
    Kind(
        section=INPUTS,
        name="position_ids and every other key of a batch",
        outcome="refused",
        what="A key that is not used is named with the reason; none is dropped.",
        tests=(f"{HERE}::test_batches",),
    ),
    Kind(
        section=INPUTS,
        name="token types without a mask",
        outcome="honoured",
        what="All tokens are visible, as in the model.",
        tests=("tests/convert/test_batches.py::test_token_types_do_not_take_the_place_of_a_missing_mask",),
    ),
    Kind(
        section=INPUTS,
        name="a decoder that classifies, without a padding token",
        outcome="honoured",
        what="It reads the last token of the mask; ids of several texts alone are refused.",
        tests=(
            "tests/convert/test_batches.py::test_a_classifier_without_a_padding_token_reads_the_last_token_of_the_mask",
        ),
    ),
    Kind(
        section=INPUTS,
        name="a padding token that also ends texts",
        outcome="honoured",
        what="Ids alone are all visible, as in transformers, so the end of a text stays part of it.",
        tests=("tests/convert/test_batches.py::test_a_padding_token_that_ends_texts_hides_none_of_them",),
    ),
    Kind(
        section=INPUTS,
        name="texts longer than the model's positions, ids outside of its vocabulary",
        outcome="refused",
        what="The message has both numbers and the remedy.",
        tests=(f"{HERE}::test_tensors",),
    ),
    Kind(
        section=INPUTS,
        name="options of a config, attention implementations, bfloat16, recomputed blocks",
        outcome="honoured",
        what="The blocks are the model's own, so are its scores and gradients.",
        tests=(
            "tests/convert/test_plain_model.py::test_options_of_a_config_are_in_the_blocks",
            "tests/convert/test_plain_model.py::test_the_attention_of_the_model_is_used",
            "tests/convert/test_plain_model.py::test_a_model_in_bfloat16_computes_in_it",
            "tests/convert/test_plain_model.py::test_a_model_that_recomputes_its_blocks_learns_the_same",
        ),
    ),
    Kind(
        section=INPUTS,
        name="regression, several labels per sample, one label",
        outcome="refused",
        what="problem_type and num_labels are named before training.",
        tests=(f"{HERE}::test_models",),
    ),
    Kind(
        section=INPUTS,
        name="a model that is not what its class and config say",
        outcome="refused",
        what="Replaced modules, low-rank layers written by hand, shapes, functions, quantized or unloaded weights are "
        "named before training, since an export could not hold them.",
        tests=(f"{HERE}::test_models",),
    ),
    Kind(
        section=INPUTS,
        name="LoRA of peft",
        outcome="honoured",
        what="Adapters train beside frozen weights, are saved, and exported merged and as an adapter; others are "
        "refused.",
        tests=(
            "tests/convert/test_adapters.py::test_adapters_train_alone_and_are_exported",
            "tests/convert/test_adapters.py::test_other_adapters_are_refused",
        ),
    ),
    Kind(
        section=INPUTS,
        name="numbers of layers, groups and codes",
        outcome="refused",
        what="What is no whole number of 1 or more, or does not fit the model, is named.",
        tests=(f"{HERE}::test_counts",),
    ),
    Kind(
        section=INPUTS,
        name="names and folders of models",
        outcome="refused",
        what="Missing, cut, pickled or foreign weights and code of a folder end in an error of ours, without a "
        "question, a download or code that runs.",
        tests=(f"{HERE}::test_folders",),
    ),
    Kind(
        section=TRAINER,
        name="loggers of transformers",
        outcome="honoured",
        what="W&B, TensorBoard, MLflow, Comet, ClearML, DVCLive and Trackio log, by report_to or as a callback, with "
        "the settings of the config; one that saves the model by a Trainer is refused.",
        tests=(
            "tests/trainer/test_loggers.py::test_wandb_has_settings_and_metrics",
            "tests/trainer/test_loggers.py::test_loggers_that_are_installed_work",
            f"{HERE}::test_arguments",
        ),
    ),
    Kind(
        section=TRAINER,
        name="arguments of TrainingArguments and Trainer that it has not",
        outcome="refused",
        what="The message names what to use instead.",
        tests=(f"{HERE}::test_arguments", f"{HERE}::test_every_argument_of_transformers_is_known_or_named"),
    ),
    Kind(
        section=TRAINER,
        name="rows that are mappings, pairs or objects; columns that no model takes",
        outcome="honoured",
        what="They are collated as in transformers and torch; unused columns are left out, model inputs never.",
        tests=(f"{HERE}::test_rows",),
    ),
    Kind(
        section=TRAINER,
        name="streams, loaders, several and empty data sets",
        outcome="refused",
        what="They are named before training.",
        tests=(f"{HERE}::test_data_sets",),
    ),
]

# ---- batches of a collator -----------------------------------------------------------------------------

IDS = torch.arange(4, 16).reshape(2, 6)
ONES = torch.ones(2, 6, dtype=torch.int64)
LABELS = torch.tensor([0, 1])
ADDED = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
PLAIN = {"input_ids": IDS, "attention_mask": ONES, "labels": LABELS}
KEYS = (
    "position_ids", "inputs_embeds", "past_key_values", "cache", "use_cache", "cache_position", "cu_seq_lens_q",
    "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "decoder_input_ids", "decoder_attention_mask",
    "encoder_hidden_states", "encoder_attention_mask", "output_attentions", "output_hidden_states", "return_dict",
    "head_mask", "label", "label_ids", "special_tokens_mask", "offset_mapping", "length", "idx", "num_items_in_batch",
)  # fmt: skip
BATCHES = [
    Case(name="a mask of booleans", given={**PLAIN, "attention_mask": ONES.bool()}, message=None),
    Case(name="a mask of floats 0 and 1", given={**PLAIN, "attention_mask": ONES.float()}, message=None),
    Case(name="pixels", given={"pixel_values": torch.zeros(2, 3, 4, 4), "labels": LABELS}, message=None),
    Case(name="a 4D mask that is added", given={**PLAIN, "attention_mask": ADDED}, message="that are added"),
    Case(name="a 2D mask that is added", given={**PLAIN, "attention_mask": ADDED[:, 0, 0]}, message="that are added"),
    Case(name="a 4D mask of booleans", given={**PLAIN, "attention_mask": ADDED == 0}, message=r"bool \(2, 1, 6, 6\)"),
    Case(name="a 3D mask", given={**PLAIN, "attention_mask": ADDED[:, 0] == 0}, message=r"bool \(2, 6, 6\)"),
    Case(name="a mask that numbers texts", given={**PLAIN, "attention_mask": IDS // 7}, message="values from 0 to 2"),
    Case(name="a mask of -1", given={**PLAIN, "attention_mask": -ONES}, message="values from -1 to -1"),
    Case(name="a longer mask", given={**PLAIN, "attention_mask": torch.ones(2, 8)}, message="one value per token"),
    Case(name="embeddings alone", given={"inputs_embeds": torch.ones(2, 6, 4), "labels": LABELS}, message="input_ids"),
    Case(name="pixels and ids", given={**PLAIN, "pixel_values": torch.zeros(2, 3, 4, 4)}, message="not both"),
    Case(name="no labels", given={"input_ids": IDS}, message="without labels"),
    Case(name="labels of None", given={**PLAIN, "labels": None}, message="without labels"),
    Case(name="nothing", given={}, message="expected input_ids or pixel_values"),
    Case(name="lists", given={**PLAIN, "input_ids": IDS.tolist()}, message="'input_ids' of list"),
    Case(
        name="ids of floats", given={**PLAIN, "input_ids": IDS.float()}, message=r"float32 \(2, 6\): expected integers"
    ),
    Case(name="one text without a batch", given={**PLAIN, "input_ids": IDS[0], "attention_mask": None}, message="B, T"),
    Case(name="texts without tokens", given={"input_ids": IDS[:, :0], "labels": LABELS}, message="T at least 1"),
    Case(name="token types of another shape", given={**PLAIN, "token_type_ids": ONES[:, :3]}, message="token types"),
    Case(name="a tuple", given=(IDS, LABELS), message="a tuple: expected a mapping"),
    *(Case(name=f"the key {key}", given={**PLAIN, key: ONES}, message=f"got '{key}' in a batch") for key in KEYS),
]


@by_name(BATCHES)
def test_batches(case: Case) -> None:
    meet(case, lambda: batch_fn(case.given))


# ---- x of a network ------------------------------------------------------------------------------------

LONG = torch.full((2, 17), 5)
TENSORS = [
    Case(name="bert: ids, mask, types", given=("bert", (IDS, ONES, ONES)), message=None),
    Case(name="llama: a text of 17 tokens", given=("llama", (LONG,)), message=None),
    Case(name="bert: a text of 17 tokens", given=("bert", (LONG,)), message="17 tokens for a model of 16 positions"),
    Case(
        name="roberta: 15 tokens", given=("roberta", (LONG[:, :15],)), message="15 tokens for a model of 14 positions"
    ),
    Case(name="distilbert: 17 tokens", given=("distilbert", (LONG,)), message="17 tokens for a model of 16"),
    Case(name="gpt2: 17 tokens", given=("gpt2", (LONG,)), message="truncation=True"),
    Case(name="an id outside of the vocabulary", given=("bert", (IDS + 30,)), message="34 to 45: expected 0..39"),
    Case(name="a negative id", given=("llama", (IDS - 5,)), message="from -1 to 10"),
    Case(name="token types outside", given=("bert", (IDS, ONES, ONES * 2)), message="token types from 2 to 2"),
    Case(name="token types of RoBERTa", given=("roberta", (IDS, ONES, IDS)), message="token types"),
    Case(name="token types of Llama", given=("llama", (IDS, ONES, ONES)), message="no token types"),
    Case(name="a mask of floats", given=("bert", (IDS, ONES.float())), message=r"use mask.bool\(\)"),
    Case(name="a mask of pairs", given=("llama", (IDS, ADDED == 0)), message="pairs of tokens"),
    Case(name="a mask that numbers texts", given=("gpt2", (IDS, IDS // 7)), message="number packed texts"),
    Case(name="four tensors", given=("bert", (IDS, ONES, ONES, ONES)), message="x of 4 tensors"),
    Case(name="ids of floats", given=("bert", (IDS.float(), ONES)), message="expected integers"),
    Case(name="ids (B, T, V)", given=("bert", (nn.functional.one_hot(IDS),)), message=r"int64 \(2, 6, 16\)"),
]


@by_name(TENSORS)
def test_tensors(case: Case) -> None:
    name, x = case.given
    layers = built(layer_specs(MODELS[name].build(), task=CLASSIFY, num_al_layers=2, objective="greedy")[0])
    meet(case, lambda: predict(layers, x))


def test_a_mapping_given_to_an_engine_names_the_function() -> None:
    prepare = BatchPreparation(
        objective=resolve("mse"), num_classes=2, micro_batch_size=2, device=torch.device("cpu"), check=True,
        dynamic_shape=False,
    )  # fmt: skip
    meet(Case(name="", given=PLAIN, message=r"set_batch_fn\(ds_al.convert.batch_fn\)"), lambda: prepare(PLAIN))


def test_an_engine_checks_values_before_it_moves_them() -> None:
    layers = list(enumerate(built(layer_specs(MODELS["bert"].build(), task=CLASSIFY, num_al_layers=2)[0])))
    prepare = BatchPreparation(
        objective=resolve("mse"), num_classes=5, micro_batch_size=2, device=torch.device("cpu"), check=True,
        dynamic_shape=False, check_input=input_check(layers),
    )  # fmt: skip
    prepare(((IDS, ONES), LABELS))
    assert input_check(layers[1:]) is None
    for x, message in (((IDS + 30, ONES), "34 to 45"), ((IDS, IDS // 7), "number packed texts")):
        meet(Case(name="", given=x, message=message), lambda x=x: prepare((x, LABELS)))


# ---- models --------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A low-rank adapter written by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 1), nn.Linear(1, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def bert(change: Callable[[Any], Any] = lambda model: None, **options: Any) -> Callable[[], tuple[Any, str]]:
    """Builds a changed BERT; ``change`` may return another model in its place."""

    def build() -> tuple[Any, str]:
        model = MODELS["bert"].build(**options)
        return change(model) or model, CLASSIFY

    return build


def llama(change: Callable[[Any], Any]) -> Callable[[], tuple[Any, str]]:
    def build() -> tuple[Any, str]:
        model = MODELS["llama lm"].build()
        return change(model) or model, LM

    return build


def own_class(model: Any) -> Any:
    kind = type(model)
    return type("Mine", (kind,), {"__module__": "mine"})(copy.deepcopy(model.config))


def set_at(path: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))

    return change


QUERY = "bert.encoder.layer.1.attention.self.query"
MODEL_CASES = [
    Case(name="as it is", given=bert(), message=None),
    Case(name="in training mode", given=bert(lambda model: model.train()), message=None),
    Case(name="frozen", given=bert(lambda model: model.requires_grad_(False)), message=None),
    Case(name="in double precision", given=bert(lambda model: model.double()), message=None),
    Case(name="regression", given=bert(problem_type="regression"), message="problem_type='regression'"),
    Case(
        name="several labels",
        given=bert(problem_type="multi_label_classification"),
        message="problem_type='multi_label_classification'.*several labels per sample",
    ),
    Case(name="one label", given=bert(num_labels=1), message="num_labels=1"),
    Case(name="is_decoder", given=bert(is_decoder=True), message="is_decoder or add_cross_attention"),
    Case(
        name="cross attention",
        given=bert(is_decoder=True, add_cross_attention=True),
        message="is_decoder or add_cross_attention",
    ),
    Case(name="LoRA by hand", given=bert(set_at(QUERY, LowRank)), message=f"{QUERY} is a LowRank.*peft"),
    Case(
        name="another activation",
        given=bert(set_at("bert.encoder.layer.0.intermediate.intermediate_act_fn", lambda _: nn.ReLU())),
        message="is a ReLU: expected a GELUActivation",
    ),
    Case(
        name="a classifier of two layers",
        given=bert(set_at("classifier", lambda old: nn.Sequential(old, nn.Linear(5, 5)))),
        message="classifier is a Sequential: expected a Linear",
    ),
    Case(
        name="a classifier of other classes",
        given=bert(set_at("classifier", lambda _: nn.Linear(16, 3))),
        message=r"classifier.weight has the shape \(3, 16\): expected \(5, 16\).*num_labels",
    ),
    Case(
        name="weight norm",
        given=bert(set_at(QUERY, nn.utils.parametrizations.weight_norm)),
        message="ParametrizedLinear",
    ),
    Case(
        name="an embedding replaced by hand",
        given=llama(set_at("model.embed_tokens", lambda _: nn.Embedding(50, 16))),
        message="model.embed_tokens.weight.*resize_token_embeddings",
    ),
    Case(name="a block less", given=bert(lambda model: model.bert.encoder.layer.__delitem__(3)), message="missing"),
    Case(
        name="a block more",
        given=bert(lambda m: m.bert.encoder.layer.append(nn.Linear(1, 1)) and None),
        message="layer.4",
    ),
    Case(name="a class of your own", given=bert(own_class), message="Mine of mine.*forward of your own"),
    Case(
        name="a forward of its own",
        given=bert(lambda model: setattr(model.bert.encoder.layer[0], "forward", lambda *a, **k: a[0])),
        message="layer.0 has a forward of its own",
    ),
    Case(name="on the meta device", given=bert(lambda model: model.to("meta")), message="on the meta device"),
    Case(
        name="quantized",
        given=bert(lambda model: setattr(model.config, "quantization_config", {"bits": 4})),
        message="quantized weights",
    ),
    Case(name="a quantizer", given=bert(lambda model: setattr(model, "hf_quantizer", 1)), message="quantized weights"),
    Case(name="a trunk alone", given=bert(lambda model: model.bert), message="expected what AutoModelFor"),
    Case(name="a plain module", given=bert(lambda _: nn.Linear(1, 1)), message="'Linear'.*from_layers"),
]


@by_name(MODEL_CASES)
def test_models(case: Case) -> None:
    def convert() -> None:
        model, task = case.given()
        layer_specs(load(model, task=task), task=task, num_al_layers=2)

    meet(case, convert)


# ---- names and folders ---------------------------------------------------------------------------------

EVIL = "open('{}', 'w').close()\n"
FOREIGN = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}}


class Runs:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("EVIL"),)


def _bin(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def _config(folder: Path, **options: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **options}))


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


FOLDERS = [
    Case(name="as saved", given=lambda folder: None, message=None),
    Case(name="weights of torch", given=lambda f: _bin(f, MODELS["bert"].build().state_dict()), message=None),
    Case(name="code for a known type", given=lambda f: _config(f, **FOREIGN), message=None),
    Case(
        name="code for an unknown type", given=lambda f: _config(f, **FOREIGN, model_type="evil"), message="custom code"
    ),
    Case(name="no folder", given=lambda f: shutil.rmtree(f), message="neither a folder, nor cached"),
    Case(
        name="an empty folder", given=lambda f: [p.unlink() for p in f.iterdir()], message="as save_pretrained writes"
    ),
    Case(name="no config", given=lambda f: (f / "config.json").unlink(), message="ValueError: Unrecognized model"),
    Case(name="a config that is no JSON", given=lambda f: (f / "config.json").write_text("{"), message="valid JSON"),
    Case(name="no weights", given=lambda f: (f / "model.safetensors").unlink(), message="no file named"),
    Case(name="weights cut off", given=_cut, message="SafetensorError"),
    Case(
        name="weights of nonsense",
        given=lambda f: (f / "model.safetensors").write_bytes(b"x" * 64),
        message="Safetensor",
    ),
    Case(name="a pickle with code", given=lambda f: _bin(f, {"w": Runs()}), message="UnpicklingError"),
    Case(
        name="a block too few", given=lambda f: _config(f, num_hidden_layers=5), message="without 16 weights.*layer.4"
    ),
    Case(name="another width", given=lambda f: _config(f, hidden_size=32), message="RuntimeError"),
    Case(name="another type", given=lambda f: _config(f, model_type="roberta"), message="without .* weights, roberta"),
    Case(name="an unknown type", given=lambda f: _config(f, model_type="nothing"), message="nothing"),
    Case(
        name="a shard missing",
        given=lambda f: (f / "model-00001-of-00008.safetensors").unlink(),
        message="No such file",
    ),
]


@by_name(FOLDERS)
def test_folders(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("ds_al.data.hub.reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    MODELS["bert"].build().save_pretrained(folder, **({"max_shard_size": "5KB"} if "shard" in case.name else {}))
    (folder / "evil.py").write_text(EVIL.format(tmp_path / "EVIL"))
    case.given(folder)
    meet(case, lambda: load(folder, task=CLASSIFY), folder=tmp_path, seconds=20)
    assert not (tmp_path / "EVIL").exists()


OPTIONS = [
    Case(name="trust_remote_code", given={"trust_remote_code": True}, message="trust_remote_code.*is not run"),
    Case(name="device_map", given={"device_map": "auto"}, message="device_map"),
    Case(name="load_in_8bit", given={"load_in_8bit": True}, message="quantized"),
    Case(name="trust_remote_code false", given={"trust_remote_code": False}, message=None),
    Case(name="an unknown option", given={"nonsense": 1}, message="nonsense"),
    Case(name="another number of labels", given={"num_labels": 3}, message="ignore_mismatched_sizes"),
]


@by_name(OPTIONS)
def test_options_of_from_pretrained(case: Case, tmp_path: Path) -> None:
    MODELS["bert"].build().save_pretrained(tmp_path)
    meet(case, lambda: load(tmp_path, task=CLASSIFY, model_options=case.given), folder=tmp_path)


COUNTS = [
    Case(name="num_al_layers text", given={"num_al_layers": "2"}, message="num_al_layers='2': expected a whole number"),
    Case(name="num_al_layers true", given={"num_al_layers": True}, message="num_al_layers=True"),
    Case(name="num_al_layers 0", given={"num_al_layers": 0}, message="num_al_layers=0"),
    Case(name="num_al_layers 2.0", given={"num_al_layers": 2.0}, message=r"num_al_layers=2\.0"),
    Case(name="more AL layers than blocks", given={"num_al_layers": 5}, message=r"expected 1\.\.4"),
    Case(name="groups of floats", given={"groups": [1.5, 2.5]}, message="whole numbers"),
    Case(name="groups a number", given={"groups": 4}, message="groups=4: expected a list"),
    Case(name="groups of nothing", given={"groups": []}, message="expected a list"),
    Case(name="groups with a 0", given={"groups": [0, 4]}, message="1 or more in each"),
    Case(name="groups of too few", given={"groups": [1, 2]}, message="4 in all"),
    Case(name="code_width -1", given={"code_width": -1}, message="code_width=-1"),
    Case(name="code_width true", given={"code_width": True}, message="code_width=True"),
    Case(name="an unknown objective", given={"objective": "best"}, message="unknown objective 'best'"),
    Case(name="an unknown task", given={"task": "translation"}, message="task='translation'"),
]


@by_name(COUNTS)
def test_counts(case: Case) -> None:
    def convert() -> None:
        arguments = {"task": CLASSIFY, **case.given}
        layer_specs(load(MODELS["bert"].build(), task=arguments["task"]), **arguments)

    meet(case, convert)


# ---- ALTrainer -----------------------------------------------------------------------------------------

ARGUMENTS = [
    Case(name="report_to none", given={"report_to": "none"}, message=None),
    Case(name="a list of no loggers", given={"report_to": []}, message=None),
    Case(
        name="an unknown logger", given={"report_to": "paper"}, message="'paper': paper is not supported, only azure_ml"
    ),
    Case(name="a logger that is not installed", given={"report_to": ["flyte"]}, message="'flyte'.*install"),
    Case(name="learning_rate", given={"learning_rate": 1.0}, message='config, as "optimizer.params.lr"'),
    Case(name="adam_beta1", given={"adam_beta1": 0.9}, message="optimizer.params.betas"),
    Case(name="bf16", given={"bf16": True}, message='as "bf16.enabled"'),
    Case(name="seed", given={"seed": 1}, message="use base_seed"),
    Case(name="gradient_checkpointing", given={"gradient_checkpointing": True}, message="checkpointing_enable"),
    Case(name="logging_dir", given={"logging_dir": "logs"}, message="TENSORBOARD_LOGGING_DIR"),
    Case(name="label_smoothing_factor", given={"label_smoothing_factor": 0.1}, message="the objective"),
    Case(name="fsdp", given={"fsdp": "full_shard"}, message="without a meaning here: leave it out"),
    Case(name="push_to_hub", given={"push_to_hub": True}, message=r"use save_model\(\)"),
    Case(name="deepspeed", given={"deepspeed": {}}, message=r"use ALTrainer\(config=...\)"),
    Case(name="an old name", given={"evaluation_strategy": "epoch"}, message="did you mean 'eval_strategy'"),
    Case(name="a misspelt name", given={"eval_stepss": 1}, message="did you mean 'eval_steps'"),
]


@by_name(ARGUMENTS)
def test_arguments(case: Case) -> None:
    def build() -> None:
        of_loggers(ALTrainingArguments.of({"output_dir": "out", **case.given}).report_to)

    meet(case, build)


def test_every_argument_of_transformers_is_known_or_named() -> None:
    from transformers import TrainingArguments

    for name in TrainingArguments.__dataclass_fields__:
        assert name in ALTrainingArguments.model_fields or elsewhere.argument(name), name
    assert elsewhere.argument("evaluation_strategy") is None
    assert elsewhere.parameters(["tokenizer", "model_init"]) == (
        "ALTrainer has no 'tokenizer': use processing_class; ALTrainer has no 'model_init': use model, made before"
    )
    with pytest.raises(ValueError, match=r"optimizer\.params\.lr"):
        ALTrainingArguments(output_dir="out", learning_rate=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", ["end", "checkpoint"])
def test_a_logger_that_saves_the_model_by_a_trainer_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_LOG_MODEL", value)
    with pytest.raises(ALConfigError, match=r"WandbCallback that is to log the model.*Unset"):
        check_callback(of_loggers("wandb")[0])


PAIR, MAPPING = (torch.ones(3), 1), {"input_ids": [1, 2], "attention_mask": [1, 1], "label": 1}
ROWS = [
    Case(name="mappings", given=[MAPPING] * 2, message=None),
    Case(name="mappings with a text and a number more", given=[{**MAPPING, "text": "a", "idx": 3}] * 2, message=None),
    Case(name="pairs", given=[PAIR] * 2, message=None),
    Case(name="objects", given=[SimpleNamespace(input_ids=[1, 2], label=1)] * 2, message=None),
    Case(name="mappings without labels", given=[{"input_ids": [1, 2]}] * 2, message=None),
    Case(name="position_ids", given=[{**MAPPING, "position_ids": [0, 1]}] * 2, message="got 'position_ids'"),
    Case(
        name="texts of two lengths", given=[MAPPING, {**MAPPING, "input_ids": [1]}], message="pads texts of different"
    ),
    Case(name="numbers", given=[1, 2], message="2 rows of int.*data_collator"),
    Case(name="texts alone", given=[{"text": "a", "label": 0}] * 2, message="expected input_ids or pixel_values"),
    Case(name="pairs of two shapes", given=[PAIR, (torch.ones(4), 1)], message="default_collate makes no batch"),
]


@by_name(ROWS)
def test_rows(case: Case) -> None:
    batches = Batches(None, batch_fn=None, used_alone=True)
    found = meet(case, lambda: batches.collate(case.given))
    if case.name == "pairs":
        assert found is not None and found[0].shape == (2, 3) and found[1].tolist() == [1, 1]
    elif case.name.startswith("mappings with a text"):
        assert found is not None and [part.tolist() for part in found[0]] == [[[1, 2]] * 2, [[1, 1]] * 2]


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """A data set without a length."""

    def __iter__(self) -> Any:
        yield MAPPING


DATA = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4))
DATA_SETS = [
    Case(name="a tensor data set", given=(DATA, None), message=None),
    Case(name="lists, and several to evaluate", given=([MAPPING], {"a": [MAPPING], "b": DATA}), message=None),
    Case(name="a stream", given=(Stream(), None), message="train_dataset of Stream.*in a loop of your own"),
    Case(name="a generator", given=((row for row in [MAPPING]), None), message="train_dataset of generator"),
    Case(name="a loader", given=(torch.utils.data.DataLoader(DATA), None), message="train_dataset of DataLoader"),
    Case(name="several to train", given=({"train": DATA, "test": DATA}, None), message="of train, test: expected one"),
    Case(name="nothing to train", given=([], None), message="train_dataset without rows"),
    Case(name="nothing to evaluate", given=(DATA, []), message="eval_dataset without rows"),
    Case(name="one of several empty", given=(DATA, {"a": DATA, "b": []}), message="eval_dataset b without rows"),
    Case(name="a stream to evaluate", given=(DATA, Stream()), message="eval_dataset of Stream"),
]


@by_name(DATA_SETS)
def test_data_sets(case: Case) -> None:
    meet(case, lambda: check_datasets(*case.given))


CASES = [*BATCHES, *TENSORS, *MODEL_CASES, *FOLDERS, *OPTIONS, *COUNTS, *ARGUMENTS, *ROWS, *DATA_SETS]
