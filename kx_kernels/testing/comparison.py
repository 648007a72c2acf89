"""What an operator's result is held against: its reference in float64, and as eager PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kx_kernels._core.spec import Call, OpSpec
from kx_kernels.testing.budget import Pair

Compute = Callable[[Callable[..., Any], Call], Sequence[Tensor]]
"""compute(function, call) gives the tensors that are compared: outputs of the call, or gradients, or both."""


def exact_and_eager(spec: OpSpec, call: Call, dtype: torch.dtype, backend: str, compute: Compute) -> list[Pair]:
    """Each tensor by the reference in float64, and eagerly in the dtype under test (float64: in float32)."""
    narrow = spec.cast(call, torch.float32 if dtype == torch.float64 else dtype)
    exact = compute(spec.reference, spec.cast(call, torch.float64))
    return list(zip(exact, compute(spec.eager.get(backend, spec.reference), narrow), strict=True))


def neighbours(spec: OpSpec, call: Call, dtype: torch.dtype, backend: str, compute: Compute, i: int) -> Iterator[Pair]:
    """The i-th of these pairs for four inputs that are up to 1 % off."""
    generator = torch.Generator().manual_seed(0)

    def nearby(x: Tensor) -> Tensor:
        off = 0.01 * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        return (x.double() * (1 + off)).to(x.dtype)

    for _ in range(4):
        change = pytree.tree_map_only(Tensor, nearby, {n: call[n] for n in spec.differentiable if n in call})
        yield exact_and_eager(spec, call | change, dtype, backend, compute)[i]


def values_and_gradients(spec: OpSpec, function: Callable[..., Any], call: Call) -> list[Tensor]:
    """The one output of a call, and the gradients of what it is differentiable in, for a gradient from −1 to 2."""
    names = [n for n in spec.differentiable if n in call]
    leaves = [call[n].detach().requires_grad_() for n in names]
    out = function(**call | dict(zip(names, leaves, strict=True)))
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]
