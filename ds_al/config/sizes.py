"""Sizes of a batch: DeepSpeed's three keys, of which it derives those that are absent from the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_al.config.base import validate
from ds_al.config.passed import PassedKeys
from ds_al.errors import ALConfigError

BATCH, MICRO_BATCH, MICRO_BATCHES = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def batch_sizes(config: Mapping[str, Any], *, replicas: int = 1) -> dict[str, int]:
    """Returns all three sizes; ``null`` and ``"auto"`` count as absent.

    Args:
        config: a DeepSpeed config.
        replicas: data parallel replicas, R: a batch has micro-batch size x micro-batches x R samples.

    Raises:
        ALConfigError: a size is no whole number of 1 or more, neither size is given, or the three disagree.
    """
    keys = (BATCH, MICRO_BATCH, MICRO_BATCHES)
    given = {key: config[key] for key in keys if config.get(key) not in (None, "auto")}
    validate(PassedKeys, given)
    batch: Any = given.get(BATCH)
    micro_batch, micro_batches = given.get(MICRO_BATCH), given.get(MICRO_BATCHES)
    if micro_batch is None and batch is None:
        raise ALConfigError(f'"{MICRO_BATCH}": got {config.get(MICRO_BATCH)!r}: expected a whole number of 1 or more')
    if micro_batches is None:
        micro_batches = 1 if micro_batch is None or batch is None else batch // (micro_batch * replicas)
    if micro_batch is None:
        micro_batch = batch // (micro_batches * replicas)
    product = micro_batch * micro_batches * replicas
    if batch not in (None, product):
        raise ALConfigError(
            f'"{BATCH}": got {batch}, which is not "{MICRO_BATCH}" x "{MICRO_BATCHES}" x replicas, {micro_batch} x '
            f"{micro_batches} x {replicas} = {product}: correct one of them, or remove it"
        )
    return {BATCH: product, MICRO_BATCH: micro_batch, MICRO_BATCHES: micro_batches}
