"""Do strided tensors share elements? Asked before anything is written in place."""

from __future__ import annotations

import torch


def _reachable(target: int, steps: list[tuple[int, int, int]]) -> bool:
    """Is there an integer n_i in [low_i, high_i] per (stride_i, low_i, high_i) with sum n_i * stride_i == target?"""
    if not steps:
        return target == 0
    (stride, low, high), rest = steps[0], steps[1:]
    rest_low = sum(s * lo for s, lo, _ in rest)
    rest_high = sum(s * hi for s, _, hi in rest)
    first = max(low, -((rest_high - target) // stride))  # ceil((target - rest_high) / stride)
    last = min(high, (target - rest_low) // stride)
    return any(_reachable(target - n * stride, rest) for n in range(first, last + 1))


def overlaps_itself(x: torch.Tensor) -> bool:
    """True if two indices of x may address the same element (an expanded tensor, say)."""
    extent = 1  # elements spanned by the dimensions so far
    for stride, size in sorted((st, sz) for st, sz in zip(x.stride(), x.shape, strict=True) if sz > 1):
        if stride < extent:
            return x.numel() > 0
        extent = stride * (size - 1) + extent
    return False


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if a and b share an element: exact for equal strides (slices of a packed tensor), else by address range."""
    if a.numel() == 0 or b.numel() == 0 or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    offset = int(b.storage_offset() - a.storage_offset())
    span_a, span_b = (sum(int(st * (sz - 1)) for st, sz in zip(x.stride(), x.shape, strict=True)) for x in (a, b))
    if offset > span_a or -offset > span_b:
        return False
    if a.stride() != b.stride() or a.dtype != b.dtype:
        return True
    steps = [(st, 1 - nb, na - 1) for st, na, nb in zip(a.stride(), a.shape, b.shape, strict=True) if st > 0]
    return _reachable(offset, sorted(steps, reverse=True))
