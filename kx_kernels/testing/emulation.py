"""Runs the CUDA kernels on the CPU: the same source, compiled against csrc/emulation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .._core import native


@contextlib.contextmanager
def emulated_cuda(seed: int = 0, wgmma: bool = True, clusters: bool | None = None) -> Iterator[None]:
    """Within the block, `backend="cuda"` serves CPU tensors, thread by thread and slowly.

    `seed` chooses the order in which threads run, and when asynchronous copies take place; 0: by index, at once.
    `wgmma`: launches find the tensor-core instructions of sm_90a, or choose what they would without; `clusters`: they
    find those of sm_90 and later, by default where they find `wgmma`.
    Raises ModuleNotFoundError where the emulation was not built (KX_EMULATION=on), and RuntimeError where a kernel does
    what a GPU does not allow (docs/emulation.md).
    """
    before = native.emulating()
    native.emulate(True)
    emulation = native.load("_emulation")
    assert emulation is not None
    emulation.set_seed(seed)
    emulation.set_wgmma(wgmma)
    emulation.set_clusters(wgmma if clusters is None else clusters)
    try:
        yield
    finally:
        emulation.set_seed(0)
        emulation.set_wgmma(True)
        emulation.set_clusters(True)
        native.emulate(before)
