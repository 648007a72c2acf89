"""What the compilers made of the kernels, read from the machine code: no GPU is needed.

`python -m kx_kernels.testing.codegen` prints it. Triton kernels are compiled for each architecture as a call would
compile them; CUDA kernels are read from the extension that calls run. What has been read is kept, by a hash of all that
it depends on, in $XDG_CACHE_HOME/kx_kernels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from .._core import native
from .._core.spec import KernelPromise, OpSpec, all_specs

# Opcodes.
TENSOR_CORE = ("HMMA", "IMMA", "DMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
ASYNC_COPIES = ("LDGSTS", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")  # cp.async and TMA
SPILLS = ("LDL", "STL")


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has. Source: CUDA C++ programming guide, technical specifications."""

    triton: int  # Triton's name of the target
    shared: int  # bytes
    shared_per_block: int
    warps: int = 64
    blocks: int = 32


ARCHITECTURES = {
    "sm_80": Architecture(80, 164 << 10, 163 << 10),
    "sm_90a": Architecture(90, 228 << 10, 227 << 10),
    "sm_100a": Architecture(100, 228 << 10, 227 << 10),
}


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture."""

    op: str
    backend: str  # "triton" or "cuda"
    variant: str  # the case it was compiled for and the kernel, or the kernel and its template arguments
    architecture: str
    threads: int  # per block, at most
    registers: int
    stack: int  # bytes per thread
    local: int  # instructions that access local memory: spills
    shared: int  # bytes per block that the kernel declares; a Triton kernel's are all of them
    loads: dict[int, int]  # bytes -> instructions that read global memory
    stores: dict[int, int]
    async_copies: int  # instructions that copy from global to shared memory, or back, while threads go on
    tensor_core: int  # instructions

    @property
    def wide(self) -> float:
        """Of the instructions that access global memory, the share that moves 16 bytes per thread, or a tile."""
        by_width = Counter(self.loads) + Counter(self.stores)
        by_width[16] += self.async_copies
        return by_width[16] / max(1, by_width.total())

    def blocks(self, dynamic_shared: int = 0) -> int:
        """Blocks that fit into one multiprocessor, with so many bytes of shared memory that a launch asks for."""
        machine = ARCHITECTURES[self.architecture]
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 4 * (16384 // per_warp) // warps  # a multiprocessor's four parts have 16384 each
        shared = -(-(self.shared + dynamic_shared) // 128) * 128 + 1024  # which the system keeps
        return min(machine.blocks, machine.warps // warps, by_registers, machine.shared // shared)

    def occupancy(self, dynamic_shared: int = 0) -> float:
        """The share of a multiprocessor's warps that these are."""
        return self.blocks(dynamic_shared) * -(-self.threads // 32) / ARCHITECTURES[self.architecture].warps

    def check(self, promise: KernelPromise) -> None:
        """Raises AssertionError where the kernel is not what its operator promises."""

        def expect(holds: bool, what: str) -> None:
            assert holds, f"{self.op} ({self.backend} {self.variant}, {self.architecture}): {what}"

        spilled = self.stack + self.local
        expect(
            spilled == 0 or promise.may_spill,
            f"{self.stack} bytes of stack, {self.local} local accesses; expected none",
        )
        most = promise.max_registers
        expect(self.registers <= most, f"{self.registers} registers; at most {most} expected")
        expect(self.wide >= promise.wide, f"{self.wide:.0%} of accesses move 16 bytes; {promise.wide:.0%} expected")
        expect(self.tensor_core > 0 or not promise.tensor_core, "no tensor-core instruction")
        expect(self.async_copies > 0 or not promise.async_copies, "no asynchronous copy")
        shared, limit = self.shared + promise.shared, ARCHITECTURES[self.architecture].shared_per_block
        expect(shared <= limit, f"{shared} bytes of shared memory; a block has at most {limit}")
        blocks = self.blocks(promise.shared)
        expect(blocks >= promise.blocks, f"{blocks} blocks per multiprocessor; at least {promise.blocks} expected")


def promise_of(spec: OpSpec, code: MachineCode) -> KernelPromise:
    """The promise that covers this kernel: the first that names its backend and matches its variant."""
    for promise in spec.promises:
        if promise.backend == code.backend and re.search(promise.variant, code.variant):
            return promise
    raise AssertionError(f"{spec.name} promises nothing of its {code.backend} kernel {code.variant!r}")


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


def _threads(elf: str) -> dict[str, int]:
    """Kernel -> threads per block, from the limits that its source names."""
    found = {}
    for name, body in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", elf, re.MULTILINE | re.DOTALL):
        limit = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\S+\s+Value:\s+(\S+) (\S+) (\S+)", body)
        if limit is not None:
            x, y, z = (int(n, 16) for n in limit.groups())
            found[name] = x * y * z
    return found


def disassemble(
    file: str, op: str, backend: str, variant: str, architecture: str, shared: int = 0
) -> list[MachineCode]:
    """The kernels of a cubin or of a shared object, for one architecture."""
    options = [] if file.endswith(".cubin") else ["-arch", architecture]
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", _read(file, *options, "-res-usage")))
    bodies = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", _read(file, *options, "-sass"), re.DOTALL)
    )
    threads = _threads(_read(file, *options, "-elf"))
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
        if kinds["BPT"] > 0 and not kinds["LDG"] + kinds["STG"]:
            continue  # it stops at once: made for another architecture
        found.append(
            MachineCode(
                op=op or _namespace(name),
                backend=backend,
                variant=variant or _kernel_name(name),
                architecture=architecture,
                threads=threads[name],
                registers=numbers["REG"],
                stack=numbers["STACK"],
                local=sum(kinds[kind] for kind in SPILLS),
                shared=max(shared, numbers["SHARED"]),
                loads=dict(sorted(widths["LDG"].items())),
                stores=dict(sorted(widths["STG"].items())),
                async_copies=sum(kinds[kind] for kind in ASYNC_COPIES),
                tensor_core=sum(kinds[kind] for kind in TENSOR_CORE),
            )
        )
    return found


def _namespace(mangled: str) -> str:
    """rope, for a kernel in kx::rope."""
    match = re.match(r"_ZN2kx(\d+)", mangled)
    return mangled[match.end() : match.end() + int(match.group(1))] if match else ""


def _kernel_name(mangled: str) -> str:
    """rope_kernel bfloat16 8 1, for a kernel template's mangled name."""
    types = {"d": "float64", "f": "float32"}
    names = re.match(r"_ZN2kx\d+[a-z_]+?(?=\d)(\d+)(\w+)", mangled)
    name = names.group(2)[: int(names.group(1))] if names else mangled
    match = re.search(r"kernelI(.*?)EEv", mangled)
    if match is None:
        return name
    words = re.findall(r"NS_\d+([a-z0-9]+?\d\d)E|L(?:[ijlb]|NS\w*?[a-z]E)(\d+)E|([df])", match.group(1) + "E")
    return " ".join([name, *(word or number or types[letter] for word, number, letter in words)])


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


def _kept(sources: Iterable[Path | str], read: Callable[[], list[MachineCode]]) -> list[MachineCode]:
    """What `read` returned when all these files and words were the same."""
    key = hashlib.sha256(Path(__file__).read_bytes())
    for source in sources:
        key.update(source.read_bytes() if isinstance(source, Path) else source.encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = home / "kx_kernels" / f"machine-code-{key.hexdigest()}.json"
    if file.exists():
        return from_json(file.read_text())
    rows = read()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
        part.write(json.dumps([asdict(row) for row in rows]))
    os.replace(part.name, file)  # readers see all of it or nothing
    return rows


def from_json(text: str) -> list[MachineCode]:
    rows = json.loads(text)
    for row in rows:  # JSON's keys are strings
        for key in ("loads", "stores"):
            row[key] = {int(width): count for width, count in row[key].items()}
    return [MachineCode(**row) for row in rows]


def triton_code(spec: OpSpec, architectures: Sequence[str] = tuple(ARCHITECTURES)) -> list[MachineCode]:
    """Its Triton kernels, compiled for the calls that `spec.codegen` names and for these architectures."""
    import triton

    if "triton" not in spec.backends:
        return []
    api = importlib.import_module(spec.function.__module__)
    backend = next(b for b in api.backends() if b.name == "triton")

    def read() -> list[MachineCode]:
        rows = []
        for architecture in architectures:
            for variant, call in spec.codegen().items():
                with _compiling_for(ARCHITECTURES[architecture].triton) as compiled:
                    list(spec.passes(backend, api.problem(**call)))
                for kernel in compiled:
                    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                        file.write(kernel.asm["cubin"])
                        file.flush()
                        shared, name = kernel.metadata.shared, f"{variant} {kernel.metadata.name}"
                        rows += disassemble(file.name, spec.name, "triton", name, architecture, shared)
        return rows

    own = Path(api.__file__ or "").parent
    shared = own.parent.parent / "_core"
    words = [triton.__version__, *architectures]
    return _kept([*words, *sorted(own.rglob("*.py")), *sorted(shared.glob("triton*.py"))], read)


def cuda_code(spec: OpSpec) -> list[MachineCode]:
    """Its CUDA kernels in the extension; none where that was built without nvcc."""
    extension = native.load()
    if extension is None or not extension.has_cuda or extension.__file__ is None:
        return []
    file = extension.__file__
    rows = _kept(
        [Path(file)],
        lambda: [kernel for name in ARCHITECTURES for kernel in disassemble(file, "", "cuda", "", name)],
    )
    return [row for row in rows if row.op == spec.name]


@functools.cache
def available() -> str | None:
    """Why machine code cannot be read here, or None."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set"
    return None if _tool() else "triton, which brings the disassembler, is not installed"


def machine_code(architectures: Sequence[str] = tuple(ARCHITECTURES)) -> list[MachineCode]:
    """Every kernel of every operator: CUDA's for every architecture, Triton's for these."""
    return [row for spec in all_specs() for row in (*triton_code(spec, architectures), *cuda_code(spec))]


def table(ops: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The machine code of these operators, or of all, as rows for people."""
    rows = []
    for spec in (spec for spec in all_specs() if not ops or spec.name in ops):
        for code in (*triton_code(spec), *cuda_code(spec)):
            dynamic = promise_of(spec, code).shared
            rows.append(
                asdict(code)
                | {
                    "shared": code.shared + dynamic,
                    "occupancy": f"{code.blocks(dynamic)} × {code.threads} ({code.occupancy(dynamic):.0%})",
                    "wide": f"{code.wide:.0%}",
                }
            )
    return rows


def main() -> None:
    from tabulate import tabulate

    reason = available()
    if reason is not None:
        raise SystemExit(f"the machine code cannot be read: {reason}")
    if "--json" in sys.argv[1:]:
        architectures = [word for word in sys.argv[1:] if word != "--json"] or tuple(ARCHITECTURES)
        print(json.dumps([asdict(row) for row in machine_code(architectures)]))
    else:
        print(tabulate(table(), headers="keys", tablefmt="plain"))


if __name__ == "__main__":
    main()
