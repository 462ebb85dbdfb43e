"""Folders of parquet files: which file belongs to which part, and tables whose files are whole and alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ds_al.errors import ALDataError

PARTS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
"""Words in file names, and the parts they stand for."""
_PART_IN_NAME = re.compile(rf"(?:^|(?<=[-_./]))({'|'.join(PARTS)})(?=[-_./])")
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")
"""End of a file name that numbers the files of one table, as ``-00000-of-00001``."""


@dataclass(frozen=True)
class StoredPart:
    """One part of a data set.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        table: its rows.
        files: files that it was read from, in order, with their numbers of rows; empty for a set of the hub.
    """

    name: str
    table: datasets.Dataset
    files: tuple[tuple[str, int], ...] = ()

    def place(self, row: int) -> str:
        """Returns where a row is, such as ``row 5 of train.parquet``."""
        for file, rows in self.files:
            if row < rows:
                return f"row {row} of {file}"
            row -= rows
        return f"row {row} of the {self.name} part"


def read_folder(path: str) -> dict[str, StoredPart]:
    """Reads the parts of a folder, by the names of its files.

    Raises:
        ALDataError: there is no such folder, no train part or one part alone, several data sets or several parts of one
            kind, or a file that is damaged or of other columns than the others of its part.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ALDataError(
            f"got experiment.data.path={path!r}: expected a folder with parquet files for train and test"
            + (", not one file" if folder.is_file() else "; there is none of this name")
        )
    found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet"))
    files: dict[str, dict[tuple[str, str], list[str]]] = {}  # part, then (data set, variant)
    for name in found:
        if match := _PART_IN_NAME.search(name):
            files.setdefault(PARTS[match.group(1)], {}).setdefault(_variant(name, match), []).append(name)
    if "train" not in files or len(files) == 1:
        raise ALDataError(
            f"got experiment.data.path={path!r} with {found or 'no parquet file'}: expected files with train and test "
            "in their names, such as train.parquet and test.parquet"
        )
    _check_one_set(path, files)
    return {
        part: _read(folder, part, next(iter(files[part].values())))
        for part in ("train", "validation", "test")
        if part in files
    }


def _variant(name: str, match: re.Match[str]) -> tuple[str, str]:
    """Returns what a file's name says beside its part: the data set before it, and words after it.

    A folder named by the part may have files of any names. ``data/`` in front says nothing.
    """
    before, word, after = name[: match.start()], match.group(1), name[match.end() :]
    *folders, start = before.split("/")
    data_set = "/".join([*(each for each in folders if each != "data"), re.sub(r"\d+[-_.]$", "", start).rstrip("-_.")])
    if "/" in after:
        return data_set, word
    return data_set, word + _SHARD.sub("", after.removesuffix(".parquet"))


def _check_one_set(path: str, files: dict[str, dict[tuple[str, str], list[str]]]) -> None:
    sets = sorted({data_set for variants in files.values() for data_set, _ in variants})
    if len(sets) > 1:
        names = ", ".join(name or "." for name in sets)
        raise ALDataError(
            f"got experiment.data.path={path!r}, which holds several data sets: {names}. Expected one: give the folder "
            "of one of them, or move its files to a folder of their own"
        )
    for part, variants in files.items():
        if len(variants) > 1:
            names = ", ".join(sorted(group[0] for group in variants.values()))
            raise ALDataError(
                f"got experiment.data.path={path!r} with several {part} parts: {names}. Expected one of each: move "
                "those that are meant to a folder of their own"
            )


def _read(folder: Path, part: str, names: Sequence[str]) -> StoredPart:
    tables = {name: _table(folder / name) for name in names}
    (first, table), *others = tables.items()
    for name, other in others:
        if not other.schema.equals(table.schema):
            raise ALDataError(
                f"{folder / name} has the columns {_columns(other)}, and {first} has {_columns(table)}: expected the "
                f"same in all files of the {part} part"
            )
    joined = pa.concat_tables(tables.values())
    if not len(joined):
        raise ALDataError(f"the {part} part, {', '.join(names)} in {folder}, has no rows: expected at least one")
    stamps = [(name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in names]
    digest = hashlib.blake2b(repr((str(folder.resolve()), stamps)).encode(), digest_size=16).hexdigest()
    try:
        rows = datasets.Dataset(datasets.table.InMemoryTable(joined), fingerprint=digest)
    except Exception as error:  # a type, or metadata, that `datasets` does not know
        raise ALDataError(
            f"{folder / first} cannot be read as a table of `datasets` ({type(error).__name__}: {error}): expected "
            f"columns of images or texts, and labels; got {_columns(joined)}"
        ) from error
    return StoredPart(part, rows, tuple((name, len(table)) for name, table in tables.items()))


def _table(file: Path) -> pa.Table:
    """Reads one file; columns of categories become columns of their values."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ALDataError(f"{file} has several columns named {repeated[0]!r}: expected distinct names")
            if not names:
                raise ALDataError(f"{file} has no columns: expected images or texts, and labels")
            table = parquet.read()
    except ALDataError:
        raise
    except Exception as error:  # of Arrow, of its codecs, and of the system
        raise ALDataError(
            f"{file} is no parquet file, or a damaged one ({type(error).__name__}: {error}): make or copy it anew"
        ) from error
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(field.type.value_type))
    return table


def _columns(table: pa.Table) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in table.schema)
