"""Checks of token ids, masks and token types."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_al.errors import ALDataError


def check_form(ids: Tensor, mask: Tensor | None, types: Tensor | None, *, longest: int | None) -> None:
    """Checks shapes and types of ``x``, which every device knows without looking at a value.

    Raises:
        ALDataError: ids are no integers ``(B, T)``, or more than the model has positions; mask or token types have
            another shape, such as a mask ``(B, 1, T, T)``, or are floats, such as a mask that is added.
    """
    if ids.ndim != 2 or not ids.shape[1] or not _whole(ids):
        raise ALDataError(f"got token ids {_form(ids)}: expected integers (B, T), T at least 1")
    if longest is not None and ids.shape[1] > longest:
        raise ALDataError(
            f"got texts of {ids.shape[1]} tokens for a model of {longest} positions: truncate them, "
            f"tokenizer(..., truncation=True, max_length={longest})"
        )
    if mask is not None and mask.shape != ids.shape:
        raise ALDataError(
            f"got a mask {_form(mask)} for token ids {_form(ids)}: expected one value per token, 1 at a token and 0 at "
            "padding. Masks of pairs of tokens (B, 1, T, T) are not supported: give the tokenizer's attention_mask, "
            "one text per row"
        )
    if mask is not None and not (_whole(mask) or mask.dtype == torch.bool):
        raise ALDataError(
            f"got a mask {_form(mask)}: expected booleans or integers, 1 at a token and 0 at padding; use mask.bool() "
            "if it has these values. Masks that are added (0 and -inf) are not supported"
        )
    if types is not None and (types.shape != ids.shape or not _whole(types)):
        raise ALDataError(f"got token types {_form(types)} for token ids {_form(ids)}: expected integers (B, T)")


def check_values(ids: Tensor, mask: Tensor | None, types: Tensor | None, *, vocabulary: int, kinds: int) -> None:
    """Checks the values of ``x``.

    Args:
        vocabulary, kinds: numbers of token ids and of token types of the model.

    Raises:
        ALDataError: an id or a token type is not in the model's embedding, or a mask numbers packed texts 1, 2, ...
    """
    _check_range("token ids", ids, vocabulary, "the tokenizer has more tokens: model.resize_token_embeddings")
    if mask is not None and mask.dtype != torch.bool:
        check_mask(mask)
    if types is not None and not kinds:
        raise ALDataError("got (ids, mask, token types): this model has no token types; give (ids, mask)")
    if types is not None:
        _check_range("token types", types, kinds, "give (ids, mask)" if kinds < 2 else "look at the tokenizer")


def check_mask(mask: Tensor) -> None:
    """Raises :class:`ALDataError` if a mask has values other than 0 and 1."""
    if mask.numel() and not ((mask == 0) | (mask == 1)).all():
        raise ALDataError(
            f"got a mask with values from {float(mask.min()):g} to {float(mask.max()):g}: expected 1 at a token and 0 "
            "at padding. Masks that number packed texts 1, 2, ..., and masks that are added (0 and -inf), are not "
            "supported: give one text per row"
        )


def _check_range(name: str, values: Tensor, count: int, remedy: str) -> None:
    low, high = (int(value) for value in torch.aminmax(values)) if values.numel() else (0, 0)
    if low < 0 or high >= count:
        raise ALDataError(f"got {name} from {low} to {high}: expected 0..{count - 1}, those of the model; {remedy}")


def _whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool


def _form(tensor: Tensor) -> str:
    return f"of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
