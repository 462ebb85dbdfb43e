"""The ``"experiment.data"`` block of a config: the data set and its conversion to micro-batches."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from ds_al.config.base import StrictModel
from ds_al.data.splits import Kind
from ds_al.errors import ALConfigError

OF_IMAGES = ("image_column", "image_size", "augment")
"""Config keys that do not apply to text."""
OF_TEXT = ("text_column", "tokenizer", "vocab_size", "max_length", "padding")
"""Config keys that do not apply to images."""
OF_STORED = ("image_column", "text_column", "label_column", "image_size", "cache")
"""Config keys that do not apply to a data set bundled with the package."""


class DataConfig(StrictModel):
    """Data options. Image keys are rejected for a text data set, and vice versa."""

    name: str = Field(
        min_length=1,
        description="`fashion-mnist-small` comes with the package; `fashion-mnist`, `cifar10`, `cifar100`, "
        "`tiny-imagenet`, `ag_news`, `dbpedia_14`, `imdb`, `sst2`, or any name on the Hugging Face hub, through the "
        "`datasets` library. With `path`, a name of your own.",
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of parquet files to read instead, assigned by their names: `train`, `test` and optionally "
        "`validation`, which replaces a test split that is missing or has no labels; `classes.json` in it may list "
        "the names of the classes.",
    )
    image_column: str | None = Field(
        default=None,
        description="Images: the column that contains them; by default that of the known set, or the only column of "
        "images.",
    )
    text_column: str | None = Field(
        default=None,
        description="Text: the column that contains it; by default that of the known set, or the only column of "
        "strings.",
    )
    label_column: str | None = Field(
        default=None, description="The column of class numbers or names; by default that of the known set, or `label`."
    )
    image_size: int | None = Field(
        default=None, ge=1, le=16_384, description="Images: height and width to scale to, once; by default unchanged."
    )
    tokenizer: str = Field(
        default="words",
        min_length=1,
        description="Text: name or folder of a `transformers` tokenizer; `words` builds a vocabulary from the words "
        "of the training split.",
    )
    vocab_size: int = Field(
        default=30_000, ge=3, description="Text: maximum number of tokens in the vocabulary of `words`."
    )
    max_length: int = Field(
        default=128, ge=1, le=1_000_000, description="Text: maximum number of tokens; longer texts are truncated."
    )
    padding: Literal["max_length", "longest", "bucket"] = Field(
        default="max_length",
        description="Text: pad each micro-batch to `max_length`, or to its `longest` text; `bucket` does the latter, "
        "with training micro-batches of texts of similar length.",
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of the training samples that is used for validation if the set has no validation split.",
    )
    augment: Literal["none", "flip", "crop_and_flip", "published"] = Field(
        default="none",
        description="Random changes of the training images: `flip` mirrors, `crop_and_flip` also shifts by up to 2 "
        "pixels; `published` shifts by up to 4 pixels over a black border, mirrors, and changes brightness, contrast "
        "and saturation.",
    )
    prefetch: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="Number of training micro-batches that a thread prepares in advance; 0 prepares them on demand.",
    )
    cache: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for downloaded, decoded and tokenized data; by default that of the `datasets` library.",
    )
    eval_batch_size: int = Field(default=250, ge=1, description="Samples per batch of an evaluation.")


def refuse_other_kind(config: DataConfig, kind: Kind) -> None:
    """Checks that no key of the other kind of data is set."""
    if kind == "image":
        refuse(config, OF_TEXT, reason="holds images")
    else:
        refuse(config, OF_IMAGES, reason="holds text")


def refuse(config: DataConfig, keys: tuple[str, ...], *, reason: str) -> None:
    """Checks that the given keys have their default values.

    Args:
        config: the block.
        keys: names of the keys.
        reason: end of the clause that begins with the name of the set.

    Raises:
        ALConfigError: a key has another value.
    """
    for key in keys:
        value, default = getattr(config, key), type(config).model_fields[key].default
        if value != default:
            raise ALConfigError(
                f"got experiment.data.{key}={value!r}, but data set {config.name!r} {reason}: leave {key!r} out, or "
                f"give its default, --set experiment.data.{key}={json.dumps(default)}"
            )
