"""What the Triton backends share: whether Triton can serve a device, and sizes of blocks. Imports no triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch


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


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which a launch goes to this device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
