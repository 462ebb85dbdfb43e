"""Texts: tokenised once, padded at the end with a mask that is right, by words of the training part alone."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from ds_al.data import ShuffledLoader, Tokens, Words, load_data, ordered_batches
from ds_al.data import words as words_module
from ds_al.data.tokenise import tokenise
from tests.support.parquet_files import config, shared, write, write_texts

TEXTS = ["A cat, a DOG", "", "dog dog dog cat bird fish", None]


@pytest.fixture
def four_texts(tmp_path: Path) -> Path:
    for part in ("train", "validation", "test"):
        write(tmp_path, part, text=TEXTS, label=[0, 1, 2, 0])
    return tmp_path


def words_of(words: list[str], ids: torch.Tensor, mask: torch.Tensor) -> list[list[str]]:
    return [[words[i] for i in row[keep].tolist()] for row, keep in zip(ids, mask, strict=True)]


def test_words_are_split_counted_and_numbered() -> None:
    assert words_module.split("It's so-so.") == ["it", "'", "s", "so", "-", "so", "."]
    words = Words.build(["b b a", "c A b"], size=4)
    assert words.vocabulary == ["<pad>", "<unk>", "b", "a"]  # of a and c, a comes twice
    assert words.encode(["c b", "A b B b", ""], max_length=3) == [[1, 2], [3, 2, 2], []]
    assert Words.build(["z y x"], size=30).vocabulary[2:] == ["x", "y", "z"]  # equally frequent: by the alphabet


def test_a_saved_vocabulary_is_read_back(tmp_path: Path) -> None:
    words = Words.build(["naïve 東京 cat"], size=10)
    words.save(tmp_path / "v.json")
    again = Words(json.loads((tmp_path / "v.json").read_text(encoding="utf-8")))
    assert again.vocabulary == words.vocabulary and again.fingerprint == words.fingerprint
    assert again.fingerprint != Words(words.vocabulary[:-1]).fingerprint


@pytest.mark.parametrize(("padding", "width"), [("longest", 6), ("bucket", 6), ("max_length", 9)])
def test_padding_stands_at_the_end_and_the_mask_is_true_at_tokens(four_texts: Path, padding: str, width: int) -> None:
    splits = load_data(config(four_texts, padding=padding, max_length=9), seed=0)
    (ids, mask), labels = splits.train.make_batch(torch.arange(4))
    assert ids.shape == mask.shape == (4, width) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [5, 0, 6, 0]  # a missing text is an empty one
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
    assert (ids[~mask] == splits.padding_id).all() and labels.tolist() == [0, 1, 2, 0]
    vocabulary = ["<pad>", "<unk>", "dog", "a", "cat", ",", "bird", "fish"]
    assert words_of(vocabulary, ids, mask)[::2] == [
        ["a", "cat", ",", "a", "dog"],
        ["dog", "dog", "dog", "cat", "bird", "fish"],
    ]
    assert splits.vocab_size == 8 and splits.shape == (9,)
    assert splits.varying == (padding != "max_length") and (splits.lengths is not None) == (padding == "bucket")


def test_each_micro_batch_is_as_wide_as_its_own_longest_text(four_texts: Path) -> None:
    part = load_data(config(four_texts, padding="longest"), seed=0).train
    assert part.make_batch(torch.tensor([0, 1]))[0][0].shape == (2, 5)
    assert part.make_batch(torch.tensor([1, 3]))[0][0].shape == (2, 1)  # empty texts have a shape, too


def test_texts_are_cut_at_the_greatest_length(four_texts: Path) -> None:
    splits = load_data(config(four_texts, max_length=2, padding="longest"), seed=0)
    (ids, mask), _ = splits.train.make_batch(torch.arange(4))
    assert ids.shape == (4, 2) and mask.sum().item() == 4


def test_selected_texts_keep_their_tokens() -> None:
    flat, lengths = torch.arange(10, dtype=torch.int32), torch.tensor([3, 0, 5, 2])
    tokens = Tokens(flat, lengths, torch.arange(4), padding_id=99)
    rows = torch.tensor([3, 1, 0, 3])
    for index, row in enumerate(rows.tolist()):
        expected = flat[int(lengths[:row].sum()) :][: int(lengths[row])]
        assert torch.equal(tokens.select(rows)[index][0], expected.long())
        assert tokens.select(rows)[index][1] == row


def test_validation_is_cut_by_seed_disjoint_and_stable(tmp_path: Path) -> None:
    folder = write(tmp_path, "train", text=[f"w{i}" for i in range(50)], label=[i % 2 for i in range(50)])
    write(folder, "test", text=["w1"], label=[0])
    cuts = []
    for seed in (0, 0, 1):
        splits = load_data(config(folder, validation_fraction=0.2), seed=seed)
        vocabulary = _saved(splits, folder)
        seen = {part: _texts(getattr(splits, part), vocabulary) for part in ("train", "validation")}
        assert len(seen["train"]) == 40 and len(seen["validation"]) == 10
        cuts.append(seen["train"])
        # The vocabulary knows the words of the training part, and none of those held out.
        assert set(vocabulary[2:]) == {word for (word,) in seen["train"]}
        assert seen["validation"] == [("<unk>",)] * 10
    assert cuts[0] == cuts[1] != cuts[2]


def _saved(splits: object, folder: Path) -> list[str]:
    path = folder / "vocabulary.json"
    splits.save_vocabulary(path)  # type: ignore[attr-defined]
    return json.loads(path.read_text(encoding="utf-8"))


def _texts(part: Tokens, vocabulary: list[str]) -> list[tuple[str, ...]]:
    return [tuple(vocabulary[token] for token in part[i][0].tolist()) for i in range(len(part))]


def test_words_of_the_test_part_are_unknown(tmp_path: Path) -> None:
    folder = write(tmp_path, "train", text=["one two"] * 4, label=[0, 1, 0, 1])
    write(folder, "test", text=["two three"], label=[0])
    splits = load_data(config(folder, validation_fraction=0.25), seed=0)
    assert _texts(splits.test, _saved(splits, folder)) == [("two", "<unk>")]


def test_texts_are_tokenised_once(four_texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = config(four_texts, padding="longest")
    first = load_data(block, seed=0)
    files = sorted(path.name for path in (four_texts / "cache/ds_al").iterdir())
    assert [name.partition("-")[0] for name in files] == ["tokens"] * 3 + ["words"]

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(Words, "encode", fail)
        patch.setattr(Words, "build", fail)
        again = load_data(block, seed=0)
    assert torch.equal(first.train.flat, again.train.flat)  # type: ignore[attr-defined]
    load_data(config(four_texts, padding="longest", max_length=2), seed=0)  # another length is other tokens
    assert len(list((four_texts / "cache/ds_al").iterdir())) > len(files)


def test_other_contents_under_the_same_name_are_read_anew(tmp_path: Path) -> None:
    write(tmp_path, "train", text=["old"] * 4, label=[0] * 4)
    write(tmp_path, "test", text=["old"], label=[0])
    load_data(config(tmp_path), seed=0)
    write(tmp_path, "train", text=["new words"] * 4, label=[0] * 4)
    splits = load_data(config(tmp_path), seed=0)
    assert _saved(splits, tmp_path)[2:] == ["new", "words"]


def test_bucketed_training_reads_every_text_once_an_epoch_in_the_same_order_every_time(tmp_path: Path) -> None:
    splits = load_data(config(write_texts(tmp_path), padding="bucket"), seed=0)

    def epoch() -> list[list[int]]:
        loader = ShuffledLoader(splits.train, batch_size=9, seed=4, lengths=splits.lengths, prefetch=2)
        return [ids.flatten().tolist() for (ids, _), _ in islice(loader, loader.batches_per_epoch)]

    assert epoch() == epoch()
    loader = ShuffledLoader(splits.train, batch_size=9, seed=4, lengths=splits.lengths)
    rows = torch.cat([mask.sum(dim=1) for (_, mask), _ in islice(loader, 6)])
    assert len(rows) == len(splits.train) == 54
    assert torch.equal(rows.sort().values, splits.lengths.sort().values)
    # Alike in length: less padding than in their own order.
    widths = [mask.shape[1] for (_, mask), _ in islice(loader, 6)]
    assert sum(widths) < sum(mask.shape[1] for (_, mask), _ in ordered_batches(splits.train, batch_size=9))


@pytest.mark.parametrize(("name", "size", "padding_id"), [("bert-uncased", 30522, 0), ("gpt2", 50257, 50256)])
def test_a_tokenizer_of_a_folder_works_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int, padding_id: int
) -> None:
    folder = shared(f"tokenizer-{name}")
    from transformers import AutoTokenizer

    monkeypatch.setattr("socket.create_connection", None)  # nobody asks
    text = "Unbelievable! A tokenizer."
    write(tmp_path, "train", text=[text, text, "short"], label=[0, 1, 0])
    write(tmp_path, "test", text=[text], label=[1])
    splits = load_data(config(tmp_path, tokenizer=str(folder), max_length=32), seed=0)
    (ids, mask), _ = splits.test.make_batch(torch.tensor([0]))
    assert ids[mask].tolist() == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert (splits.vocab_size, splits.padding_id) == (size, padding_id) and ids.shape == (1, 32)
    assert splits.save_vocabulary is None


def test_a_tokenizer_folder_moved_elsewhere_finds_its_tokens(tmp_path: Path) -> None:
    import datasets

    class Upper:
        vocab_size, padding_id = 300, 0

        def __init__(self, fingerprint: str) -> None:
            self.fingerprint, self.calls = fingerprint, 0

        def encode(self, texts: list[str], *, max_length: int) -> list[list[int]]:
            self.calls += 1
            return [[ord(c) for c in text[:max_length]] for text in texts]

    table = datasets.Dataset.from_dict({"text": ["ab", "c"]})
    one, same, other = Upper("a"), Upper("a"), Upper("b")
    for tokenizer in (one, same, other):
        flat, lengths = tokenise(table, "text", tokenizer, max_length=8, folder=tmp_path, place=str)
        assert flat.tolist() == [97, 98, 99] and lengths.tolist() == [2, 1]
    assert (one.calls, same.calls, other.calls) == (1, 0, 1)


def test_ag_news_by_its_name(tmp_path: Path) -> None:
    folder = shared("ag-news")
    splits = load_data(config(folder, name="ag_news", cache=str(tmp_path)), seed=0)
    assert splits.kind == "text" and splits.classes == ["World", "Sports", "Business", "Sci/Tech"]
    assert len(splits.train) + len(splits.validation) == 9994 and len(splits.test) == 7600
