"""Where a set comes from, which columns and classes it has, and what is refused by name."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from ds_al.data import Tokens, hub, load_data
from ds_al.data.config import DataConfig
from ds_al.data.registry import KNOWN
from ds_al.errors import ALConfigError, ALDataError
from tests.support.parquet_files import config, write, write_images, write_texts


def load(folder: Path, **keys: Any) -> Any:
    return load_data(config(folder, **keys), seed=0)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No connection opens."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "someone/some-set"])
def test_a_set_that_is_out_of_reach_names_the_option_for_a_local_path_at_once(tmp_path: Path, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(ALDataError, match=r"neither cached nor .*experiment\.data\.path, or --data-path") as caught:
        load_data(DataConfig(name=name, cache=str(tmp_path)), seed=0)
    assert time.monotonic() - start < 10
    assert (KNOWN[name].hub if name in KNOWN else name) in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_being_offline_leaves_no_setting_behind(tmp_path: Path) -> None:
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ALDataError):
        load_data(DataConfig(name="cifar10", cache=str(tmp_path)), seed=0)
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("offline")
def test_a_tokenizer_that_is_out_of_reach_names_its_option(tmp_path: Path) -> None:
    write_texts(tmp_path)
    with pytest.raises(ALDataError, match=r'experiment\.data\.tokenizer=\'someone/tokens\'.*"words"'):
        load(tmp_path, tokenizer="someone/tokens")


def test_a_set_of_the_hub_is_asked_for_by_its_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub_set(name: str, **keys: Any) -> datasets.DatasetDict:
        asked.append((name, keys))
        rows = {"sentence": ["good", "bad"] * 4, "label": [1, 0] * 4, "idx": list(range(8))}
        features = datasets.Features(
            sentence=datasets.Value("string"),
            label=datasets.ClassLabel(names=["negative", "positive"]),
            idx=datasets.Value("int32"),
        )
        table = datasets.Dataset.from_dict(rows, features=features)
        hidden = datasets.Dataset.from_dict({**rows, "label": [-1] * 8}, features=features)
        return datasets.DatasetDict(train=table, validation=table.select(range(6)), test=hidden)

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", hub_set)
    splits = load_data(DataConfig(name="sst2", cache=str(tmp_path)), seed=0)
    assert asked == [("stanfordnlp/sst2", {"cache_dir": str(tmp_path)})]
    assert splits.classes == ["negative", "positive"]
    # The published test labels are hidden: the validation part is what is reported on.
    assert len(splits.test) == 6 and len(splits.train) + len(splits.validation) == 8


@pytest.mark.parametrize(
    "parts", [("train", "validation_matched", "validation_mismatched"), ("train", "dev", "valid"), ("test", "dev")]
)
def test_a_set_of_the_hub_with_other_parts_is_refused_with_their_names(
    parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error listed the parts that are known alone, and of two validation parts one was used without a word."""
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(dict.fromkeys(parts, table)))
    with pytest.raises(ALDataError, match=f"has the parts {', '.join(parts)}: expected train"):
        load_data(DataConfig(name="someone/set"), seed=0)


def test_an_unlabelled_part_beside_train_and_test_is_left_out(tmp_path: Path) -> None:
    write_texts(tmp_path)
    write(tmp_path, "unsupervised", text=["x"], label=[-1])
    splits = load(tmp_path)
    assert len(splits.train) + len(splits.validation) == 60 and len(splits.classes) == 3


def test_a_validation_part_is_used_whole_and_then_no_fraction_is_taken(tmp_path: Path) -> None:
    write_texts(tmp_path)
    write(tmp_path, "valid", text=["topic0"] * 5, label=[0] * 5)
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (60, 5, 12)
    with pytest.raises(ALConfigError, match=r"validation_fraction=0\.2.*has a validation part of its own"):
        load(tmp_path, validation_fraction=0.2)


def test_shards_and_folders_are_read_as_one_part(tmp_path: Path) -> None:
    for shard in ("data/train-00000-of-00002", "data/train-00001-of-00002"):
        path = tmp_path / shard
        write(path.parent, path.name, text=["a", "b"] * 5, label=[0, 1] * 5)
    write(tmp_path / "test", "0000", text=["a"], label=[0])
    splits = load(tmp_path)
    assert len(splits.train) + len(splits.validation) == 20 and len(splits.test) == 1


@pytest.mark.parametrize(("key", "names"), [("text_column", ["title", "body"]), (None, None)])
def test_several_text_columns_ask_for_one(tmp_path: Path, key: str | None, names: list[str] | None) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, title=["t"] * 4, body=["b b"] * 4, label=[0, 1, 0, 1])
    if key is None:
        with pytest.raises(ALDataError, match=r"\['title', 'body'\].*text_column or --text-column"):
            load(tmp_path)
        return
    for name, length in zip(names or [], (1, 2), strict=True):
        splits = load(tmp_path, text_column=name)
        assert isinstance(splits.test, Tokens) and splits.test.lengths.tolist() == [length] * 4


def test_labels_may_be_names_in_a_column_of_any_name(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, text=["a", "b", "c", "d"], topic=["sports", "arts", "sports", "law"])
    with pytest.raises(ALDataError, match=r"none called label: .*--label-column"):
        load(tmp_path)
    splits = load(tmp_path, label_column="topic")
    assert splits.classes == ["arts", "law", "sports"]
    assert splits.test.make_batch(torch.arange(4))[1].tolist() == [2, 0, 2, 1]


def test_class_names_of_the_folder_are_used_and_checked(tmp_path: Path) -> None:
    write_texts(tmp_path)
    assert load(tmp_path).classes == ["0", "1", "2"]
    (tmp_path / "classes.json").write_text(json.dumps(["cats", "dogs", "birds", "none of them"]))
    assert load(tmp_path).classes == ["cats", "dogs", "birds", "none of them"]
    (tmp_path / "classes.json").write_text(json.dumps(["cats", "dogs"]))
    with pytest.raises(ALDataError, match="the label 2: expected 0 to 1"):
        load(tmp_path)


def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path: Path) -> None:
    write_texts(tmp_path)
    for key in ("text_column", "label_column", "image_column"):
        with pytest.raises(ALDataError, match=rf"{key}='nope': expected one of the columns .*\['text', 'label'\]"):
            load(tmp_path, **{key: "nope"})


def test_labels_must_be_numbers_or_names(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, text=["a", "b"], label=[0.5, 1.5])
    with pytest.raises(ALDataError, match=r"holds float64: expected class numbers or names"):
        load(tmp_path)


def test_a_path_without_parts_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ALDataError, match="there is none of this name"):
        load(tmp_path / "nowhere")
    write(tmp_path, "train", text=["a"], label=[0])
    with pytest.raises(ALDataError, match=r"\['train\.parquet'\]: expected files with train and test"):
        load(tmp_path)
    with pytest.raises(ALDataError, match="not one file"):
        load(tmp_path, path=str(tmp_path / "train.parquet"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer", "x"), ("vocab_size", 9), ("max_length", 9), ("padding", "longest")],
)
def test_keys_of_text_are_refused_for_images(tmp_path: Path, key: str, value: Any) -> None:
    write_images(tmp_path)
    with pytest.raises(ALConfigError, match=rf"experiment\.data\.{key}=.*'own' holds images: leave '{key}' out"):
        load(tmp_path, **{key: value})
    with pytest.raises(ALConfigError, match=rf"experiment\.data\.{key}=.*holds images"):
        load_data(DataConfig(name="fashion-mnist-small", **{key: value}), seed=0)


@pytest.mark.parametrize(("key", "value"), [("augment", "flip"), ("image_size", 8), ("image_column", "image")])
def test_keys_of_images_are_refused_for_text(tmp_path: Path, key: str, value: Any) -> None:
    write_texts(tmp_path)
    with pytest.raises(ALConfigError, match=rf"experiment\.data\.{key}=.*'ag_news' holds text: leave '{key}' out"):
        load(tmp_path, name="ag_news", **{key: value})


def test_keys_of_stored_sets_are_refused_for_one_that_comes_with_the_package() -> None:
    for key, value in {"label_column": "y", "cache": "c", "image_size": 14}.items():
        with pytest.raises(ALConfigError, match=rf"experiment\.data\.{key}=.*comes with the package"):
            load_data(DataConfig(name="fashion-mnist-small", **{key: value}), seed=0)  # type: ignore[arg-type]


def test_a_size_is_refused_for_a_tokenizer_that_has_one(tmp_path: Path) -> None:
    write_texts(tmp_path)
    with pytest.raises(ALConfigError, match=r"vocab_size=99.*tokenizer 'some/where'"):
        load(tmp_path, tokenizer="some/where", vocab_size=99)
