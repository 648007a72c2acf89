"""The machine code of every kernel for every architecture, with no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kx_kernels._core import native
from kx_kernels._core.spec import KernelPromise, OpSpec, all_specs
from kx_kernels.testing import codegen
from kx_kernels.testing.codegen import ARCHITECTURES, MachineCode, from_json, promise_of

pytest.importorskip("triton", reason="triton brings the compiler and the disassembler")
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("codegen")  # one process compiles, once


@pytest.fixture(scope="module")
def of_triton(pytestconfig: pytest.Config) -> list[str]:
    """What Triton compiles for: minutes for each."""
    return list(ARCHITECTURES) if pytestconfig.getoption("thorough") else ["sm_90a"]


@pytest.fixture(scope="module")
def machine_code(of_triton: list[str]) -> list[MachineCode]:
    """From a process of its own: Triton compiles nothing where its interpreter is on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kx_kernels.testing.codegen", "--json", *of_triton]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return from_json(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "backend"),
    [
        pytest.param(spec, backend, id=f"{backend}-{spec.name}")
        for spec in all_specs()
        for backend in ("triton", "cuda")
        if backend in spec.backends
    ],
)
def test_machine_code(spec: OpSpec, backend: str, machine_code: list[MachineCode], of_triton: list[str]) -> None:
    """Every kernel on every architecture is what its operator promises, and every promise is about some kernel."""
    extension = native.load()
    if backend == "cuda" and not (extension and extension.has_cuda):
        pytest.skip("the extension was built without nvcc")
    rows = [row for row in machine_code if (row.op, row.backend) == (spec.name, backend)]
    assert {row.architecture for row in rows} == set(of_triton if backend == "triton" else ARCHITECTURES)
    for row in rows:
        row.check(promise_of(spec, row))
    used = [promise_of(spec, row) for row in rows]
    assert [promise for promise in spec.promises if promise.backend == backend and promise not in used] == []


GOOD = MachineCode("rope", "cuda", "rope_kernel float32 4 1", "sm_80", 128, 64, 0, 0, 0, {16: 8}, {16: 7, 4: 1}, 1, 2)
PROMISE = KernelPromise("cuda", "", 64, wide=0.9, tensor_core=True, async_copies=True, shared=32 << 10, blocks=4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 1}, "1 local accesses"),
        ({"registers": 65}, "65 registers; at most 64"),
        ({"loads": {4: 32}}, "20% of accesses move 16 bytes"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
        ({"async_copies": 0}, "no asynchronous copy"),
        ({"shared": 140 << 10}, "bytes of shared memory; a block has at most 166912"),
        ({"shared": 16 << 10}, "3 blocks per multiprocessor; at least 4"),
        ({"threads": 512}, "2 blocks per multiprocessor"),
    ],
)
def test_checks_can_fail(change: dict[str, Any], says: str) -> None:
    GOOD.check(PROMISE)
    with pytest.raises(AssertionError, match=rf"rope \(cuda rope_kernel float32 4 1, sm_80\): .*{re.escape(says)}"):
        replace(GOOD, **change).check(PROMISE)


def test_a_kernel_nobody_promised_anything_of_fails() -> None:
    spec = replace(all_specs()[0], promises=(replace(PROMISE, variant="bfloat16"),))
    with pytest.raises(AssertionError, match="promises nothing of its cuda kernel"):
        promise_of(spec, GOOD)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    # Of NVIDIA's occupancy calculator, for compute capability 8.0 and 9.0.
    [
        (128, 128, 32 << 10, (4, 4)),
        (128, 64, 48 << 10, (3, 4)),
        (256, 64, 98 << 10, (1, 2)),
        (256, 128, 99 << 10, (1, 2)),
        (384, 168, 200 << 10, (0, 1)),
        (256, 255, 0, (1, 1)),
    ],
)
def test_occupancy(threads: int, registers: int, shared: int, blocks: tuple[int, int]) -> None:
    code = replace(GOOD, threads=threads, registers=registers)
    for architecture, expected in zip(("sm_80", "sm_90a"), blocks, strict=True):
        assert replace(code, architecture=architecture).blocks(shared) == expected


@pytest.mark.slow
def test_unchanged_kernels_are_not_compiled_again(machine_code: list[MachineCode], of_triton: list[str]) -> None:
    """`machine_code` has filled the cache, so nothing is compiled here."""
    with mock.patch.object(codegen, "disassemble", side_effect=AssertionError("compiled")):
        for spec in all_specs():
            kept = [*codegen.triton_code(spec, of_triton), *codegen.cuda_code(spec)]
            assert kept == [row for row in machine_code if row.op == spec.name]
