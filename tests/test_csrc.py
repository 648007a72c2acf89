"""The C++ tests: the emulation, and CUDA kernels on it under AddressSanitizer, UBSan and the race checker."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "ctest", "c++"))), reason="needs cmake, ninja and a C++ compiler"
)
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_ctest(preset: str) -> None:
    for command in (
        ["cmake", "--preset", preset],
        ["cmake", "--build", "--preset", preset],
        ["ctest", "--preset", preset],
    ):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
