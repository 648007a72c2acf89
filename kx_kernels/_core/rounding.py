"""Rounding that eager torch would do, for references that compute in a wider dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeldGradient(torch.autograd.Function):
    """x, whose gradient is rounded to a dtype: as that of x is where x is held in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None
