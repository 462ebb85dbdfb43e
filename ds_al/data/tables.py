"""Tables of a data set with their columns and classes, on the hub or in a folder of parquet files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from ds_al.data import hub
from ds_al.data.registry import KNOWN, Known
from ds_al.data.splits import Kind
from ds_al.errors import ALDataError

_PARTS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_PART_IN_NAME = re.compile(rf"(?:^|[-_./])({'|'.join(_PARTS)})(?=[-_./])")


@dataclass(frozen=True, kw_only=True)
class DatasetTables:
    """A stored data set.

    Attributes:
        kind: kind of x.
        parts: tables by name: ``train``, ``test`` and optionally ``validation``.
        x, y: names of the columns of image or text, and of the label.
        classes: names of the classes, by number.
    """

    kind: Kind
    parts: dict[str, datasets.Dataset]
    x: str
    y: str
    classes: list[str]

    def labels(self, part: str) -> Tensor:
        """Returns the class numbers of a part ``(N,)``, ``int64``."""
        column = self.parts[part].with_format("numpy")[self.y][:]
        if column.dtype.kind in "OUST":
            numbers = {name: number for number, name in enumerate(self.classes)}
            return torch.tensor([numbers[str(name)] for name in column], dtype=torch.int64)
        return torch.from_numpy(column).to(torch.int64)


def find(
    name: str,
    *,
    path: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    cache: Path | None = None,
) -> DatasetTables:
    """Opens a data set; see the config keys of the same names.

    Raises:
        ALDataError: the data set is not found, or has no train part, no test part or not the requested column.
    """
    known = KNOWN.get(name)
    if path is not None:
        parts = _local_parts(path, cache)
    else:
        tables = hub.load(known.hub if known else name, cache=cache)
        parts = {_PARTS[key]: table for key, table in tables.items() if key in _PARTS}
    if "train" not in parts:
        raise ALDataError(f"data set {name!r} has the parts {sorted(parts)}: expected train and test")
    y = _label_column(parts["train"], name, asked=label_column, known=known.y if known else None)
    if "validation" in parts and ("test" not in parts or all(label == -1 for label in parts["test"].unique(y))):
        parts["test"] = parts.pop("validation")
    if "test" not in parts:
        raise ALDataError(f"data set {name!r} has the parts {sorted(parts)}: expected train and test")
    asked: dict[Kind, str | None] = {"image": image_column, "text": text_column}
    kind, x = _x_column(parts["train"], name, asked=asked, known=known, y=y)
    return DatasetTables(kind=kind, parts=parts, x=x, y=y, classes=_classes(parts, y, name, path))


def _local_parts(path: str, cache: Path | None) -> dict[str, datasets.Dataset]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ALDataError(
            f"got experiment.data.path={path!r}: expected a folder with parquet files for train and test"
            + (", not one file" if folder.is_file() else "; there is none of this name")
        )
    files: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        found = _PART_IN_NAME.search(file.relative_to(folder).as_posix())
        if found is not None:
            files.setdefault(_PARTS[found.group(1)], []).append(os.fspath(file))
    if "train" not in files or len(files) == 1:
        seen = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet"))
        raise ALDataError(
            f"got experiment.data.path={path!r} with {seen or 'no parquet file'}: expected files with train and test "
            "in their names, such as train.parquet and test.parquet"
        )
    with hub.no_progress_bars():
        tables = datasets.load_dataset(
            "parquet", data_files=files, cache_dir=None if cache is None else os.fspath(cache)
        )
    return dict(tables)


def _x_column(
    table: datasets.Dataset, name: str, *, asked: dict[Kind, str | None], known: Known | None, y: str
) -> tuple[Kind, str]:
    """Returns kind and column of x: those of the config, of the known data set, or else the only candidate."""
    kinds = [kind for kind, column in asked.items() if column is not None]
    if len(kinds) == 2:
        raise ALDataError(
            f"got image_column={asked['image']!r} and text_column={asked['text']!r}: expected one of them"
        )
    if known is not None:
        kinds = [known.kind]
    for kind in kinds:
        column = asked[kind]
        if column is not None:
            _check_column(table, column, name, key=f"{kind}_column")
            return kind, column
    if known is not None and known.x in table.column_names:
        return known.kind, known.x
    candidates: dict[Kind, list[str]] = {"image": [], "text": []}
    for key, feature in table.features.items():
        if _is_image(feature):
            candidates["image"].append(key)
        elif key != y and getattr(feature, "dtype", None) in ("string", "large_string"):
            candidates["text"].append(key)
    for kind in kinds or candidates:
        if len(candidates[kind]) == 1:
            return kind, candidates[kind][0]
        if candidates[kind]:
            raise ALDataError(
                f"data set {name!r} has several columns of {kind}, {candidates[kind]}: choose one by "
                f"experiment.data.{kind}_column" + (" or --text-column" if kind == "text" else "")
            )
    raise ALDataError(
        f"data set {name!r} has the columns {table.column_names}, none of {' or '.join(kinds or candidates)}: name one "
        "by experiment.data.image_column or experiment.data.text_column"
    )


def _is_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _label_column(table: datasets.Dataset, name: str, *, asked: str | None, known: str | None) -> str:
    if asked is not None:
        _check_column(table, asked, name, key="label_column")
        return asked
    for column in (known, "label"):
        if column is not None and column in table.column_names:
            return column
    named = [key for key, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(named) == 1:
        return named[0]
    raise ALDataError(
        f"data set {name!r} has the columns {table.column_names}, none called label: name it by "
        "experiment.data.label_column or --label-column"
    )


def _check_column(table: datasets.Dataset, column: str, name: str, *, key: str) -> None:
    if column not in table.column_names:
        raise ALDataError(
            f"got experiment.data.{key}={column!r}: expected one of the columns of {name!r}, {table.column_names}"
        )


def _classes(parts: dict[str, datasets.Dataset], y: str, name: str, path: str | None) -> list[str]:
    """Returns the class names: those of ``classes.json``, of the table, or else the labels themselves."""
    feature = parts["train"].features[y]
    seen = sorted({label for table in parts.values() for label in table.unique(y)}, key=lambda v: (str(type(v)), v))
    listed: list[str] | None = None
    if path is not None and (file := Path(path).expanduser() / "classes.json").is_file():
        listed = [str(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    elif isinstance(feature, datasets.ClassLabel):
        listed = list(feature.names)
    if seen and all(isinstance(label, str) for label in seen):
        if listed is None:
            return seen
        if unknown := [label for label in seen if label not in listed]:
            raise ALDataError(f"data set {name!r} has the label {unknown[0]!r}: expected one of {listed}")
        return listed
    if not all(isinstance(label, int) for label in seen):
        raise ALDataError(
            f"column {y!r} of data set {name!r} holds {seen[:5]}: expected class numbers or names; choose another by "
            "experiment.data.label_column or --label-column"
        )
    if listed is None:
        listed = [str(number) for number in range(max(seen) + 1)]
    if outside := [label for label in seen if not 0 <= label < len(listed)]:
        raise ALDataError(
            f"data set {name!r} has the label {outside[0]}: expected 0 to {len(listed) - 1}, as there are "
            f"{len(listed)} classes"
        )
    return listed
