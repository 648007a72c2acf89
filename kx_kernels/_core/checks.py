"""Errors that name the argument, what it is and what it should be."""

from __future__ import annotations

from typing import NoReturn

import torch


class Description(str):
    """Words for what an argument is, where neither its value nor its shape says what is wrong."""


def describe(value: object) -> str:
    """A tensor as its dtype, shape and device; a Description as it stands; anything else as Python writes it."""
    if isinstance(value, Description):
        return str(value)
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return repr(value)


def reject(op: str, argument: str, value: object, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raises `error`: "rope: argument 'start' is -1; expected …"."""
    raise error(f"{op}: argument {argument!r} is {describe(value)}; expected {expected}")
