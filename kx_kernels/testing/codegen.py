"""What the compilers made of the kernels, read from the machine code: no GPU is needed.

`python -m kx_kernels.testing.codegen` prints it. Triton kernels are compiled for each architecture as a call would
compile them; CUDA kernels are read from the extension that calls run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from .._core import native
from .._core.spec import OpSpec, all_specs

TENSOR_CORE = ("HMMA", "IMMA", "DMMA", "HGMMA", "UTCHMMA", "UTCQMMA")  # opcodes
ARCHITECTURES = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}  # -> Triton's name of the target


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture."""

    op: str
    backend: str  # "triton" or "cuda"
    variant: str  # the case it was compiled for, or the template arguments
    architecture: str
    registers: int
    stack: int  # bytes per thread
    local: int  # instructions that access local memory: spills
    shared: int  # bytes per block
    loads: dict[int, int]  # bytes -> instructions that read global memory
    stores: dict[int, int]
    tensor_core: int  # instructions

    def check(self, max_registers: int = 255) -> None:
        """Raises AssertionError if registers are spilled, or more than `max_registers` used."""
        name = f"{self.op} ({self.backend} {self.variant}, {self.architecture})"
        spills = self.stack + self.local
        assert spills == 0, f"{name}: {self.stack} bytes of stack, {self.local} local accesses; expected none"
        assert self.registers <= max_registers, f"{name}: {self.registers} registers; at most {max_registers} expected"

    def check_wide(self) -> None:
        """Raises AssertionError unless global memory is read and written 16 bytes at a time."""
        name = f"{self.op} ({self.backend} {self.variant}, {self.architecture})"
        for what, widths in (("loads", self.loads), ("stores", self.stores)):
            assert widths.get(16, 0) > 0, f"{name}: no {what} of 16 bytes; by bytes they are {widths}"


def _tool() -> str | None:
    """cuobjdump, which triton brings along."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def _read(file: str, *options: str) -> str:
    tool = _tool()
    assert tool is not None
    return subprocess.run([tool, *options, file], check=True, capture_output=True, text=True).stdout


def _width(opcode: str) -> int:
    for suffix, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in opcode.split("."):
            return width
    return 4


def disassemble(file: str, op: str, backend: str, variant: str, architecture: str) -> list[MachineCode]:
    """The kernels of a cubin or of a shared object, for one architecture."""
    options = [] if file.endswith(".cubin") else ["-arch", architecture]
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", _read(file, *options, "-res-usage")))
    bodies = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", _read(file, *options, "-sass"), re.DOTALL)
    )
    found = []
    for name, body in bodies.items():
        numbers = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", usage[name])}
        opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE))
        widths = {"LDG": Counter[int](), "STG": Counter[int]()}
        kinds = Counter[str]()
        for opcode, count in opcodes.items():
            kind = opcode.split(".")[0]
            kinds[kind] += count
            if kind in widths:
                widths[kind][_width(opcode)] += count
        found.append(
            MachineCode(
                op=op or _namespace(name),
                backend=backend,
                variant=variant or _template_arguments(name),
                architecture=architecture,
                registers=numbers["REG"],
                stack=numbers["STACK"],
                local=kinds["LDL"] + kinds["STL"],
                shared=numbers["SHARED"],
                loads=dict(sorted(widths["LDG"].items())),
                stores=dict(sorted(widths["STG"].items())),
                tensor_core=sum(kinds[kind] for kind in TENSOR_CORE),
            )
        )
    return found


def _namespace(mangled: str) -> str:
    """rope, for a kernel in kx::rope."""
    match = re.match(r"_ZN2kx(\d+)", mangled)
    return mangled[match.end() : match.end() + int(match.group(1))] if match else ""


def _template_arguments(mangled: str) -> str:
    """bfloat16 8 true, for a kernel template's mangled name."""
    types = {"d": "float64", "f": "float32"}
    match = re.search(r"kernelI(.*?)EEv", mangled)
    if match is None:
        return mangled
    words = re.findall(r"NS_\d+([a-z0-9]+?\d\d)E|L[ijlb](\d+)E|([df])", match.group(1) + "E")
    return " ".join(name or number or types[letter] for name, number, letter in words)


@contextlib.contextmanager
def _compiling_for(target: int) -> Iterator[list[Any]]:
    """Within the block, Triton launches compile for `target` and are collected, and nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", target, 32)

        def get_current_device(self) -> int:
            return target  # kernels are cached by device

        def get_current_stream(self, device: int) -> int:
            return 0

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    with mock.patch.object(driver, "_active", Driver()), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def triton_code(spec: OpSpec) -> list[MachineCode]:
    """Its Triton kernels, compiled for the calls that `spec.codegen` names."""
    api = importlib.import_module(spec.function.__module__)
    triton = next(b for b in api.backends() if b.name == "triton")
    rows = []
    for architecture, target in ARCHITECTURES.items():
        for variant, call in spec.codegen().items():
            with _compiling_for(target) as compiled:
                triton.run(api.problem(**call), False)
            for kernel in compiled:
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(kernel.asm["cubin"])
                    file.flush()
                    rows += disassemble(file.name, spec.name, "triton", variant, architecture)
    return rows


def cuda_code(spec: OpSpec) -> list[MachineCode]:
    """Its CUDA kernels in the extension; none where that was built without nvcc."""
    extension = native.load()
    if extension is None or not extension.has_cuda or extension.__file__ is None:
        return []
    rows = []
    for architecture in ARCHITECTURES:
        kernels = disassemble(extension.__file__, "", "cuda", "", architecture)
        rows += [kernel for kernel in kernels if kernel.op == spec.name]
    return rows


@functools.cache
def available() -> str | None:
    """Why machine code cannot be read here, or None."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set"
    return None if _tool() else "triton, which brings the disassembler, is not installed"


def machine_code() -> list[MachineCode]:
    """Every kernel of every operator for every architecture."""
    return [row for spec in all_specs() for row in (*triton_code(spec), *cuda_code(spec))]


def main() -> None:
    import json

    from tabulate import tabulate

    reason = available()
    if reason is not None:
        raise SystemExit(f"the machine code cannot be read: {reason}")
    rows = [asdict(row) for row in machine_code()]
    print(json.dumps(rows) if "--json" in sys.argv[1:] else tabulate(rows, headers="keys", tablefmt="plain"))


if __name__ == "__main__":
    main()
