"""What an operator promises, as data: tests, code-generation checks, benchmarks and documents iterate over it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Call = dict[str, Any]  # the keyword arguments of one call of the public function


@dataclass(frozen=True)
class BadCall:
    """A call that has to be refused: `change` spoils a good one; the error names `argument` and says `expected`."""

    name: str
    change: Callable[[Call], Call]
    error: type[Exception]
    argument: str
    expected: str  # a regular expression


@dataclass(frozen=True)
class KernelPromise:
    """What the machine code of some kernels has to show on every architecture."""

    backend: str
    variant: str = ""  # a regular expression that its name or case matches
    max_registers: int = 255  # per thread
    wide: float = 0.0  # least share of global accesses that move 16 bytes, or tiles
    tensor_core: bool = False  # it has tensor-core instructions
    async_copies: bool = False  # and copies that go on while threads go on
    shared: int = 0  # bytes of shared memory that its launches ask for, at most
    blocks: int = 1  # that fit into a multiprocessor
    may_spill: bool = False  # registers to memory


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one pass.

    flops(call): of the least work that computes it.
    beside_torch(call), beside_triton(call, problem): beyond `flops`, by why there are more or fewer of them: of those
        that torch's counter sees of the reference, and of those that the dots of Triton's kernels do, without masks and
        packed sequences.
    """

    flops: Callable[[Call], int]
    beside_torch: Callable[[Call], Mapping[str, int]]
    beside_triton: Callable[[Call, Any], Mapping[str, int]]


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    eager: for a backend whose errors are not held against those of the reference in the same dtype, what they are held
        against: the reference with more of its steps in that dtype, as eager torch has them.
    make(case, dtype, device, seed): the arguments of a call, as keywords of `function` and of `reference`.
    passes(backend, problem): runs one pass after the other, and names each when it is done.
    bytes(call): of a forward pass, counting each input and output once.
    work: of each pass that has matrix products, and of the forward pass in any case, by the name that `passes` has.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    cannot: Mapping[tuple[str, str, torch.dtype], str]  # (backend, device, dtype) -> regular expression of its reason
    eager: Mapping[str, Callable[..., Any]]
    differentiable: tuple[str, ...]  # arguments that gradients reach
    cases: Mapping[str, Any]
    make: Callable[[Any, torch.dtype, torch.device, int], Call]
    example: str  # the case that documents and `python -m kx_kernels` show
    differentiated: str  # the case whose first and second derivatives are compared with finite differences
    compiled: tuple[str, ...]  # cases that are compared under torch.compile
    bad_calls: Sequence[BadCall]
    bytes: Callable[[Call], int]
    work: Mapping[str, Work]  # see above
    codegen: Callable[[], Mapping[str, Call]]  # calls, on the meta device, whose machine code is checked
    metered: Callable[[], Mapping[str, Call]]  # small calls whose launches and bytes are counted
    passes: Callable[[Any, Any], Iterator[str]]  # see above
    promises: Sequence[KernelPromise]  # of their machine code; the first that matches a kernel counts
    growth: Mapping[str, Mapping[str, float]]  # quantity -> dimension -> exponent that the counts have to show

    def flops(self, call: Call) -> int:
        """Of a forward pass."""
        return self.work["forward"].flops(call)

    def call(self, case: str, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Call:
        return self.make(self.cases[case], dtype, torch.device(device), seed)

    def cast(self, call: Call, dtype: torch.dtype) -> Call:
        """The same call with its differentiable arguments in another dtype.

        Those that are not of the dtype of the first of them, as wide states of narrow tensors are not, take the dtype
        that arithmetic is done in.
        """
        given, wide = call[self.differentiable[0]].dtype, torch.promote_types(dtype, torch.float32)
        change = {n: call[n] for n in self.differentiable if n in call}
        return call | pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype if x.dtype == given else wide), change)


def no_products(flops: Callable[[Call], int]) -> dict[str, Work]:
    """The work of an operator without matrix products."""

    def beside(call: Call, problem: Any = None) -> dict[str, int]:
        return {"no matrix products, which alone are counted": -flops(call)}

    return {"forward": Work(flops, beside, beside)}


def tiled(count: int, tile: int) -> int:
    """How many there are in whole tiles."""
    return -(-count // tile) * tile


def whole_tiles(causal: bool) -> str:
    """Why tiles multiply more than they are asked for."""
    return "tiles are whole, on the diagonal and at the ends" if causal else "tiles are whole at the ends"


def all_specs() -> list[OpSpec]:
    """The spec of every operator: each folder of kx_kernels/ops has one."""
    from .. import ops

    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)
    return [importlib.import_module(f"{ops.__name__}.{name}.spec").SPEC for name in names]
