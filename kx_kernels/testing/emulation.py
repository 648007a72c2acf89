"""Runs the CUDA kernels on the CPU: the same source, compiled against csrc/emulation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .._core import native


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Within the block, `backend="cuda"` serves CPU tensors, thread by thread and slowly.

    Raises ModuleNotFoundError where the emulation was not built (KX_EMULATION=on).
    """
    before = native.emulating()
    native.emulate(True)
    try:
        yield
    finally:
        native.emulate(before)
