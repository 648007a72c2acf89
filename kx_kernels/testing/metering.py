"""Counts what a Triton kernel really moves and multiplies, while it runs under Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass
class Meter:
    """Launches; bytes of global memory, of the elements that masks let through; floating-point operations of dots."""

    launches: int = 0
    loaded: int = 0
    stored: int = 0
    dot_flops: int = 0


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Within the block, counts the kernels that run under TRITON_INTERPRET=1."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    meter = Meter()

    def load(result: Any, pointers: Any, mask: Any, *_: Any) -> None:
        meter.loaded += int(np.count_nonzero(mask.data)) * result.data.itemsize

    def store(result: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> None:
        meter.stored += int(np.count_nonzero(mask.data)) * value.data.itemsize

    def dot(result: Any, a: Any, b: Any, *_: Any) -> None:
        meter.dot_flops += 2 * a.data.size * b.data.shape[-1]

    def launch(result: Any, *_: Any) -> None:
        meter.launches += 1

    def counted(method: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            count(result, *args)
            return result

        return call

    methods = [
        (GridExecutor, "__call__", launch),
        (InterpreterBuilder, "create_masked_load", load),
        (InterpreterBuilder, "create_masked_store", store),
        (InterpreterBuilder, "create_dot", dot),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, count in methods:
            stack.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name), count)))
        yield meter
