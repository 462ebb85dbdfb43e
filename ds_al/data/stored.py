"""Loading of data sets stored as tables, on the hub or in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ds_al.data import cache, decode
from ds_al.data.config import DataConfig, refuse, refuse_other_kind
from ds_al.data.images import Images, statistics
from ds_al.data.splits import Splits, cut
from ds_al.data.tables import DatasetTables, find
from ds_al.data.tokenise import Pretrained, Tokenizer, tokenise, vocabulary
from ds_al.data.tokens import Tokens
from ds_al.data.words import Words
from ds_al.errors import ALDataError


def load_stored(config: DataConfig, *, seed: int) -> Splits:
    """Loads a stored data set, see :func:`~ds_al.data.load.load_data`."""
    tables = find(
        config.name,
        path=config.path,
        image_column=config.image_column,
        text_column=config.text_column,
        label_column=config.label_column,
        cache=None if config.cache is None else Path(config.cache).expanduser(),
    )
    refuse_other_kind(config, tables.kind)
    folder = cache.folder(config.cache)
    kept: Tensor
    held: Tensor | None
    if "validation" in tables.parts:
        refuse(config, ("validation_fraction",), reason="has a validation part of its own")
        kept, held = torch.arange(len(tables.parts["train"].table)), None
    else:
        count = len(tables.parts["train"].table)
        kept, held = cut(count, fraction=config.validation_fraction, seed=seed, name=config.name)
    return (_images if tables.kind == "image" else _text)(tables, config, kept, held, folder)


def _images(tables: DatasetTables, config: DataConfig, kept: Tensor, held: Tensor | None, folder: Path) -> Splits:
    found = {
        name: (
            decode.pixels(part.table, tables.x, size=config.image_size, folder=folder, place=part.place),
            tables.labels(name),
        )
        for name, part in tables.parts.items()
    }
    sizes = {name: tuple(pixels.shape[2:]) for name, (pixels, _) in found.items()}
    if len(set(sizes.values())) > 1:
        raise ALDataError(
            f"images of the parts differ in height and width, {sizes}: set experiment.data.image_size to scale all of "
            "them to one size"
        )
    channels = max(pixels.shape[1] for pixels, _ in found.values())  # a part may have grey images only
    found = {part: (pixels.expand(-1, channels, -1, -1), labels) for part, (pixels, labels) in found.items()}
    pixels, labels = found["train"]
    if held is not None:
        found["validation"] = pixels[held], labels[held]
        found["train"] = pixels[kept], labels[kept]
    scale = statistics(found["train"][0])
    return Splits(
        kind="image",
        train=Images(*found["train"], statistics=scale),
        validation=Images(*found["validation"], statistics=scale),
        test=Images(*found["test"], statistics=scale),
        classes=tables.classes,
        shape=tuple(pixels.shape[1:]),
    )


def _text(tables: DatasetTables, config: DataConfig, kept: Tensor, held: Tensor | None, folder: Path) -> Splits:
    tokenizer: Tokenizer
    if config.tokenizer == "words":
        train = tables.parts["train"]
        tokenizer = vocabulary(train.table, tables.x, kept, size=config.vocab_size, folder=folder, place=train.place)
    else:
        refuse(config, ("vocab_size",), reason=f"is read by the tokenizer {config.tokenizer!r}, which has a size")
        tokenizer = Pretrained(config.tokenizer)
    pad_to = config.max_length if config.padding == "max_length" else None
    found = {
        name: Tokens(
            *tokenise(part.table, tables.x, tokenizer, max_length=config.max_length, folder=folder, place=part.place),
            tables.labels(name),
            padding_id=tokenizer.padding_id,
            pad_to=pad_to,
        )
        for name, part in tables.parts.items()
    }
    if held is not None:
        found["validation"], found["train"] = found["train"].select(held), found["train"].select(kept)
    return Splits(
        kind="text",
        train=found["train"],
        validation=found["validation"],
        test=found["test"],
        classes=tables.classes,
        shape=(config.max_length,),
        vocab_size=tokenizer.vocab_size,
        padding_id=tokenizer.padding_id,
        varying=pad_to is None,
        lengths=found["train"].lengths if config.padding == "bucket" else None,
        save_vocabulary=tokenizer.save if isinstance(tokenizer, Words) else None,
    )
