"""Memory that shows what a kernel forgot to write, and layouts that show what it forgot to ask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned_allocation() -> Iterator[None]:
    """Within the block, torch.empty, empty_like and new_empty give memory full of NaN.

    Integers are the least there is, truth values True.
    """

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
            x = allocate(*args, **kwargs)
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return allocate_and_fill

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


def _holes(x: Tensor, shape: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
    """x within a larger tensor of NaN."""
    host = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    host[index] = x
    return host[index]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    # each dimension cut out of a larger one, starting at an odd element
    "sliced": lambda x: _holes(x, tuple(n + 3 for n in x.shape), tuple(slice(1, n + 1) for n in x.shape)),
    # memory in the opposite order of dimensions: the last is the slowest
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    # every other element of the last dimension
    "stepped": lambda x: _holes(x, (*x.shape[:-1], 2 * x.shape[-1]), (..., slice(None, None, 2))),  # type: ignore[arg-type]
}
"""Ways to lay a tensor out: each gives the same values under other strides, with NaN in whatever lies between."""


def bits(x: Tensor) -> Tensor:
    """The elements as integers, so that NaN equals itself and −0 differs from 0."""
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
