"""What is particular to the C++ kernels: instruction sets, rounding, threads and stores past the caches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kx_kernels as kx
from kx_kernels._core import native
from kx_kernels.testing.poison import same_bits

ROOT = Path(__file__).parent.parent
ISA = getattr(native.load(), "cpu_isa", None)

# The hash of what rope makes of every case of its spec, forward and backward, in every dtype.
FINGERPRINT = """
import hashlib, torch
from torch.utils._pytree import tree_leaves
from kx_kernels._core import native
from kx_kernels.ops.rope.spec import SPEC
from kx_kernels.testing.poison import bits
digest = hashlib.sha256()
for dtype in SPEC.dtypes:
    for case in SPEC.cases:
        for inverse in (False, True):
            call = SPEC.call(case, dtype) | {"inverse": inverse}
            for y in tree_leaves(SPEC.function(**call, backend="cpu")):
                digest.update(bits(y).numpy().tobytes())
print(native.load().cpu_isa, digest.hexdigest())
"""


def fingerprint(isa: str) -> list[str]:
    command = [sys.executable, "-c", FINGERPRINT]
    result = subprocess.run(command, env=os.environ | {"KX_CPU_ISA": isa}, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_avx2_gives_the_bits_of_avx512() -> None:
    if ISA not in ("avx512", "avx512_bf16"):
        pytest.skip(f"{ISA} is the widest here: there is no AVX-512 to compare AVX2 with")
    name, digest = fingerprint("avx512")
    assert name == "avx512"
    assert fingerprint("avx2") == ["avx2", digest]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_narrower_instruction_sets_meet_the_contract(isa: str) -> None:
    """Vectors are shorter, products of bfloat16 are in float32, and portable code rounds products before it adds them:
    held to the budget, not to bits.
    """
    isas = ("portable", "avx2", "avx512", "avx512_bf16")
    if ISA is None or isas.index(isa) >= isas.index(ISA):
        pytest.skip(f"{ISA} is what the contract runs on")
    which = "cpu-cpu and (within_budget or strides)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_contract.py", "-k", which]
    result = subprocess.run(command, env=os.environ | {"KX_CPU_ISA": isa}, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(ISA is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number(dtype: torch.dtype) -> None:
    """All 65536 bit patterns through widening, a rotation by zero or by a right angle, and rounding."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(1, 1024, 1, 64)
    for c, s in ((1.0, 0.0), (0.0, 1.0)):
        cos, sin = torch.full((1024, 32), c), torch.full((1024, 32), s)
        y = kx.rope(x, None, cos, sin, interleaved=False, backend="cpu")
        expected = kx.rope(x, None, cos, sin, interleaved=False, backend="reference")
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.skipif(ISA is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(dtype: torch.dtype) -> None:
    """x·cos with cos a table of many floats: every product rounds as torch rounds it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4096, 1, 64, generator=generator).to(dtype)
    cos = torch.randn(4096, 32, generator=generator) * torch.exp2(
        torch.randint(-30, 16, (4096, 32), generator=generator)
    )
    y = kx.rope(x, None, cos, torch.zeros_like(cos), interleaved=False, backend="cpu")
    expected = (x.float() * torch.cat((cos, cos), -1)[None, :, None]).to(dtype)
    assert torch.equal(y, expected)


@pytest.mark.skipif(ISA is None, reason="the extension is not built")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors(set_threads: Any, interleaved: bool, dtype: torch.dtype) -> None:
    """Stores that bypass the caches, on any number of threads, give the bits of small calls."""
    x = torch.randn(1, 4096, 12, 64).to(dtype)
    cos, sin = kx.rope_tables(4096, 64)
    parts = [
        kx.rope(x[:, t : t + 64], None, cos, sin, offset=t, interleaved=interleaved, backend="cpu")
        for t in range(0, 4096, 64)
    ]
    for threads in (1, 2, 3):
        set_threads(threads)
        assert same_bits(kx.rope(x, None, cos, sin, interleaved=interleaved, backend="cpu"), torch.cat(parts, 1))
