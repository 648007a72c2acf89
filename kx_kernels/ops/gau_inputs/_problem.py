"""One checked call for a gated attention's inputs, as every backend takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._core.checks import check_ends

ACTIVATIONS = ("silu", "relu", "identity")  # kernels know them by their places
NUM_TENSORS = 10


class GauInputsProblem(NamedTuple):
    """Sizes as in README.md. Packed sequences are a batch of one."""

    u: Tensor | None  # [B, T, e]
    v: Tensor  # [B, T, e']
    z: Tensor  # [B, T, s]
    gamma: Tensor  # [M, s], of z's dtype or of `wide`
    beta: Tensor | None  # as gamma
    cos: Tensor | None  # [P, R/2]
    sin: Tensor | None  # as cos
    offsets: Tensor | None  # int64 [N], by sequence
    mask: Tensor | None  # bool [B, T], False for padding
    cu_seqlens: Tensor | None  # int32 [N + 1]
    activation: int  # place in ACTIVATIONS
    offset: int  # where offsets is None
    interleaved: bool

    @property
    def device(self) -> torch.device:
        return self.z.device

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        rows = (self.cos, self.sin, self.offsets, self.mask, self.cu_seqlens)
        return *self.leaves, *rows

    @property
    def options(self) -> tuple:
        return self[NUM_TENSORS:]

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """What gradients reach."""
        return self.u, self.v, self.z, self.gamma, self.beta

    @property
    def wide(self) -> torch.dtype:
        """The dtype of arithmetic."""
        return torch.float64 if self.z.dtype == torch.float64 else torch.float32

    def with_leaves(self, leaves: Sequence[Any]) -> GauInputsProblem:
        """The same call of other u, v, z, gamma and beta."""
        u, v, z, gamma, beta = leaves
        return self._replace(u=u, v=v, z=z, gamma=gamma, beta=beta)


class Gradients(NamedTuple):
    """What a backward pass gives."""

    u: Tensor | None
    v: Tensor
    z: Tensor
    gamma: Tensor
    beta: Tensor | None


def empty_results(p: GauInputsProblem) -> list[Tensor]:
    """The gate if there is one, the values and M heads, without gaps."""
    wide = [x for x in (p.u, p.v) if x is not None]
    return [p.z.new_empty(x.shape) for x in (*wide, *[p.z] * p.gamma.shape[0])]


def empty_gradients(p: GauInputsProblem) -> Gradients:
    return Gradients._make(None if x is None else torch.empty_like(x) for x in p.leaves)


def check_values(p: GauInputsProblem) -> None:
    """On the CPU, where reading data waits for nothing: raises ValueError for values that no kernel could serve."""
    if p.device.type != "cpu":
        return
    batch, length = p.z.shape[:2]
    lengths = torch.full((batch,), length)
    if p.cu_seqlens is not None:
        lengths = p.cu_seqlens.diff()
        check_ends("gau_inputs", "cu_seqlens", p.cu_seqlens, length)
    if p.cos is not None and lengths.numel() > 0:
        starts = p.offset if p.offsets is None else p.offsets
        last = int(torch.where(lengths > 0, lengths + starts, 0).max()) - 1
        if last >= p.cos.shape[0]:
            raise ValueError(
                f"gau_inputs: argument 'rope' holds positions 0 to {p.cos.shape[0] - 1}; expected tables up to "
                f"position {last}, which the rows reach"
            )
