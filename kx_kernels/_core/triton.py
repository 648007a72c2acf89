"""What the Triton backends share: whether Triton can serve a device, and sizes of blocks. Imports no triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor


def interpreted() -> bool:
    """True where kernels run in Python, on CPU tensors: as triton was told when it was first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None
        return False


def unsupported(device: torch.device, dtype: torch.dtype, programs: int) -> str | None:
    """Why Triton cannot launch so many programs on tensors of this dtype there."""
    if not _installed():
        return "triton is not installed"
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"the tensors are on {device}, which Triton has no kernels for"
    if interpreted():
        if dtype == torch.bfloat16:
            return "Triton's interpreter truncates to bfloat16 where it should round"
    elif device.type == "cpu":
        return "the tensors are on cpu, which it serves under TRITON_INTERPRET=1 only"
    if programs >= 2**31:
        return f"it would take {programs} programs; a launch holds at most {2**31 - 1}"
    return None


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def block(dim: int, most: int) -> int:
    """The width of a tile that has all of these columns, or `most` of them."""
    return min(max(16, power_of_two(dim)), most)


def with_strides(x: Tensor | None, rank: int) -> tuple:
    """A tensor as kernels take it: its pointer, then its strides."""
    return (x, *(x.stride() if x is not None else (0,) * rank))


def distances(bias: Tensor | None) -> tuple:
    """A bias [1 or H, distances]: its pointer, its strides, 0 for heads that share it, and how many distances."""
    if bias is None:
        return (None, 0, 0, 0)
    return bias, bias.stride(0) if bias.shape[0] > 1 else 0, bias.stride(1), bias.shape[1]


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """What sums are in, and what products take, of tensors of this dtype.

    Products of float16 numbers are taken in TF32, which has their precision and float32's range.
    """
    import triton.language as tl

    half, bf16, double = (dtype == x for x in (torch.float16, torch.bfloat16, torch.float64))
    return {
        "ACC": tl.float64 if double else tl.float32,
        "DOT": tl.bfloat16 if bf16 else tl.float64 if double else tl.float32,
        "PRECISION": "tf32" if half else "tf32x3" if dtype == torch.float32 else "ieee",
    }


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Of none, nothing."""
    if programs > 0:
        kernel[(programs,)](**arguments)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, among which programs are shared out."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which a launch goes to this device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
