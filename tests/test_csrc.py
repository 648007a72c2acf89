"""The C++ tests: the emulation, and CUDA kernels on it under AddressSanitizer, UBSan and the race checker."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kx_kernels._core import native

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "ctest", "c++"))), reason="needs cmake, ninja and a C++ compiler"
)
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_ctest(preset: str) -> None:
    isa = getattr(native.load(), "cpu_isa", "portable")  # the one that this machine runs
    isas = [f"-DKX_CPU_ISAS={'' if isa == 'portable' else isa}"] if preset == "asan" else []
    for command in (
        ["cmake", "--preset", preset, *isas],
        ["cmake", "--build", "--preset", preset],
        ["ctest", "--preset", preset],
    ):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
