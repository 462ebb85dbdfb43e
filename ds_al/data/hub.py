"""Loading of data sets and tokenizers from the Hugging Face hub; if it is unreachable, from the cache or with an
error."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub.constants

from ds_al.errors import ALDataError

SECONDS = 5.0
"""Time-out in seconds after which the hub is considered unreachable."""


def reachable() -> bool:
    """Returns whether ``HF_HUB_OFFLINE`` allows the hub and a connection to it opens."""
    if datasets.config.HF_HUB_OFFLINE or huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if getproxies().get("https"):
        return True  # only a request shows whether the proxy reaches the hub
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def without_retries(online: bool) -> Iterator[None]:
    """Prevents both libraries from retrying for half a minute or more if the hub is unreachable."""
    if online:
        yield
        return
    with (
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disables the progress bars of ``datasets``, which would interfere with the display of a run."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def load(name: str, *, cache: Path | None) -> datasets.DatasetDict:
    """Loads a data set of the hub, from the cache or by download.

    Raises:
        ALDataError: the data set is not cached and cannot be downloaded; the message names the option for a local path.
    """
    online = reachable()
    try:
        with without_retries(online), no_progress_bars():
            return datasets.load_dataset(name, cache_dir=None if cache is None else os.fspath(cache))
    except Exception as error:  # a dozen types of four libraries
        state = "the hub could not be reached" if not online else f"{type(error).__name__}: {_first_line(error)}"
        raise ALDataError(
            f"data set {name!r} is neither cached nor could it be downloaded ({state}): set experiment.data.path, or "
            "--data-path, to a folder of its parquet files, or experiment.data.cache to where it is cached"
        ) from error


def tokenizer(name: str) -> Any:
    """Loads a ``transformers`` tokenizer from a local folder, the cache or the hub.

    Raises:
        ALDataError: the tokenizer is not found.
    """
    from transformers import AutoTokenizer

    local = Path(name).expanduser()
    online = not local.is_dir() and reachable()
    try:
        with without_retries(online):
            return AutoTokenizer.from_pretrained(
                local if local.is_dir() else name, local_files_only=not online, trust_remote_code=False
            )
    except Exception as error:
        state = f"{type(error).__name__}: {_first_line(error)}" if local.is_dir() or online else "no connection"
        raise ALDataError(
            f"got experiment.data.tokenizer={name!r}: it is neither a folder with a tokenizer, nor cached, nor could "
            f'it be downloaded ({state}); give such a folder, or "words" for a vocabulary of the training texts'
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
