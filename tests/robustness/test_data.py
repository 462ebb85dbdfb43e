"""Data sets, caches and files that other programs wrote: loaded as meant, or refused by file, row and column."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ds_al.data import Images, load_data
from ds_al.models.word_vectors import word_vectors
from ds_al.partition import cache as layer_times
from ds_al.partition.layer_times import LayerTime
from ds_al.report import content, read
from ds_al.studies.sweep.spec import read_sweep
from tests.support.folders import make_run
from tests.support.parquet_files import config, png, random_images, write, write_images, write_texts
from tests.support.robustness import Case, Kind, by_name, meet

HERE = "tests/robustness/test_data.py"
SECTION = "Data"

KINDS: list[Kind] = [
    Kind(
        section=SECTION,
        name="grey images of 16 and 32 bits and of floats",
        outcome="honoured",
        what="They keep their picture in 8 bits; a range that is not known is refused by row.",
        tests=(f"{HERE}::test_image", f"{HERE}::test_levels_of_grey_are_kept"),
    ),
    Kind(
        section=SECTION,
        name="photographs with an EXIF orientation",
        outcome="honoured",
        what="They come upright, as `datasets` decodes them.",
        tests=(f"{HERE}::test_photographs_come_upright",),
    ),
    Kind(
        section=SECTION,
        name="palettes, one bit, transparency, CMYK, animations",
        outcome="honoured",
        what="Converted to grey or RGB as Pillow does; of several frames the first is taken.",
        tests=(f"{HERE}::test_image",),
    ),
    Kind(
        section=SECTION,
        name="images that are cut, no images, bombs, or decoded by another program",
        outcome="refused",
        what="The error names file, row and column, and the formats that are read; no other program is ever called.",
        tests=(f"{HERE}::test_image",),
    ),
    Kind(
        section=SECTION,
        name="folders of several data sets or of several parts of one kind",
        outcome="refused",
        what="All are named; nothing is merged without a word.",
        tests=(f"{HERE}::test_folder",),
    ),
    Kind(
        section=SECTION,
        name="files of a folder that are damaged, empty, or of other columns",
        outcome="refused",
        what="The file is named, with what Arrow says of it.",
        tests=(f"{HERE}::test_folder",),
    ),
    Kind(
        section=SECTION,
        name="labels that are no classes",
        outcome="refused",
        what="Lists, floats, missing, negative and huge numbers: column, row and file are named. Booleans, names and "
        "categories are honoured.",
        tests=(f"{HERE}::test_labels",),
    ),
    Kind(
        section=SECTION,
        name="classes.json of another form",
        outcome="refused",
        what="A list of distinct names is expected, one for each label.",
        tests=(f"{HERE}::test_classes_file",),
    ),
    Kind(
        section=SECTION,
        name="texts that are none",
        outcome="refused",
        what="Text that is not UTF-8 is named by file and row, a column of other types by its name.",
        tests=(f"{HERE}::test_texts",),
    ),
    Kind(
        section=SECTION,
        name="a tokenizer with code of its own",
        outcome="refused",
        what="It is neither executed nor asked about.",
        tests=(f"{HERE}::test_tokenizer_with_code_is_never_executed",),
    ),
    Kind(
        section=SECTION,
        name="a cache file that is cut, changed, of other contents, or a pickle",
        outcome="honoured",
        what="A digest tells; the file is made anew, with a line on stderr.",
        tests=(f"{HERE}::test_cache_file_is_made_anew", f"{HERE}::test_layer_times"),
    ),
    Kind(
        section=SECTION,
        name="a cache folder that cannot be written to",
        outcome="refused",
        what="`experiment.data.cache` is named.",
        tests=(f"{HERE}::test_cache_folder_that_is_a_file",),
    ),
    Kind(
        section=SECTION,
        name="word vectors of another form",
        outcome="refused",
        what="File and line are named.",
        tests=(f"{HERE}::test_word_vectors",),
    ),
    Kind(
        section=SECTION,
        name="a suite that is no suite",
        outcome="refused",
        what="The file is named, with the key or what YAML says.",
        tests=(f"{HERE}::test_suite",),
    ),
    Kind(
        section=SECTION,
        name="run folders with nonsense in them",
        outcome="honoured",
        what="A report leaves out and notes what has the wrong form; files that are no JSON are refused by name.",
        tests=(f"{HERE}::test_report_on_nonsense",),
    ),
]


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(array: np.ndarray, form: str = "PNG") -> bytes:
    return encoded(Image.fromarray(array), form)


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says that it has so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


COLOUR = Image.fromarray(random_images(1)[0])
JPEG = encoded(COLOUR.resize((64, 64)), "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
RAMP = np.linspace(0, 1, 64).reshape(8, 8)
NAMED = r"column 'image' holds no image in row 5 of train\.parquet .*image_column"

IMAGES: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("a PNG", png(random_images(1)[0]), None),
        ("one bit", encoded(COLOUR.convert("1")), None),
        ("a palette", encoded(COLOUR.convert("P")), None),
        ("a transparent palette", encoded(COLOUR.convert("P"), "GIF", transparency=0), None),
        ("grey and alpha", encoded(COLOUR.convert("LA")), None),
        ("RGB and alpha", encoded(COLOUR.convert("RGBA")), None),
        ("CMYK", encoded(COLOUR.convert("CMYK"), "TIFF"), None),
        ("YCbCr", encoded(COLOUR.convert("YCbCr"), "JPEG"), None),
        ("LAB", encoded(COLOUR.convert("LAB"), "TIFF"), None),
        ("an animation", encoded(COLOUR, "GIF", save_all=True, append_images=[COLOUR] * 3), None),
        ("an animated WebP", encoded(COLOUR, "WEBP", save_all=True, append_images=[COLOUR.convert("L")]), None),
        ("BMP", encoded(COLOUR, "BMP"), None),
        ("grey of 16 bits", grey((RAMP * 65535).astype(np.uint16)), None),
        ("grey of 16 bits, big-endian", grey((RAMP * 65535).astype(">u2"), "TIFF"), None),
        ("grey of 32 bits", grey((RAMP * 65535).astype(np.int32), "TIFF"), None),
        ("grey of 32 bits, to 2**31", grey((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"), NAMED),
        ("grey of 32 bits, negative", grey((RAMP * 10 - 5).astype(np.int32), "TIFF"), NAMED),
        ("grey of 32 bits, to 255", grey((RAMP * 255).astype(np.int32), "TIFF"), NAMED),
        ("floats to 1", grey(RAMP.astype(np.float32), "TIFF"), None),
        ("floats to 255", grey((RAMP * 255).astype(np.float32), "TIFF"), NAMED),
        ("floats with NaN", grey(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "TIFF"), NAMED),
        ("a truncated JPEG", JPEG[: len(JPEG) // 2], NAMED),
        ("a JPEG cut by 2 bytes", JPEG[:-2], NAMED),
        ("a truncated PNG", png(random_images(1)[0])[:-30], NAMED),
        ("a PNG with a flipped byte", bytes(b ^ (i == 60) for i, b in enumerate(png(random_images(1)[0]))), NAMED),
        ("EPS", EPS, NAMED),
        ("a file for WMF", b"\xd7\xcd\xc6\x9a\x00\x00" + b"\0" * 60, NAMED),
        ("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", NAMED),
        ("a text", b"no image", NAMED),
        ("no bytes", b"", NAMED),
        ("missing", None, NAMED),
        ("a bomb of 150 million pixels", bomb(15_000, 10_000), NAMED),
        ("a bomb of 10 billion pixels", bomb(100_000, 100_000), NAMED),
        ("another size", png(random_images(1, size=4)[0]),
         r"row 5 of train\.parquet has 4 x 4 pixels, the first one 8 x 8"),
    ]
]  # fmt: skip


def labels_of(values: Any, **test: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder, "train", text=["a", "b"] * 3, label=values)
        write(folder, "test", text=["a"] * 6, label=test.get("test", values))

    return make


def named(names: list[str], test_names: list[str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for part, each in (("train", names), ("test", test_names)):
            features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=each))
            rows = {"text": ["a", "b"] * 3, "label": [0, 1] * 3}
            datasets.disable_progress_bars()
            datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}.parquet")

    return make


IN_LABELS = r"column 'label' in the \w+ part of data set 'own' holds "
LABELS: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("numbers", labels_of([0, 1, 2] * 2), None),
        ("a missing number in between", labels_of([0, 1, 5] * 2), None),
        ("names", labels_of(["cat", "dog", "owl"] * 2), None),
        ("booleans", labels_of([True, False] * 3), None),
        ("categories", labels_of(pa.array(["cat", "dog"] * 3).dictionary_encode()), None),
        ("8 bits", labels_of(pa.array([0, 1] * 3, pa.uint8())), None),
        ("ClassLabel", named(["cat", "dog"], ["cat", "dog"]), None),
        ("ClassLabel of other names", named(["cat", "dog"], ["dog", "cat"]), "same labels in all parts"),
        ("lists", labels_of([[0], [1]] * 3), IN_LABELS + "List.*expected class numbers or names"),
        ("floats", labels_of([0.0, 1.0] * 3), IN_LABELS + "float64.*expected class numbers or names"),
        ("dates", labels_of(pa.array([0, 1] * 3, pa.date32())), IN_LABELS + "date32"),
        ("objects", labels_of([{"a": 1}, {"a": 2}] * 3), IN_LABELS),
        ("missing", labels_of([0, None, 1, 0, 1, 0]), r"row 1 of train\.parquet has no label in column 'label'"),
        ("nothing but missing", labels_of(pa.array([None] * 6, pa.int64())), "has no label"),
        ("negative", labels_of([0, 1, -2, 0, 1, 0]), r"row 2 of train\.parquet has the label -2: expected 0 to"),
        ("-1 in training", labels_of([-1, 0] * 3), r"row 0 of train\.parquet has the label -1"),
        ("10 million", labels_of([0, 1, 0, 1, 10_000_000, 0]),
         r"row 4 of train\.parquet.*10000001 classes of 3 distinct"),
        ("2**63", labels_of(pa.array([0, 2**63] * 3, pa.uint64())), r"row 1 .*number them from 0 on"),
        ("numbers, and names in the test part", labels_of([0, 1] * 3, test=["a", "b"] * 3),
         "string, and int64 in the train"),
        ("numbers, and floats in the test part", labels_of([0, 1] * 3, test=[0.5] * 6), IN_LABELS + "float64"),
        ("numbers, and bytes in the test part", labels_of([0, 1] * 3, test=[b"a"] * 6), IN_LABELS + "binary"),
        ("32 bits in the test part", labels_of([0, 1] * 3, test=pa.array([0, 1] * 3, pa.int32())), None),
    ]
]  # fmt: skip

TEXTS = {"text": ["a b", "c d"] * 5, "label": [0, 1] * 5}


def parts(**columns: Any) -> Callable[[Path], None]:
    """A folder of files by their paths, with ``__`` for a slash and ``_of_`` for a shard."""

    def make(folder: Path) -> None:
        for name, rows in columns.items():
            path = folder / f"{name.replace('__', '/')}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(rows), path)

    return make


def spoiled(change: Callable[[bytes], bytes], file: str = "train.parquet") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_texts(folder)
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return make


def repeated(folder: Path) -> None:
    write_texts(folder)
    table = pa.table([pa.array(["a"] * 4), pa.array(["b"] * 4), pa.array([0, 1] * 2)], names=["text", "text", "label"])
    pq.write_table(table, folder / "train.parquet")


def no_columns(folder: Path) -> None:
    write_texts(folder)
    pq.write_table(pa.table({}), folder / "train.parquet")


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def checksums(folder: Path) -> None:
    """A byte in an uncompressed page is flipped, which only its checksum shows."""
    write_texts(folder)
    rows = {"text": ["topic"] * 50, "label": [0, 1] * 25}
    pq.write_table(pa.table(rows), folder / "train.parquet", compression="none", write_page_checksum=True)
    data = (folder / "train.parquet").read_bytes().replace(b"topic", b"tipoc", 1)
    (folder / "train.parquet").write_bytes(data)


NONE = {"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}
DAMAGED = r"train\.parquet is no parquet file, or a damaged one"
FOLDERS: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("train and test", parts(train=TEXTS, test=TEXTS), None),
        ("folders", parts(train__0000=TEXTS, train__0001=TEXTS, test__0=TEXTS), None),
        ("shards", parts(**{"data__train-0-of-2": TEXTS, "data__train-1-of-2": TEXTS, "data__test-0": TEXTS}), None),
        ("a folder of one data set", parts(plain__train=TEXTS, plain__test=TEXTS), None),
        ("numbers in front", parts(**{"00-train": TEXTS, "01-train": TEXTS, "00-test": TEXTS}), None),
        ("several data sets", parts(cola__train=TEXTS, cola__test=TEXTS, qqp__train=TEXTS, qqp__test=TEXTS),
         "several data sets: cola/, qqp/. Expected one"),
        ("several in one folder", parts(**{"a-train": TEXTS, "a-test": TEXTS, "b-train": TEXTS, "b-test": TEXTS}),
         "several data sets: a, b"),
        ("train of one, test of another", parts(small__train=TEXTS, large__test=TEXTS),
         "several data sets: large/, small/"),
        ("one beside another", parts(train=TEXTS, test=TEXTS, other__train=TEXTS), "several data sets: ., other/"),
        ("two validation parts", parts(train=TEXTS, test=TEXTS, validation_matched=TEXTS, validation_mismatched=TEXTS),
         "several validation parts: validation_matched.parquet, validation_mismatched.parquet"),
        ("val and dev", parts(train=TEXTS, test=TEXTS, val=TEXTS, dev=TEXTS), "several validation parts: dev.*, val"),
        ("two test parts", parts(train=TEXTS, test_a=TEXTS, test_b=TEXTS), "several test parts"),
        ("no test part", parts(train=TEXTS), "expected files with train and test in their names"),
        ("no train part", parts(test=TEXTS, validation=TEXTS), "expected files with train and test in their names"),
        ("no file", lambda folder: None, "with no parquet file"),
        ("an empty test part", parts(train=TEXTS, test=NONE), r"the test part, test\.parquet in .*, has no rows"),
        ("an empty train part", parts(train=NONE, test=TEXTS), "the train part, .* has no rows"),
        ("an empty validation part", parts(train=TEXTS, validation=NONE, test=TEXTS),
         "the validation part, .* has no rows"),
        ("one empty shard", parts(train__0=TEXTS, train__1=NONE, test=TEXTS), None),
        ("shards of other columns", parts(train__0=TEXTS, train__1={"text": ["a"], "y": [0]}, test=TEXTS),
         "has the columns text string, y int64, and .* has text string, label int64"),
        ("shards of other types", parts(train__0=TEXTS, train__1={"text": ["a"], "label": ["b"]}, test=TEXTS),
         "label string, and .*label int64"),
        ("a test part of other columns", parts(train=TEXTS, test={"sentence": ["a"], "label": [0]}),
         r"\['sentence', 'label'\], not 'text' as the train part has"),
        ("a test part without labels", parts(train=TEXTS, test={"text": ["a"]}), "not 'label' as the train part has"),
        ("labels withheld", parts(train=TEXTS, validation=TEXTS, test={"text": ["a"], "label": [-1]}), None),
        ("no label column, but a validation part", parts(train=TEXTS, validation=TEXTS, test={"text": ["a"]}), None),
        ("more columns in the test part", parts(train=TEXTS, test={**TEXTS, "id": list(range(10))}), None),
        ("train cut in half", spoiled(lambda data: data[: len(data) // 2]), DAMAGED),
        ("train cut by a byte", spoiled(lambda data: data[:-1]), DAMAGED),
        ("train a text", spoiled(lambda data: b"text,label\na,0\n"), DAMAGED),
        ("train empty", spoiled(lambda data: b""), DAMAGED),
        ("train of zeros", spoiled(lambda data: bytes(len(data))), DAMAGED),
        ("test cut in half", spoiled(lambda data: data[: len(data) // 2], "test.parquet"),
         r"test\.parquet is no parquet"),
        ("a byte flipped in the footer", spoiled(lambda data: data[:-8] + b"\xff\xff" + data[-6:]), DAMAGED),
        ("a byte flipped under a checksum", checksums, DAMAGED),
        ("columns of the same name", repeated, r"train\.parquet has several columns named 'text'"),
        ("no columns", no_columns, r"train\.parquet has no columns"),
    ]
]  # fmt: skip

CLASSES: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("names", b'["a", "b", "c"]', None),
        ("more names than labels", b'["a", "b", "c", "d"]', None),
        ("a byte order mark", b'\xef\xbb\xbf["a", "b", "c"]', None),
        ("too few", b'["a", "b"]', r"the label 2: expected 0 to 1, by the names in .*classes\.json"),
        ("a number", b"3", "classes.json: got 3: expected a list of names"),
        ("an object", b'{"0": "a"}', "classes.json: got .*: expected a list of names"),
        ("numbers", b"[0, 1, 2]", "expected a list of names"),
        ("empty", b"[]", "expected a list of names"),
        ("null", b"null", "expected a list of names"),
        ("a name twice", b'["a", "b", "a"]', "lists the name 'a' more than once"),
        ("not JSON", b"a, b, c", "classes.json cannot be read as JSON"),
        ("UTF-16", '["a", "b", "c"]'.encode("utf-16"), "classes.json cannot be read as JSON in UTF-8"),
        ("nested", b"[" * 100_000, "nested too deep"),
    ]
]  # fmt: skip


def bytes_as_text(row: bytes) -> pa.Array:
    """A column of strings whose row 2 holds any bytes."""
    offsets, data = (
        pa.py_buffer(np.array([0, 1, 2, 2 + len(row), 3 + len(row)], np.int32)),
        pa.py_buffer(b"ab" + row + b"c"),
    )
    return pa.Array.from_buffers(pa.string(), 4, [None, offsets, data])


def texts_of(values: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for part in ("train", "test"):
            write(folder, part, text=values, label=[0, 1, 0, 1])

    return make


READ: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("texts", (texts_of(["a", "b", "c", "d"]), {}), None),
        ("missing texts", (texts_of(["a", None, "", "d"]), {}), None),
        ("nothing but empty texts", (texts_of([""] * 4), {}), None),
        ("large strings", (texts_of(pa.array(["a"] * 4, pa.large_string())), {}), None),
        ("surrogates in UTF-8", (texts_of(bytes_as_text(b"\xed\xa0\x80")), {}),
         r"column 'text' in row 2 of train\.parquet is not UTF-8"),
        ("Latin-1", (texts_of(bytes_as_text(b"caf\xe9")), {}), r"row 2 of train\.parquet is not UTF-8"),
        ("NUL", (texts_of(["a\0b"] * 4), {}), None),
        ("bytes", (texts_of([b"a"] * 4), {"text_column": "text"}), "holds binary: expected texts"),
        ("numbers", (texts_of([1, 2, 3, 4]), {"text_column": "text"}), "holds int64: expected texts"),
        ("lists", (texts_of([["a"], ["b"]] * 2), {"text_column": "text"}), "expected texts"),
        ("the labels as text", (texts_of(["a"] * 4), {"text_column": "label"}),
         "the column of labels: expected another"),
        ("texts as images", (texts_of(["a"] * 4), {"image_column": "text"}), "holds string: expected images"),
        ("the texts as labels", (texts_of(["a"] * 4), {"text_column": "text", "label_column": "text"}),
         "column of labels"),
        ("labels of no column", (texts_of(["a"] * 4), {"label_column": "y"}), "label_column='y': expected one of"),
        ("no tokenizer", (texts_of(["a"] * 4), {"tokenizer": "/nowhere"}), "experiment.data.tokenizer='/nowhere'"),
    ]
]  # fmt: skip

VECTORS: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("vectors", b"the 1 2 3\ncat 4 5 6\n", None),
        ("a word with spaces", b". . . 1 2 3\n", "got vectors of 5 numbers"),
        ("a word with spaces below", b"the 1 2 3\n. . . 4 5 6\n", None),
        ("a text where a number should be", b"the 1 2 3\ncat 4 x 6\n", "line 2: could not convert .*'x'"),
        ("NaN", b"the 1 nan 3\n", "line 1: expected finite numbers"),
        ("1e400", b"the 1 1e400 3\n", "line 1: expected finite numbers"),
        ("too few numbers below", b"the 1 2 3\ncat 4 5\n", "line 2: got 2 numbers, expected 3"),
        ("another width", b"the 1 2\n", "got vectors of 2 numbers, expected 3"),
        ("the header of word2vec", b"400000 3\nthe 1 2 3\n", "got vectors of 1 numbers, expected 3"),
        ("binary", b"\x80\xfc\xff" * 50, "no text in UTF-8"),
        ("binary further down", b"the 1 2 3\n" + b"\xfc 1 2 3\n", "no text in UTF-8"),
        ("empty", b"", "its first line is empty"),
        ("an empty first line", b"\nthe 1 2 3\n", "its first line is empty"),
    ]
]  # fmt: skip

SUITES: list[Case] = [
    Case(name=name, given=given, message=message) for name, given, message in [
        ("binary", b"\xb7\x00\xff" * 30, "is not valid YAML in UTF-8"),
        ("UTF-16", "name: x".encode("utf-16"), "is not valid YAML in UTF-8"),
        ("empty", b"", "expected an object"),
        ("a list", b"- a\n- b\n", "expected an object"),
        ("a text", b"words", "expected an object"),
        ("no YAML", b"a: [1, 2", "is not valid YAML"),
        ("no groups", b"name: x\n", "groups\" is missing"),
        ("a key misspelt", b"name: x\ngroups: []\nchoosen: []\n", "choosen.*did you mean 'chosen'"),
        ("a group's key misspelt", b"name: x\ngroups: [{name: y, layer: [2], methods: {bp: {}}}]\n",
         "groups.0.layer.*'layers'"),
        ("layers a text", b"name: x\ngroups: [{name: y, layers: '2', methods: {bp: {}}}]\n",
         "groups.0.layers\": got '2'"),
        ("an unknown method", b"name: x\ngroups: [{name: y, layers: [2], methods: {mystery: {}}}]\n", "mystery"),
        ("nested", b"[" * 5000, "is not valid YAML"),
    ]
]  # fmt: skip

NONSENSE: list[Case] = [
    Case(name=f"{file}: {text[:30]!r}", given=(file, text), message=message) for file, text, message in [
        ("metrics.jsonl", b"3\n[1]\nnull\nx\n", None),
        ("metrics.jsonl", b'{"kind": "batch", "losses": 3}\n{"kind": "epoch", "epoch": "x"}\n', None),
        ("metrics.jsonl", b"\xff\xfe" * 40, None),
        ("metrics.jsonl", b"[" * 100_000, None),
        ("trace/trace.csv", b"3\n", None),
        ("trace/trace.csv", b"stage,instruction,start,end\nx,y,z,w\n1,F,2,1\n", None),
        ("trace/trace.csv", b"stage,instruction,start,end\n\0\0\0\n", None),
        ("trace/trace.csv", b"\xff\xfe" * 40, None),
        ("summary.json", b"3", r"summary\.json holds a int: expected a JSON object"),
        ("summary.json", b"{", r"summary\.json cannot be read as JSON"),
        ("summary.json", b"[" * 100_000, r"summary\.json cannot be read as JSON"),
        ("summary.json", b'{"partition": 3, "versions": 3, "idle": "x", "test_accuracy": {"a": 1}}', None),
        ("summary.json", b'{"partition": ["a", null], "exits": 3, "parameters": "many"}', None),
        ("config.json", b'{"experiment": 3, "associated_learning": [1], "resolved": "x"}', None),
        ("config.json", b"nonsense", r"config\.json cannot be read as JSON"),
    ]
]  # fmt: skip

CASES: list[Case] = [*IMAGES, *LABELS, *FOLDERS, *CLASSES, *READ, *VECTORS, *SUITES, *NONSENSE]


def load(folder: Path, **keys: Any) -> Any:
    """Loads a folder, with a cache beside it."""
    return load_data(config(folder, cache=str(folder.parent / "cache"), **keys), seed=0)


def folder_of(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@by_name(IMAGES)
def test_image(case: Case, tmp_path: Path) -> None:
    folder, good = folder_of(tmp_path), png(random_images(1)[0])
    write(folder, "train", image=[good] * 5 + [case.given] + [good] * 4, label=[0, 1] * 5)
    write(folder, "test", image=[good] * 2, label=[0, 1])
    meet(case, lambda: load(folder), folder=folder)


def test_levels_of_grey_are_kept(tmp_path: Path) -> None:
    folder, expected = folder_of(tmp_path), np.arange(64).reshape(8, 8) * 4
    for name, image in {
        "8": grey(expected.astype(np.uint8)),
        "16": grey((expected * 257).astype(np.uint16)),
        "32": grey((expected * 257).astype(np.int32), "TIFF"),
        "float": grey((expected / 255).astype(np.float32), "TIFF"),
    }.items():
        for part in ("train", "test"):
            write(folder, part, image=[image] * 4, label=[0, 1] * 2)
        test = load(folder).test
        assert isinstance(test, Images) and np.array_equal(test.pixels[0, 0], expected), name


def test_photographs_come_upright(tmp_path: Path) -> None:
    folder, pixels = folder_of(tmp_path), random_images(1)[0][:, :, 0]
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
    turned = encoded(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90), exif=exif)
    for part in ("train", "test"):
        write(folder, part, image=[grey(pixels), turned] * 2, label=[0, 1] * 2)
    test = load(folder).test
    assert torch.equal(test.pixels[0], test.pixels[1]) and np.array_equal(test.pixels[0, 0], pixels)


@by_name(LABELS)
def test_labels(case: Case, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    case.given(folder)
    splits = meet(case, lambda: load(folder), folder=folder)
    if splits is not None:
        assert splits.train.labels.min() >= 0 and splits.train.labels.max() < len(splits.classes)


def test_labels_keep_their_meaning(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    for values, classes, expected in [
        ([True, False, True, False], ["0", "1"], [1, 0, 1, 0]),
        (pa.array(["owl", "cat", "owl", "dog"]).dictionary_encode(), ["cat", "dog", "owl"], [2, 0, 2, 1]),
        ([3, 0, 3, 1], ["0", "1", "2", "3"], [3, 0, 3, 1]),
    ]:
        for part in ("train", "test"):
            write(folder, part, text=["a"] * 4, label=values)
        splits = load(folder)
        assert splits.classes == classes and splits.test.labels.tolist() == expected


@by_name(FOLDERS)
def test_folder(case: Case, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    case.given(folder)
    splits = meet(case, lambda: load(folder), folder=folder)
    assert splits is None or len(splits.test) > 0


def test_any_flipped_byte_of_a_file_is_no_error_of_another_library(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    spoiled(flipped)(folder)
    case = Case(name="flipped", given=None, message=None)
    try:
        meet(case, lambda: load(folder))
    except ValueError as error:
        assert type(error).__name__ == "ALDataError" and "train.parquet" in str(error)


@by_name(CLASSES)
def test_classes_file(case: Case, tmp_path: Path) -> None:
    folder = write_texts(folder_of(tmp_path))
    (folder / "classes.json").write_bytes(case.given)
    meet(case, lambda: load(folder), folder=folder)


@by_name(READ)
def test_texts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_al.data.hub.reachable", lambda: False)
    make, keys = case.given
    folder = folder_of(tmp_path)
    make(folder)
    meet(case, lambda: load(folder, **keys), folder=folder)


def test_tokenizer_with_code_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder, own = write_texts(folder_of(tmp_path)), tmp_path / "tokenizer"
    own.mkdir()
    (own / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"})
    )
    (own / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "mine.MineConfig"}, "model_type": "mine"}))
    (own / "mine.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Mine: pass\nclass MineConfig: pass\n"
    )
    case = Case(
        name="code", given=None, message="experiment.data.tokenizer=.*trust_remote_code|experiment.data.tokenizer="
    )
    meet(case, lambda: load(folder, tokenizer=str(own)), folder=folder)
    assert not (tmp_path / "executed").exists()


def pickled(path: Path) -> bytes:
    class Bad:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path}",)

    file = io.BytesIO()
    np.savez(file, pixels=np.array([Bad()], dtype=object), digest=np.array("x"))
    return file.getvalue()


@pytest.mark.parametrize("what", ["images", "texts"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "pickle", "changed", "head"])
def test_cache_file_is_made_anew(what: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path)
    (write_images if what == "images" else write_texts)(folder)
    first = load(folder).train.make_batch(torch.arange(4))
    files = sorted((tmp_path / "cache/ds_al").iterdir())
    contents = [file.read_bytes() for file in files]
    for file, data, other in zip(files, contents, contents[1:] + contents[:1], strict=True):
        with np.load(file) as arrays:
            changed = {name: arrays[name] for name in arrays.files}
        for name, array in changed.items():
            if name != "digest":
                changed[name] = array[::-1].copy()
        buffer = io.BytesIO()
        np.savez(buffer, **changed)
        bad = {
            "cut": data[: len(data) // 2],
            "empty": b"",
            "text": b"nonsense",
            "foreign": other,
            "head": b"PK",
        }
        bad |= {"pickle": pickled(tmp_path / "executed"), "changed": buffer.getvalue()}
        file.write_bytes(bad[damage])
    capsys.readouterr()
    again = load(folder).train.make_batch(torch.arange(4))
    assert capsys.readouterr().err.count("is made anew") == len(files)
    assert torch.equal(first[0] if what == "images" else first[0][0], again[0] if what == "images" else again[0][0])
    assert not (tmp_path / "executed").exists()
    load(folder)
    assert capsys.readouterr().err == ""  # what was made anew is read


@pytest.mark.parametrize("cache", ["a file", "a file/below", "/proc/cache"])
def test_cache_folder_that_is_a_file(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_texts(folder_of(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("mine")
    case = Case(name=cache, given=cache, message="cannot be cached in .*set experiment.data.cache")
    meet(case, lambda: load_data(config(folder, cache=cache), seed=0), folder=tmp_path)


@by_name(VECTORS)
def test_word_vectors(case: Case, tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_bytes(case.given)

    def fill() -> int:
        found = word_vectors(tmp_path / "vectors.txt", ["<pad>", "the", "cat", ". . ."], vocab_size=4, width=3)
        assert found is not None
        return found.fill(torch.randn(4, 3), padding_id=0)

    found = meet(case, fill, folder=tmp_path)
    assert found == (2 if case.message is None else None)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe", b"3", b"{}", b"null", b""])
def test_layer_times(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("DS_AL_CACHE", str(tmp_path))
    layer_times.path_of("facts").write_bytes(text)
    assert (
        layer_times.read("facts", ranks=1, layers=1) is None and "ignored the measured times" in capsys.readouterr().err
    )
    layer_times.write("facts", [[LayerTime(1.0, 2.0, 3.0)]])
    assert layer_times.read("facts", ranks=1, layers=1) == [[LayerTime(1.0, 2.0, 3.0)]]
    planted = layer_times.path_of("facts").read_text().replace("2.0", "200.0")
    layer_times.path_of("facts").write_text(planted)
    assert layer_times.read("facts", ranks=1, layers=1) is None
    layer_times.write("other facts", [[LayerTime(1.0, 2.0, 3.0)]])
    layer_times.path_of("other facts").rename(layer_times.path_of("facts"))
    assert layer_times.read("facts", ranks=1, layers=1) is None


@by_name(SUITES)
def test_suite(case: Case, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_bytes(case.given)
    meet(case, lambda: read_sweep(tmp_path / "suite.yaml"), folder=tmp_path)


@by_name(NONSENSE)
def test_report_on_nonsense(case: Case, tmp_path: Path) -> None:
    run = make_run(tmp_path, trace=4)
    file, text = case.given
    (run / file).write_bytes(text)

    def report() -> Any:
        runs, profiles = read([run])
        return content(runs, profiles=profiles, title=None, question=None)

    meet(case, report, folder=tmp_path)
