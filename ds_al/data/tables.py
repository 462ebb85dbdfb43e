"""Tables of a data set with their columns and classes, on the hub or in a folder of parquet files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor

from ds_al.config.base import parse, read_text
from ds_al.data import hub
from ds_al.data.folders import PARTS, StoredPart, read_folder
from ds_al.data.registry import KNOWN, Known
from ds_al.data.splits import Kind
from ds_al.errors import ALDataError

Content = Literal["image", "text", "number"]
"""What a column holds, as far as it can be used."""
_MOST_CLASSES = 1000
"""Classes up to which labels may leave numbers out."""


@dataclass(frozen=True, kw_only=True)
class DatasetTables:
    """A stored data set.

    Attributes:
        kind: kind of x.
        parts: parts by name: ``train``, ``test`` and optionally ``validation``.
        x, y: names of the columns of image or text, and of the label.
        classes: names of the classes, by number.
    """

    kind: Kind
    parts: dict[str, StoredPart]
    x: str
    y: str
    classes: list[str]

    def labels(self, part: str) -> Tensor:
        """Returns the class numbers of a part ``(N,)``, ``int64``."""
        column = self.parts[part].table.with_format("numpy")[self.y][:]
        if column.dtype.kind in "OUST":
            numbers = {name: number for number, name in enumerate(self.classes)}
            return torch.tensor([numbers[str(name)] for name in column], dtype=torch.int64)
        return torch.from_numpy(column.astype(np.int64))


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
        ALDataError: the data set is not found, has no train part, no test part or not the requested column, or a column
            holds something else than it has to, or not the same in all parts.
    """
    known = KNOWN.get(name)
    parts = _published(known.hub if known else name, cache) if path is None else read_folder(path)
    train = parts["train"].table
    y = _label_column(train, name, asked=label_column, known=known.y if known else None)
    if "validation" in parts and ("test" not in parts or _is_unlabelled(parts["test"].table, y)):
        parts["test"] = parts.pop("validation")
    asked: dict[Kind, str | None] = {"image": image_column, "text": text_column}
    kind, x = _x_column(train, name, asked=asked, known=known, y=y)
    for part in parts.values():
        _check_columns(part, parts["train"], name, kind=kind, x=x, y=y)
    return DatasetTables(kind=kind, parts=parts, x=x, y=y, classes=_classes(parts, y, name, path))


def _published(name: str, cache: Path | None) -> dict[str, StoredPart]:
    """Returns the parts of a data set of the hub, without those that are for something else, such as unlabelled texts.

    Raises:
        ALDataError: it has no train part, nothing to test on, or several parts of one kind.
    """
    tables = hub.load(name, cache=cache)
    kinds = [PARTS[key] for key in tables if key in PARTS]
    if "train" not in kinds or len(kinds) == 1 or len(set(kinds)) < len(kinds):
        raise ALDataError(
            f"data set {name!r} has the parts {', '.join(tables)}: expected train, and test or validation, each once; "
            "store those that are meant as parquet files of these names, and set experiment.data.path, or --data-path, "
            "to their folder"
        )
    return {PARTS[key]: StoredPart(PARTS[key], table) for key, table in tables.items() if key in PARTS}


def _is_unlabelled(table: datasets.Dataset, y: str) -> bool:
    """Whether the labels of a published test part are withheld: its column is absent, or all of it is -1."""
    return y not in table.column_names or (_content(table.features[y]) == "number" and set(table.unique(y)) == {-1})


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
            if column == y:
                raise ALDataError(
                    f"got experiment.data.{kind}_column={column!r}, the column of labels: expected another"
                )
            return kind, column
    if known is not None and known.x in table.column_names:
        return known.kind, known.x
    candidates: dict[Kind, list[str]] = {"image": [], "text": []}
    for key, feature in table.features.items():
        content = _content(feature)
        if key != y and content in candidates:
            candidates[content].append(key)
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


def _content(feature: Any) -> Content | None:
    """Returns what a column holds; ``None`` for what can be neither an input nor a label."""
    if isinstance(feature, dict):
        return "image" if "bytes" in feature else None
    dtype = str(getattr(feature, "dtype", ""))
    if isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and dtype.endswith("binary")):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "number"
    if isinstance(feature, datasets.Value) and (dtype == "bool" or "int" in dtype):
        return "number"
    return "text" if isinstance(feature, datasets.Value) and dtype.endswith("string") else None


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


def _check_columns(part: StoredPart, train: StoredPart, name: str, *, kind: Kind, x: str, y: str) -> None:
    """Checks that a part has rows, and in both columns what the train part has there."""
    where = f"the {part.name} part of data set {name!r}"
    if not len(part.table):
        raise ALDataError(f"{where} has no rows: expected at least one")
    features = part.table.features
    for column in (x, y):
        if column not in features:
            raise ALDataError(
                f"{where} has the columns {part.table.column_names}, not {column!r} as the train part has"
            )
    if _content(features[x]) != kind:
        raise ALDataError(
            f"column {x!r} in {where} holds {_type(features[x])}: expected "
            + ("images, or the bytes of their files" if kind == "image" else "texts")
            + f"; choose another by experiment.data.{kind}_column"
        )
    if _content(features[y]) not in ("number", "text"):
        raise ALDataError(
            f"column {y!r} in {where} holds {_type(features[y])}: expected class numbers or names, for example "
            f"{part.table[:1][y]} is none; choose another by experiment.data.label_column or --label-column"
        )
    first = train.table.features[y]
    named = isinstance(first, datasets.ClassLabel) and isinstance(features[y], datasets.ClassLabel)
    if _content(first) != _content(features[y]) or (named and first.names != features[y].names):
        raise ALDataError(
            f"column {y!r} in {where} holds {_type(features[y])}, and {_type(first)} in the train part: expected the "
            "same labels in all parts"
        )


def _type(feature: Any) -> str:
    return (
        f"classes {feature.names}"
        if isinstance(feature, datasets.ClassLabel)
        else str(getattr(feature, "dtype", feature))
    )


def _classes(parts: dict[str, StoredPart], y: str, name: str, path: str | None) -> list[str]:
    """Returns the class names: those of ``classes.json``, of the table, or else the labels themselves."""
    feature = parts["train"].table.features[y]
    seen = {label for part in parts.values() for label in part.table.unique(y)}
    if None in seen:
        raise ALDataError(f"{_first(parts, y, None)} has no label in column {y!r}: add it, or leave the row out")
    listed: list[str] | None = None
    source = "as there are that many classes"
    if path is not None and (file := Path(path).expanduser() / "classes.json").is_file():
        listed, source = _listed(file), f"by the names in {file}"
    elif isinstance(feature, datasets.ClassLabel):
        listed = list(feature.names)
    if _content(feature) == "text":
        if listed is None:
            return sorted(seen)
        if unknown := sorted(seen - set(listed)):
            raise ALDataError(f"{_first(parts, y, unknown[0])} has the label {unknown[0]!r}: expected one of {listed}")
        return listed
    if listed is None:
        if min(seen) >= 0 and max(seen) >= max(_MOST_CLASSES, 2 * len(seen)):
            raise ALDataError(
                f"{_first(parts, y, max(seen))} has the label {max(seen)}, which makes {max(seen) + 1} classes of "
                f"{len(seen)} distinct labels: number them from 0 on, or list their names in classes.json"
            )
        listed = [str(number) for number in range(int(max(seen)) + 1)]
    if outside := sorted(label for label in seen if not 0 <= label < len(listed)):
        raise ALDataError(
            f"{_first(parts, y, outside[0])} has the label {outside[0]}: expected 0 to {len(listed) - 1}, {source}"
        )
    return listed


def _listed(file: Path) -> list[str]:
    """Reads class names."""
    try:
        names = parse(read_text(file))
    except (OSError, ValueError) as error:
        raise ALDataError(f"{file} cannot be read as JSON in UTF-8: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(each, str) for each in names):
        raise ALDataError(f'{file}: got {str(names)[:100]}: expected a list of names by class number, ["cat", "dog"]')
    if repeated := sorted({each for each in names if names.count(each) > 1}):
        raise ALDataError(f"{file} lists the name {repeated[0]!r} more than once: expected one name per class")
    return names


def _first(parts: dict[str, StoredPart], y: str, label: Any) -> str:
    """Returns the place of the first row with a label."""
    return next(
        part.place(row) for part in parts.values() for row, each in enumerate(part.table[y][:]) if each == label
    )
