"""The machine code of every kernel for every architecture, with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kx_kernels._core import native
from kx_kernels._core.spec import all_specs
from kx_kernels.testing.codegen import ARCHITECTURES, MachineCode

pytest.importorskip("triton", reason="triton brings the compiler and the disassembler")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def machine_code() -> list[MachineCode]:
    """From a process of its own: Triton compiles nothing where its interpreter is on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kx_kernels.testing.codegen", "--json"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    for row in rows:  # JSON's keys are strings
        for key in ("loads", "stores"):
            row[key] = {int(width): count for width, count in row[key].items()}
    return [MachineCode(**row) for row in rows]


@pytest.mark.slow
def test_machine_code(machine_code: list[MachineCode]) -> None:
    """No spills, no more registers than promised, and 16-byte accesses in every variant that is made for them."""
    for spec in all_specs():
        for backend in ("triton", "cuda"):
            rows = [r for r in machine_code if (r.op, r.backend) == (spec.name, backend)]
            extension = native.load()
            if backend == "cuda" and not (extension and extension.has_cuda):
                continue
            assert {r.architecture for r in rows} == set(ARCHITECTURES)
            for row in rows:
                row.check(spec.max_registers)
                if backend == "triton":
                    row.check_wide()
                    assert set(row.stores) == {16}
            wide = [r for r in rows if r.stores.get(16)]
            assert len(wide) >= len(rows) // 3
            for row in wide:
                row.check_wide()


def test_checks_can_fail() -> None:
    good = MachineCode("rope", "cuda", "float32 4 1", "sm_80", 64, 0, 0, 0, {16: 8}, {16: 8}, 0)
    good.check(64)
    good.check_wide()
    for bad in (replace(good, stack=8), replace(good, local=1), replace(good, registers=65)):
        with pytest.raises(AssertionError, match=r"rope \(cuda float32 4 1, sm_80\)"):
            bad.check(64)
    for bad in (replace(good, loads={4: 32}), replace(good, stores={2: 9})):
        with pytest.raises(AssertionError, match="of 16 bytes"):
            bad.check_wide()
