"""Loads the compiled extension and turns torch tensors into the raw pointers it takes."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TypeAlias

import torch

# The order of csrc/common/dtype.h.
DTYPE_CODES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.bool: 6,
}

RawTensor: TypeAlias = "tuple[int, int, torch.Size, tuple[int, ...]]"


@functools.cache
def load(name: str = "_C") -> ModuleType | None:
    """The extension module, or None where it was not built."""
    try:
        return importlib.import_module(f"kx_kernels.{name}")
    except ModuleNotFoundError:
        return None


def raw(x: torch.Tensor) -> RawTensor:
    """(address, dtype code, sizes, strides): what csrc/common/tensor.h reads. Strides count elements."""
    return x.data_ptr(), DTYPE_CODES[x.dtype], x.shape, x.stride()


def raw_or_none(x: torch.Tensor | None) -> RawTensor | None:
    return None if x is None else raw(x)


_emulated = False


def emulate(enabled: bool) -> None:
    """Lets the cuda backends serve CPU tensors, through the emulated build of the same kernels (testing.emulation)."""
    global _emulated
    if enabled and load("_emulation") is None:
        raise ModuleNotFoundError("the emulation of the CUDA kernels is not built; configure with -DKX_EMULATION=ON")
    _emulated = enabled


def emulating() -> bool:
    return _emulated


def cpu_unsupported(device: torch.device) -> str | None:
    """Why no CPU kernel can serve this device."""
    if device.type != "cpu":
        return f"the tensors are on {device}, not on the CPU"
    if load() is None:
        return "the C++ extension is not built (no compiler was found at installation)"
    return None


def cuda_unsupported(device: torch.device) -> str | None:
    """Why no CUDA kernel can serve this device."""
    if device.type == "cpu" and _emulated:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a CUDA device"
    if torch.version.hip is not None:
        return "the CUDA kernels are not built for ROCm; the Triton kernels serve it"
    extension = load()
    if extension is None:
        return "the C++ extension is not built (no compiler was found at installation)"
    if not extension.has_cuda:
        return "the extension was built without nvcc"
    return _capability_unsupported(device.index)


@functools.cache
def _capability_unsupported(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def cuda(device: torch.device) -> ModuleType:
    """The extension whose CUDA kernels serve tensors of `device`."""
    extension = load("_emulation" if device.type == "cpu" else "_C")
    assert extension is not None
    return extension


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, or as many as its emulation has (csrc/emulation/launch.h)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def launch(name: str, device: torch.device, *arguments: object) -> None:
    """Calls a CUDA entry point on the current stream of `device` (or its emulation, for tensors on the CPU)."""
    stream = 0 if device.type == "cpu" else torch._C._cuda_getCurrentRawStream(device.index)
    getattr(cuda(device), name)(*arguments, device.index or 0, stream)
