"""What every operator promises on every backend, written once over the specs."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kx_kernels as kx
from kx_kernels._core.spec import Call, OpSpec, all_specs
from kx_kernels.testing.budget import assert_within_budget
from kx_kernels.testing.comparison import exact_and_eager, neighbours
from kx_kernels.testing.emulation import emulated_cuda
from kx_kernels.testing.poison import LAYOUTS, poisoned_allocation, same_bits

SPECS = {spec.name: spec for spec in all_specs()}
EXECUTION = {"backend", "inplace", "workspace"}  # arguments that say how to compute, not what


def specs() -> list[Any]:
    return [pytest.param(spec, id=name) for name, spec in SPECS.items()]


def cases() -> list[Any]:
    return [pytest.param(spec, case, id=f"{name}-{case}") for name, spec in SPECS.items() for case in spec.cases]


def multiplies_in_cuda(spec: OpSpec) -> bool:
    """Whether its CUDA kernels use tensor cores."""
    return any(promise.tensor_core for promise in spec.promises if promise.backend == "cuda")


def bad_calls() -> list[Any]:
    return [pytest.param(spec, bad, id=f"{name}-{bad.name}") for name, spec in SPECS.items() for bad in spec.bad_calls]


def flat(result: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def tensors(call: Call) -> dict[str, Tensor]:
    leaves = pytree.tree_leaves_with_path(call)
    return {pytree.keystr(path): x for path, x in leaves if isinstance(x, Tensor)}


def on_meta(call: Call) -> Call:
    return pytree.tree_map_only(Tensor, lambda x: x.to("meta"), call)


def serves(lane: Any, spec: OpSpec) -> None:
    """Skips what the operator has no kernel for."""
    if lane.backend not in spec.backends:
        pytest.skip(f"{spec.name} has no {lane.backend} kernel")


def with_grad(spec: OpSpec, call: Call) -> tuple[Call, list[Tensor]]:
    """The call with leaves of its own for every differentiable argument."""
    change = {n: call[n] for n in spec.differentiable if n in call}
    change = pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), change)
    return call | change, flat(change)


def gradients(spec: OpSpec, function: Any, call: Call, weights: list[Tensor], **how: Any) -> list[Tensor]:
    call, leaves = with_grad(spec, call)
    outs = flat(function(**call, **how))
    return list(torch.autograd.grad(outs, leaves, [w.to(o.dtype) for w, o in zip(weights, outs, strict=True)]))


@pytest.mark.parametrize("spec", specs())
def test_reference_has_the_public_signature(spec: OpSpec) -> None:
    def arguments(function: Any) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name not in EXECUTION]

    assert arguments(spec.function) == arguments(spec.reference)


def assert_case_within_budget(spec: OpSpec, case: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Values and gradients against float64, with every output written and every input left as it was."""
    call = spec.call(case, dtype, device)
    before = {name: x.clone() for name, x in tensors(call).items()}
    with poisoned_allocation():
        outs = flat(spec.function(**call, backend=backend))
        weights = [torch.randn_like(o) for o in outs]
        grads = gradients(spec, spec.function, call, weights, backend=backend)
    names = [f"output {i}" for i in range(len(outs))]
    names += [f"gradient of {n}" for n in tensors({n: call[n] for n in spec.differentiable if n in call})]

    def compute(function: Any, c: Call) -> list[Tensor]:
        return flat(function(**c)) + gradients(spec, function, c, weights)

    pairs = exact_and_eager(spec, call, dtype, backend, compute)
    for i, (name, actual, (exact, eager)) in enumerate(zip(names, outs + grads, pairs, strict=True)):
        near = functools.partial(neighbours, spec, call, dtype, backend, compute, i)
        assert_within_budget(actual, exact, eager, name, near)
    for name, x in tensors(call).items():
        assert same_bits(x, before[name]), f"{name} was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("spec", "case"), cases())
def test_forward_and_backward_within_budget(lane, spec: OpSpec, case: str, dtype: torch.dtype) -> None:
    """What a backend cannot do it refuses by name, with its reason."""
    serves(lane, spec)
    refusal = spec.cannot.get((lane.backend, lane.device, dtype))
    if refusal:
        with pytest.raises(kx.UnsupportedError, match=f"{lane.backend}: .*{refusal}"):
            spec.function(**spec.call(case, dtype, lane.device), backend=lane.backend)
        return
    assert_case_within_budget(spec, case, dtype, lane.backend, lane.device)


@pytest.mark.parametrize(("spec", "case"), [case for case in cases() if multiplies_in_cuda(case.values[0])])
def test_machines_without_wgmma(spec: OpSpec, case: str) -> None:
    """What CUDA kernels do where the tensor cores have mma.sync alone; the emulation has both."""
    with emulated_cuda(wgmma=False):
        assert_case_within_budget(spec, case, torch.bfloat16, "cuda", "cpu")


@pytest.mark.parametrize(("spec", "case"), cases())
def test_deterministic(lane, spec: OpSpec, case: str) -> None:
    """The same bits, of gradients as well: those of few cases, where they take long."""
    serves(lane, spec)

    def compute() -> list[Tensor]:
        call, leaves = with_grad(spec, spec.call(case, torch.float32, lane.device))
        outs = flat(spec.function(**call, backend=lane.backend))
        if lane.slow and case not in spec.compiled:
            return outs
        weights = [torch.linspace(-1, 2, o.numel(), device=o.device).view(o.shape) for o in outs]
        return outs + list(torch.autograd.grad(outs, leaves, weights))

    first = compute()
    turn = 1 + list(spec.cases).index(case) % 3
    for seed in (turn,) if lane.slow else (1, 2, 3):  # another schedule, where the lane has one
        with lane.ready(seed):
            again = compute()
        for a, b in zip(first, again, strict=True):
            assert same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("spec", "case"), cases())
def test_strides_change_nothing(lane, spec: OpSpec, case: str, layout: str) -> None:
    """The same bits whatever the strides of every tensor argument, gradients included."""
    serves(lane, spec)
    if lane.backend == "reference":
        pytest.skip("torch's products may add in another order for other strides")
    number = list(spec.cases).index(case)
    in_turn = number % 4 == 0 and layout == list(LAYOUTS)[number // 4 % len(LAYOUTS)]
    if lane.slow and case not in spec.compiled and not in_turn:
        pytest.skip("takes long: few cases in all layouts, and of the others one in four, in one")
    call = spec.call(case, torch.float32, lane.device)
    contiguous = pytree.tree_map_only(Tensor, lambda x: x.contiguous(), call)
    spread = pytree.tree_map_only(Tensor, lambda x: LAYOUTS[layout](x) if x.is_floating_point() else x, call)
    expected = flat(spec.function(**contiguous, backend=lane.backend))
    outs = flat(spec.function(**spread, backend=lane.backend))
    weights = [torch.randn(o.shape, device=lane.device) for o in outs]
    expected += gradients(spec, spec.function, contiguous, weights, backend=lane.backend)
    outs += gradients(spec, spec.function, spread, [LAYOUTS[layout](w) for w in weights], backend=lane.backend)
    for a, b in zip(outs, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(("spec", "case"), cases())
def test_no_data_needed_for_shapes(spec: OpSpec, case: str) -> None:
    """On the meta device: shapes, dtypes and strides of the real result."""
    real = flat(spec.function(**spec.call(case, torch.float16)))
    call = on_meta(spec.call(case, torch.float16))
    for a, b in zip(flat(spec.function(**call)), real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


@pytest.mark.parametrize("spec", specs())
def test_gradcheck_to_second_order(lane, spec: OpSpec) -> None:
    serves(lane, spec)
    if torch.float64 not in lane.dtypes(spec):
        pytest.skip("finite differences need float64")
    call, leaves = with_grad(spec, spec.call(spec.differentiated, torch.float64, lane.device))
    change = {n: call[n] for n in spec.differentiable if n in call}
    structure = pytree.tree_structure(change)

    def function(*values: Tensor) -> Any:
        return tuple(flat(spec.function(**call | pytree.tree_unflatten(values, structure), backend=lane.backend)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(("spec", "bad"), bad_calls())
def test_wrong_arguments_are_named(spec: OpSpec, bad: Any) -> None:
    call = bad.change(spec.call(spec.example, torch.float32))
    before = {name: x.detach().clone() for name, x in tensors(call).items() if x.device.type == "cpu"}
    with pytest.raises(bad.error, match=bad.expected) as caught:
        spec.function(**call)
    assert f"argument '{bad.argument}'" in str(caught.value)
    for name, x in before.items():
        assert same_bits(tensors(call)[name], x), f"{name} was changed"


@pytest.mark.parametrize("spec", specs())
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(lane, spec: OpSpec, dynamic: bool) -> None:
    """No graph break; the same bits, forward and backward. What follows tracing is the same for every backend."""
    serves(lane, spec)
    if dynamic and lane.slow:
        pytest.skip("takes long: shapes are traced before a backend is asked")
    torch.compiler.reset()
    compiler = "inductor" if lane.backend == "cpu" else "aot_eager"
    compiled = torch.compile(spec.function, fullgraph=True, dynamic=dynamic, backend=compiler)
    for case in spec.compiled:
        call = spec.call(case, torch.float32, lane.device)
        expected = flat(spec.function(**call, backend=lane.backend))
        weights = [torch.randn_like(o) for o in expected]
        expected += gradients(spec, spec.function, call, weights, backend=lane.backend)
        outs = flat(compiled(**call, backend=lane.backend))
        outs += gradients(spec, compiled, call, weights, backend=lane.backend)
        for a, b in zip(outs, expected, strict=True):
            assert same_bits(a, b)


class OperatorCalls(TorchDispatchMode):
    """Collects the calls of our operators, as torch's dispatcher sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "kx":
            self.found.append((function, args, kwargs or {}))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("spec", specs())
def test_operators_are_what_they_say_they_are(lane, spec: OpSpec) -> None:
    """opcheck: schemas name what is written, results alias nothing, shapes without data are those with data."""
    serves(lane, spec)
    for case in spec.compiled:
        with OperatorCalls() as calls:
            call, leaves = with_grad(spec, spec.call(case, torch.float32, lane.device))
            outs = flat(spec.function(**call, backend=lane.backend))
            torch.autograd.grad(outs, leaves, [torch.randn_like(o) for o in outs])
        assert calls.found
        for function, args, kwargs in calls.found:
            tests = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(function, args, kwargs, test_utils=tests)


@pytest.mark.parametrize("spec", specs())
def test_a_backend_named_and_unfit_says_why(spec: OpSpec) -> None:
    call = spec.call(spec.example, torch.float32)
    meta = on_meta(call)
    if not torch.cuda.is_available():
        with pytest.raises(kx.UnsupportedError, match=r"'cuda' cannot serve this call(.|\n)*reference: can serve"):
            spec.function(**call, backend="cuda")
    table = kx.explain(spec.function, **call)
    assert all(name in table for name in spec.backends)
    assert table.count("serves this call") == 1
    assert kx.explain(spec.name, **call) == table
    if "cpu" in spec.backends:
        assert "cpu        cannot: the tensors are on meta" in kx.explain(spec.function, **meta)
    with kx.backend("reference"):
        assert "reference  serves this call" in kx.explain(spec.function, **call)


@pytest.mark.parametrize("spec", specs())
def test_counts_grow_as_claimed(spec: OpSpec) -> None:
    """Doubling a dimension multiplies the counted work by 2 to the exponent that the spec states."""
    base = spec.cases[spec.example]
    for quantity, exponents in spec.growth.items():
        count = getattr(spec, quantity)
        for dimension, exponent in exponents.items():
            calls = [spec.make(replace(base, **{dimension: n}), torch.float32, torch.device("cpu"), 0) for n in (8, 16)]
            assert count(calls[1]) == pytest.approx(count(calls[0]) * 2**exponent)
