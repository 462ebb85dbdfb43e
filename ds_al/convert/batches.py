"""Batches of ``transformers`` collators as ``(x, labels)``: every key is used, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_al.convert.tokens import check_form, check_mask
from ds_al.errors import ALDataError

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
"""Keys that become x."""

_PACKED = "give one text per row, as DataCollatorWithPadding does, or texts joined to one"
_ENCODER = "models of an encoder and a decoder are not converted"
_CACHE = "training keeps no cache"
_OUTPUT = "an AL network returns scores alone"
REFUSED = {
    "position_ids": f"tokens are numbered from the first of a row on; {_PACKED}",
    "seq_idx": _PACKED,
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), _PACKED),
    "inputs_embeds": "give input_ids",
    **dict.fromkeys(("cache", "past_key_values", "use_cache", "cache_position"), _CACHE),
    **dict.fromkeys(
        ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "encoder_hidden_states",
         "encoder_attention_mask", "encoder_outputs"), _ENCODER,
    ),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"), _OUTPUT),
    "head_mask": "every head is used",
    "bool_masked_pos": "every patch is used",
    "interpolate_pos_encoding": "give images of the model's size",
    "label": "rename it to labels",
    "label_ids": "rename it to labels",
}  # fmt: skip
"""Other inputs of ``transformers`` models, and why or what instead."""


def converted(batch: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    """Returns ``(x, labels)``; the implementation of :func:`ds_al.convert.batch_fn`."""
    if not isinstance(batch, Mapping):
        raise ALDataError(f"got a batch that is a {type(batch).__name__}: expected a mapping, as collators return it")
    x = inputs(batch)
    labels = batch.get("labels")
    if labels is None:
        raise ALDataError(f"got a batch without labels, of {', '.join(map(str, batch))}: expected the key 'labels'")
    return x, labels


def inputs(batch: Mapping[str, Tensor]) -> Any:
    """Returns x of a batch; errors as in :func:`ds_al.convert.batch_fn`, but for the labels."""
    given = {key: value for key, value in batch.items() if value is not None and key != "labels"}
    for key in (key for key in given if key not in INPUTS):
        why = REFUSED.get(
            key, "no converted model takes it; leave it out, or make (x, labels) by a batch_fn of your own"
        )
        raise ALDataError(f"got {key!r} in a batch: expected {', '.join(INPUTS)} and labels. {why[0].upper()}{why[1:]}")
    if "pixel_values" in given:
        if len(given) > 1:
            raise ALDataError(f"got a batch of {' and '.join(sorted(given))}: expected pixels or token ids, not both")
        return given["pixel_values"]
    if "input_ids" not in given:
        raise ALDataError(
            f"got a batch of {', '.join(map(str, batch)) or 'nothing'}: expected input_ids or pixel_values. Rename "
            "columns, or make (x, labels) by a batch_fn of your own"
        )
    for key, value in given.items():
        if not isinstance(value, Tensor):
            raise ALDataError(
                f"got {key!r} of {type(value).__name__} in a batch: expected a tensor; a collator makes one"
            )
    ids, mask, types = given["input_ids"], given.get("attention_mask"), given.get("token_type_ids")
    if mask is not None:
        check_mask(mask)
        mask = mask.bool() if mask.is_floating_point() else mask
    elif types is not None:
        mask = torch.ones_like(ids)
    check_form(ids, mask, types, longest=None)
    return tuple(part for part in (ids, mask, types) if part is not None)
