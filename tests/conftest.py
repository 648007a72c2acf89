"""Which backends are tested on which device, and how.

Without a GPU every kernel runs on the CPU: Triton's under its interpreter, CUDA's under the emulation. With one, the
real kernels run on it, and the emulation still runs on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own, which slow the interpreter's small products down
# References are the same on every machine. (For AVX2, MKL sums long products in float64 less exactly than in float32.)
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
# Threads that wait leave their core to the tests of the other worker; spinning, they took three quarters of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if TYPE_CHECKING:
    from kx_kernels._core.spec import OpSpec

# What an earlier version of an operator was compiled to must not be met again; read when inductor is imported.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported


class Lane(NamedTuple):
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    @property
    def slow(self) -> bool:
        """A kernel for a GPU on a CPU."""
        return self.device == "cpu" and self.backend in ("triton", "cuda")

    def dtypes(self, spec: OpSpec) -> list[torch.dtype]:
        """Those that it serves."""
        return [dtype for dtype in spec.dtypes if (self.backend, self.device, dtype) not in spec.cannot]

    @contextlib.contextmanager
    def ready(self, seed: int = 0) -> Iterator[None]:
        """Within the block, calls with `backend=self.backend` on self.device are served by this lane.

        `seed` chooses a schedule of threads, where that can be chosen.
        """
        if self == Lane("cuda", "cpu"):
            from kx_kernels.testing.emulation import emulated_cuda

            with emulated_cuda(seed):
                yield
        else:
            yield


def lanes() -> list[Lane]:
    if torch.cuda.is_available():
        on_gpu = [Lane("reference", "cuda"), Lane("triton", "cuda"), Lane("cuda", "cuda")]
        return [*on_gpu, Lane("cpu", "cpu"), Lane("cuda", "cpu")]
    return [Lane(backend, "cpu") for backend in ("reference", "cpu", "triton", "cuda")]


ONE_IN = 7  # no multiple of the number of dtypes, layouts or anything else that tests go through


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="every case of references, interpreted and emulated kernels, and machine code for every architecture",
    )


def _dealt_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of references, interpreted and emulated kernels one item in ONE_IN of each test and operator, its first too."""
    seen: dict[tuple[str, ...], int] = {}
    kept = []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        lane, spec = parameters.get("lane"), parameters.get("spec")
        slow = lane.slow or lane.backend == "reference" if isinstance(lane, Lane) else "wgmma" in item.name
        key = (item.nodeid.partition("[")[0], str(lane), getattr(spec, "name", ""))
        seen[key] = seen.get(key, -1) + 1
        if not slow or seen[key] % ONE_IN == 0:
            kept.append(item)
    return kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no core is idle at the end."""
    if not config.getoption("thorough"):
        kept = _dealt_out(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    longest = ("test_csrc", "test_codegen")
    items.sort(key=lambda item: next((n for n, name in enumerate(longest) if name in item.nodeid), len(longest)))


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=lanes(), ids=str)
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    with request.param.ready():
        yield request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Changes torch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_once() -> Iterator[None]:
    """Triton's interpreter exchanges the functions of triton.language at a launch, and again wherever a kernel calls a
    function: two fifths of its time. Here the latter is left out where nothing is left to exchange."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: list[Any] = []

    def patch_once(function: Any) -> Any:
        seen = [x for x in (tl, tl.core) if any(x is y for y in function.__globals__.values())]
        if all(x in patched for x in seen):
            return None
        patched.extend(seen)
        return patch(function)

    def launch_and_forget(*args: Any, **kwargs: Any) -> None:
        try:
            launch(*args, **kwargs)
        finally:
            patched.clear()

    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", patch_once)
        change.setattr(interpreter.GridExecutor, "__call__", launch_and_forget)
        yield
