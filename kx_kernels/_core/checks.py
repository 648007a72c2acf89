"""Errors that name the argument, what it is and what it should be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

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


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)


def check_tensor(
    op: str, argument: str, x: object, dtypes: tuple[torch.dtype, ...], like: torch.Tensor | None = None
) -> None:
    """Rejects what is no tensor, has none of `dtypes`, or is on another device than `like`, the argument q."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    wanted = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    if not isinstance(x, torch.Tensor) or x.dtype not in dtypes:
        reject(op, argument, x, f"a tensor of dtype {wanted}", TypeError)
    if like is not None and x.device != like.device:
        reject(op, argument, x, f"the device of q, {like.device}")


def check_lengths(op: str, lengths: object, like: torch.Tensor, *others: object) -> None:
    """Rejects what is not tokens of each of the sequences of `like`, or is given beside cu_seqlens or a mask."""
    check_tensor(op, "lengths", lengths, INDICES)
    assert isinstance(lengths, torch.Tensor)
    if lengths.device != like.device:
        reject(op, "lengths", lengths, f"the device of the other tensors, {like.device}")
    if any(x is not None for x in others):
        reject(op, "lengths", lengths, "None, as cu_seqlens or key_padding_mask is given")
    if lengths.shape != like.shape[:1]:
        reject(op, "lengths", lengths, f"shape [{like.shape[0]}]")


def check_ends(op: str, argument: str, ends: torch.Tensor, rows: int) -> None:
    """Rejects ends of packed sequences that do not ascend or leave the rows: reads data, so only for the CPU."""
    if int(ends[0]) < 0 or int(ends[-1]) > rows or bool((ends.diff() < 0).any()):
        reject(op, argument, ends.tolist(), f"ascending places between 0 and the number of rows, {rows}")


def check_int(op: str, argument: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        reject(op, argument, x, "an int", TypeError)


def bound(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], without: tuple[str, ...]
) -> dict[str, Any]:
    """Every argument of function(*args, **kwargs) by name, defaults included, but for those of `without`."""
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return {name: value for name, value in call.arguments.items() if name not in without}
