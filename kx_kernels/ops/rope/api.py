"""The public function: its contract, its errors, and nothing else."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..._core import dispatch, memory
from ..._core.checks import FLOATS, INDICES, Description, bound, check_int, check_tensor, reject
from ._autograd import rotate
from ._backends import backends
from ._problem import RopeProblem


@overload
def rope(
    q: Tensor,
    k: None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = ...,
    offset: int | Tensor = ...,
    cu_seqlens: Tensor | None = ...,
    rotary_dim: int | None = ...,
    start: int = ...,
    interleaved: bool = ...,
    inverse: bool = ...,
    inplace: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = ...,
    offset: int | Tensor = ...,
    cu_seqlens: Tensor | None = ...,
    rotary_dim: int | None = ...,
    start: int = ...,
    interleaved: bool = ...,
    inverse: bool = ...,
    inplace: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    rotary_dim: int | None = None,
    start: int = 0,
    interleaved: bool = True,
    inverse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embedding of queries, or of queries and keys in one launch.

    Each pair (x0, x1) of a head's R rotated dimensions turns by its angle at the row's position:
    y0 = x0·cos − x1·sin, y1 = x1·cos + x0·sin. Dimensions outside [start, start + R) pass through.

    | argument     | shape                             | dtype        | meaning                                     |
    |--------------|-----------------------------------|--------------|---------------------------------------------|
    | `q`          | [B, T, H, D] or [total, H, D]     | float        | queries; the second form with `cu_seqlens`  |
    | `k`          | [B, T, H_k, D] or [total, H_k, D] | as `q`       | keys, or None                               |
    | `cos`, `sin` | [P, R/2] or [B, P, R/2]           | float        | tables by position; see `rope_tables`       |
    | `positions`  | [B, T], [1, T] or [total]         | int32, int64 | the position of each token                  |
    | `offset`     | int or [B]                        | int32, int64 | position of each sequence's first token     |
    | `cu_seqlens` | [B + 1]                           | int32        | where each packed sequence starts, and ends |

    "float" is bfloat16, float16, float32 or float64, the tables' independently of q's. Strides are free everywhere.
    `positions` and `offset` exclude each other.

    Positions count tokens. A negative position is padding: its row passes through unchanged, as do packed rows that
    belong to no sequence. A position past the tables raises ValueError where that is known without waiting for a
    device: for integer offsets, and for tensors on the CPU. Otherwise the rotated dimensions of that row are NaN;
    memory outside the tables is never read.

    Args:
        rotary_dim: R, if given checked against the tables; any even number up to D.
        start: first rotated dimension of the head.
        interleaved: True pairs dimensions (0, 1), (2, 3), … as RoFormer does; False pairs (i, i + R/2) as LLaMA does.
        inverse: rotate by the opposite angle (uses −sin), which undoes the rotation and is its gradient.
        inplace: write into `q` and `k` and return them. Their elements must not overlap, and they must not be leaves
            that require grad.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; None takes the choice of `kx_kernels.backend`.

    Returns:
        New tensors with the shape, dtype and layout of `q` (and `k`); one tensor if `k` is None. Arithmetic is in
        float32 (float64 for float64 inputs) and rounds once. Differentiable in q and k, to any order.

    Raises:
        ValueError: a shape, size or position that does not fit.
        TypeError: a dtype or type that does not fit.
        UnsupportedError: the backend asked for by name cannot serve this call.

    Source: Su et al., "RoFormer" (arXiv:2104.09864), equations 15 and 34.
    """
    p = _checked(q, k, cos, sin, positions, offset, cu_seqlens, rotary_dim, start, interleaved, inverse)
    if inplace:
        _check_inplace(p.xs)
    outs = rotate(p, dispatch.requested(backend), inplace)
    return outs[0] if k is None else (outs[0], outs[1])


def problem(*args, **kwargs) -> RopeProblem:
    """A call as its backends see it, checked."""
    return _checked(**bound(rope, args, kwargs, without=("backend", "inplace")))


def survey(*args, **kwargs) -> list[tuple[str, str | None]]:
    """For `kx_kernels.explain`: each backend, and why it cannot serve this call or None."""
    return dispatch.survey(backends(), problem(*args, **kwargs))


def _checked(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    rotary_dim: int | None,
    start: int,
    interleaved: bool,
    inverse: bool,
) -> RopeProblem:
    """The call as a RopeProblem, or the error that names what is wrong with it."""
    packed = cu_seqlens is not None
    layout = "[total, H, D], as cu_seqlens is given" if packed else "[B, T, H, D]"
    xs = (q,) if k is None else (q, k)
    for name, x in zip("qk", xs, strict=False):
        check_tensor("rope", name, x, FLOATS, q if isinstance(q, Tensor) else None)
        if x.dim() != (3 if packed else 4):
            reject("rope", name, x, f"shape {layout}")
    if k is not None:
        if k.dtype != q.dtype:
            reject("rope", "k", k, f"the dtype of q, {q.dtype}", TypeError)
        if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
            reject("rope", "k", k, f"the shape of q, {list(q.shape)}, but for the number of heads")
    *rows, _, head_dim = q.shape
    sequences = rows[0]
    if cu_seqlens is not None:
        check_tensor("rope", "cu_seqlens", cu_seqlens, (torch.int32,), q)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            reject("rope", "cu_seqlens", cu_seqlens, "shape [B + 1], one more than there are sequences")
        sequences = cu_seqlens.shape[0] - 1

    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor("rope", name, table, FLOATS, q)
        if table.dim() not in (2, 3) or (table.dim() == 3 and table.shape[0] not in (1, sequences)):
            reject("rope", name, table, f"shape [P, R/2] or [B, P, R/2] with B = {sequences}")
        if table.requires_grad and torch.is_grad_enabled():
            given = Description("a tensor that requires grad")
            reject("rope", name, given, "a table without: rope gives no gradient to its tables")
    if sin.shape != cos.shape:
        reject("rope", "sin", sin, f"the shape of cos, {list(cos.shape)}")
    if sin.dtype != cos.dtype:
        reject("rope", "sin", sin, f"the dtype of cos, {cos.dtype}", TypeError)

    table_length, half = cos.shape[-2:]
    if rotary_dim is not None:
        check_int("rope", "rotary_dim", rotary_dim)
        if rotary_dim % 2 or rotary_dim < 0:
            reject("rope", "rotary_dim", rotary_dim, "an even number that is not negative")
        if rotary_dim > head_dim:
            reject("rope", "rotary_dim", rotary_dim, f"at most the head dimension D = {head_dim}")
        if half != rotary_dim // 2:
            reject("rope", "cos", cos, f"width R/2 = {rotary_dim // 2}, half of rotary_dim = {rotary_dim}")
    check_int("rope", "start", start)
    if start < 0:
        reject("rope", "start", start, "a dimension of the head, 0 or more")
    if start + 2 * half > head_dim:
        room = f"start + R at most the head dimension D = {head_dim}; the tables have R = {2 * half}"
        reject("rope", "cos" if start == 0 else "start", cos if start == 0 else start, room)

    first, offsets = 0, None
    if positions is not None:
        check_tensor("rope", "positions", positions, INDICES, q)
        if packed and positions.shape != q.shape[:1]:
            reject("rope", "positions", positions, f"shape [total] = {list(q.shape[:1])}")
        if not packed:
            if positions.dim() != 2 or positions.shape[1] != rows[1] or positions.shape[0] not in (1, rows[0]):
                reject("rope", "positions", positions, f"shape [B, T] = {list(q.shape[:2])}, or [1, T]")
            positions = positions.expand(rows[0], rows[1])
        if isinstance(offset, Tensor) or offset != 0:
            reject("rope", "offset", offset, "0, as positions is given and holds the position of every token")
    elif isinstance(offset, Tensor):
        check_tensor("rope", "offset", offset, INDICES, q)
        if offset.dim() != 1 or offset.shape[0] != sequences:
            reject("rope", "offset", offset, f"an int, or shape [B] = [{sequences}]")
        offsets = offset
    elif isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        reject("rope", "offset", offset, "an int or an int32 or int64 tensor", TypeError)
    else:
        first = offset
        if not packed and rows[1] > 0 and first + rows[1] > table_length:
            expected = f"offset + T at most the tables' length P = {table_length}; T = {rows[1]}"
            reject("rope", "offset" if first else "cos", first if first else cos, expected)
    return RopeProblem(xs, cos, sin, positions, offsets, cu_seqlens, first, start, bool(interleaved), bool(inverse))


def _check_inplace(xs: tuple[Tensor, ...]) -> None:
    if torch.compiler.is_compiling():
        return  # torch's functionalization keeps every write in order
    for name, x in zip("qk", xs, strict=False):
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            wanted = "a tensor that is not a leaf, as inplace=True would overwrite the value its gradient belongs to"
            reject("rope", name, Description("a leaf that requires grad"), wanted)
        if memory.overlaps_itself(x):
            given = Description(f"of shape {list(x.shape)} with strides {list(x.stride())}")
            reject("rope", name, given, "elements that do not overlap, as inplace=True")
    if len(xs) == 2 and memory.overlap(*xs):
        reject("rope", "k", Description("a tensor that overlaps q"), "memory of its own, as inplace=True")
