"""The Triton kernels: one launch forward, one and a sum backward. Imported on first use, as it imports triton.

A tensor is a tuple of its pointer and its strides of b, t and d; names are those of the README.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _locate(  # -> whether rows are kept, and turn, and their positions: all [BLOCK_T]
    b, rows, length, mask, offsets_ptr, offset, cu_seqlens_ptr, sequences, search_steps, R: tl.constexpr
):  # fmt: skip
    keep = rows < length
    if mask[0] is not None:
        keep &= tl.load(mask[0] + b * mask[1] + rows * mask[2], mask=keep, other=0) != 0
    sequence = tl.zeros_like(rows) + b
    position = rows
    if cu_seqlens_ptr is not None:
        keep &= (rows >= tl.load(cu_seqlens_ptr)) & (rows < tl.load(cu_seqlens_ptr + sequences))
        low = tl.zeros_like(rows)  # cu_seqlens[low] <= row < cu_seqlens[high]
        high = low + sequences
        for _ in range(search_steps):
            middle = (low + high) // 2
            begins = tl.load(cu_seqlens_ptr + middle, mask=keep & (middle > low), other=0)
            low = tl.where(keep & (middle > low) & (begins <= rows), middle, low)
            high = tl.where(keep & (middle > low) & (begins > rows), middle, high)
        sequence = low
        position = rows - tl.load(cu_seqlens_ptr + sequence, mask=keep, other=0)
    if offsets_ptr is not None:
        position += tl.load(offsets_ptr + sequence, mask=keep, other=0)
    else:
        position += offset
    return keep, keep & (position >= 0) & (R > 0), position


@triton.jit
def _angles(  # -> cos and sin [BLOCK_T, HALF]: NaN past the tables
    cos, sin, position, turns, table_length, R: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    pairs = tl.arange(0, HALF)[None, :]
    known = (turns & (position < table_length))[:, None] & (pairs < R // 2)
    c = tl.load(cos[0] + position[:, None] * cos[1] + pairs * cos[2], mask=known, other=float("nan")).to(ACC)
    s = tl.load(sin[0] + position[:, None] * sin[1] + pairs * sin[2], mask=known, other=float("nan")).to(ACC)
    return c, s


@triton.jit
def _sigmoid(x):
    if x.dtype == tl.float64:
        return 1 / (1 + tl.exp(-x))
    else:
        return tl.div_rn(1.0, 1 + tl.exp(-x))  # / rounds less well


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """φ(x); NaN stays NaN."""
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)
    else:
        return x


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """φ′(x)."""
    if ACTIVATION == "silu":
        s = _sigmoid(x)
        return s * (1 + x * (1 - s))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0).to(x.dtype)
    else:
        return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _load(x, b, rows, keep, columns, D: tl.constexpr, ACC: tl.constexpr):
    """[rows, columns], 0 where there is none."""
    at = x[0] + b * x[1] + rows[:, None] * x[2] + columns[None, :] * x[3]
    return tl.load(at, mask=keep[:, None] & (columns < D)[None, :], other=0).to(ACC)


@triton.jit
def _store(x, b, rows, inside, columns, D: tl.constexpr, value):
    at = x[0] + b * x[1] + rows[:, None] * x[2] + columns[None, :] * x[3]
    tl.store(at, value.to(x[0].dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def _load_pairs(
    x, b, rows, keep, R: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The first and the second of each pair that turns, both [BLOCK_T, HALF]."""
    if INTERLEAVED:
        both = _load(x, b, rows, keep, tl.arange(0, 2 * HALF), R, ACC)
        return tl.split(tl.reshape(both, [BLOCK_T, HALF, 2]))
    else:
        pairs = tl.arange(0, HALF)
        second = (x[0] + R // 2 * x[3], x[1], x[2], x[3])
        return _load(x, b, rows, keep, pairs, R // 2, ACC), _load(second, b, rows, keep, pairs, R // 2, ACC)


@triton.jit
def _store_pairs(
    x, b, rows, inside, x0, x1, R: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    if INTERLEAVED:
        both = tl.reshape(tl.join(x0, x1), [BLOCK_T, 2 * HALF])
        _store(x, b, rows, inside, tl.arange(0, 2 * HALF), R, both)
    else:
        pairs = tl.arange(0, HALF)
        second = (x[0] + R // 2 * x[3], x[1], x[2], x[3])
        _store(x, b, rows, inside, pairs, R // 2, x0)
        _store(second, b, rows, inside, pairs, R // 2, x1)


@triton.jit(do_not_specialize=["length", "tiles", "table_length", "offset", "sequences", "search_steps"])
def gau_inputs_kernel(
    u, v, z, gamma, beta, gate, values, heads, cos, sin, mask, offsets_ptr, cu_seqlens_ptr, length, tiles,
    table_length, offset, sequences, search_steps,
    E: tl.constexpr, V: tl.constexpr, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK_T rows of BLOCK_E columns of u or of v, or of all heads; columns are the fastest index.

    HALF is R/2 and PASS is S − R, each rounded up to a power of two.
    """
    U_PARTS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    V_PARTS: tl.constexpr = (V + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0).to(tl.int64)
    part = pid % (U_PARTS + V_PARTS + 1)
    tile = pid // (U_PARTS + V_PARTS + 1)
    b = tile // tiles
    rows = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < length
    keep, turns, position = _locate(
        b, rows, length, mask, offsets_ptr, offset, cu_seqlens_ptr, sequences, search_steps, R
    )  # fmt: skip
    if E > 0:
        columns = part * BLOCK_E + tl.arange(0, BLOCK_E)
        if part < U_PARTS:
            x = _load(u, b, rows, keep, columns, E, ACC)  # [BLOCK_T, BLOCK_E]
            _store(gate, b, rows, inside, columns, E, _activate(x, ACTIVATION))
    if (part >= U_PARTS) & (part < U_PARTS + V_PARTS):
        columns = (part - U_PARTS) * BLOCK_E + tl.arange(0, BLOCK_E)
        x = _load(v, b, rows, keep, columns, V, ACC)
        _store(values, b, rows, inside, columns, V, _activate(x, ACTIVATION))
    if part == U_PARTS + V_PARTS:
        one = tl.full([1], True, tl.int1)
        if R > 0:
            c, s = _angles(cos, sin, position, turns, table_length, R, HALF, ACC)
            z0, z1 = _load_pairs(z, b, rows, keep, R, HALF, BLOCK_T, INTERLEAVED, ACC)  # [BLOCK_T, HALF]
            a0, a1 = _activate(z0, ACTIVATION), _activate(z1, ACTIVATION)
            for m in tl.static_range(M):
                row = tl.full([1], m, tl.int64)
                gamma0, gamma1 = _load_pairs(gamma, 0, row, one, R, HALF, 1, INTERLEAVED, ACC)
                h0, h1 = a0 * gamma0, a1 * gamma1
                if beta[0] is not None:
                    beta0, beta1 = _load_pairs(beta, 0, row, one, R, HALF, 1, INTERLEAVED, ACC)
                    h0, h1 = h0 + beta0, h1 + beta1
                y0 = tl.where(turns[:, None], tl.fma(h0, c, -(h1 * s)), h0)
                y1 = tl.where(turns[:, None], tl.fma(h1, c, h0 * s), h1)
                y0, y1 = tl.where(keep[:, None], y0, 0.0), tl.where(keep[:, None], y1, 0.0)
                _store_pairs(heads[m], b, rows, inside, y0, y1, R, HALF, BLOCK_T, INTERLEAVED)
        if R < S:
            dims = R + tl.arange(0, PASS)
            a = _activate(_load(z, b, rows, keep, dims, S, ACC), ACTIVATION)  # [BLOCK_T, PASS]
            for m in tl.static_range(M):
                row = tl.full([1], m, tl.int64)
                h = a * _load(gamma, 0, row, one, dims, S, ACC)
                if beta[0] is not None:
                    h += _load(beta, 0, row, one, dims, S, ACC)
                _store(heads[m], b, rows, inside, dims, S, tl.where(keep[:, None], h, 0.0))


@triton.jit
def _sum(x):
    """Over rows, [1, columns]; in float64, as these sums are long."""
    return tl.sum(x.to(tl.float64), 0, keep_dims=True)


@triton.jit(do_not_specialize=["length", "tiles", "table_length", "offset", "sequences", "search_steps"])
def gau_inputs_backward_kernel(
    u, v, z, gamma, gate, values, heads, grad_u, grad_v, grad_z, sums_ptr, cos, sin, mask, offsets_ptr, cu_seqlens_ptr,
    length, tiles, table_length, offset, sequences, search_steps,
    E: tl.constexpr, V: tl.constexpr, S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The same programs, where gate, values and heads are their gradients.

    Those of heads leave their sums over rows for gamma and beta in sums[tile], which is [2, M, S].
    """
    U_PARTS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    V_PARTS: tl.constexpr = (V + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0).to(tl.int64)
    part = pid % (U_PARTS + V_PARTS + 1)
    tile = pid // (U_PARTS + V_PARTS + 1)
    b = tile // tiles
    rows = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < length
    keep, turns, position = _locate(
        b, rows, length, mask, offsets_ptr, offset, cu_seqlens_ptr, sequences, search_steps, R
    )  # fmt: skip
    if E > 0:
        columns = part * BLOCK_E + tl.arange(0, BLOCK_E)
        if part < U_PARTS:
            x = _load(u, b, rows, keep, columns, E, ACC)  # [BLOCK_T, BLOCK_E]
            g = _load(gate, b, rows, keep, columns, E, ACC)
            _store(grad_u, b, rows, inside, columns, E, g * _slope(x, ACTIVATION))
    if (part >= U_PARTS) & (part < U_PARTS + V_PARTS):
        columns = (part - U_PARTS) * BLOCK_E + tl.arange(0, BLOCK_E)
        x = _load(v, b, rows, keep, columns, V, ACC)
        g = _load(values, b, rows, keep, columns, V, ACC)
        _store(grad_v, b, rows, inside, columns, V, g * _slope(x, ACTIVATION))
    if part == U_PARTS + V_PARTS:
        one = tl.full([1], True, tl.int1)
        sums = (sums_ptr + tile * (2 * M * S), 0, S, 1)
        if R > 0:
            c, s = _angles(cos, sin, position, turns, table_length, R, HALF, ACC)
            z0, z1 = _load_pairs(z, b, rows, keep, R, HALF, BLOCK_T, INTERLEAVED, ACC)  # [BLOCK_T, HALF]
            a0, a1 = _activate(z0, ACTIVATION), _activate(z1, ACTIVATION)
            grad0, grad1 = tl.zeros_like(a0), tl.zeros_like(a1)
            for m in tl.static_range(M):
                row = tl.full([1], m, tl.int64)
                gamma0, gamma1 = _load_pairs(gamma, 0, row, one, R, HALF, 1, INTERLEAVED, ACC)
                y0, y1 = _load_pairs(heads[m], b, rows, keep, R, HALF, BLOCK_T, INTERLEAVED, ACC)
                g0 = tl.where(turns[:, None], tl.fma(y0, c, y1 * s), y0)
                g1 = tl.where(turns[:, None], tl.fma(y1, c, -(y0 * s)), y1)
                grad0 += g0 * gamma0
                grad1 += g1 * gamma1
                by_gamma = _sum(g0 * a0), _sum(g1 * a1)  # [1, HALF]
                _store_pairs(sums, 0, row, one, by_gamma[0], by_gamma[1], R, HALF, 1, INTERLEAVED)
                by_beta = _sum(g0), _sum(g1)
                _store_pairs(sums, 0, M + row, one, by_beta[0], by_beta[1], R, HALF, 1, INTERLEAVED)
            grad0 *= _slope(z0, ACTIVATION)
            grad1 *= _slope(z1, ACTIVATION)
            _store_pairs(grad_z, b, rows, inside, grad0, grad1, R, HALF, BLOCK_T, INTERLEAVED)
        if R < S:
            dims = R + tl.arange(0, PASS)
            x = _load(z, b, rows, keep, dims, S, ACC)  # [BLOCK_T, PASS]
            a = _activate(x, ACTIVATION)
            grad = tl.zeros_like(a)
            for m in tl.static_range(M):
                row = tl.full([1], m, tl.int64)
                g = _load(heads[m], b, rows, keep, dims, S, ACC)
                grad += g * _load(gamma, 0, row, one, dims, S, ACC)
                _store(sums, 0, row, one, dims, S, _sum(g * a))
                _store(sums, 0, M + row, one, dims, S, _sum(g))
            _store(grad_z, b, rows, inside, dims, S, grad * _slope(x, ACTIVATION))


@triton.jit(do_not_specialize=["tiles"])
def gau_inputs_sum_kernel(
    sums_ptr, grad_gamma, grad_beta, tiles, S: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of gamma and beta: BLOCK_C columns of the sums [tiles, 2·M·S] are added up by each program."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    sums = (sums_ptr, 0, 2 * M * S, 1)
    for first in range(0, tiles, BLOCK_N):
        total += _load(sums, 0, first + rows, first + rows < tiles, columns, 2 * M * S, tl.float64)
    total = tl.sum(total, 0).to(ACC)  # [BLOCK_C]
    m, d = columns // S, columns % S
    at = grad_gamma[0] + m * grad_gamma[2] + d * grad_gamma[3]
    tl.store(at, total.to(grad_gamma[0].dtype.element_ty), mask=m < M)
    if grad_beta[0] is not None:
        at = grad_beta[0] + (m - M) * grad_beta[2] + d * grad_beta[3]
        tl.store(at, total.to(grad_beta[0].dtype.element_ty), mask=(m >= M) & (m < 2 * M))
