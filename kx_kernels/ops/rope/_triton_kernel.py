"""The Triton kernel: one launch rotates every head of q and k. Imported on first use, as it imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _locate(  # -> position and sequence of each row, both [BLOCK_T]; padding has a negative position
    b, rows, length, positions_ptr, position_strides, offsets_ptr, offset_stride, offset, cu_seqlens_ptr, cu_stride,
    sequences, search_steps,
):  # fmt: skip
    inside = rows < length
    sequence = tl.zeros_like(rows) + b
    place = rows
    if cu_seqlens_ptr is not None:
        low = tl.zeros_like(rows) - 1  # cu_seqlens[low] <= row < cu_seqlens[high]
        high = tl.zeros_like(rows) + sequences + 1
        for _ in range(search_steps):
            middle = (low + high) // 2
            unknown = inside & (middle > low)
            begins = tl.load(cu_seqlens_ptr + middle * cu_stride, mask=unknown, other=0)
            low = tl.where(unknown & (begins <= rows), middle, low)
            high = tl.where(unknown & (begins > rows), middle, high)
        inside &= (low >= 0) & (low < sequences)
        sequence = tl.where(inside, low, 0)
        place = rows - tl.load(cu_seqlens_ptr + sequence * cu_stride, mask=inside, other=0)
    if positions_ptr is not None:
        at = positions_ptr + b * position_strides[0] + rows * position_strides[1]
        position = tl.load(at, mask=inside, other=0).to(tl.int64)
    elif offsets_ptr is not None:
        position = place + tl.load(offsets_ptr + sequence * offset_stride, mask=inside, other=0)
    else:
        position = place + offset
    return tl.where(inside, position, -1), sequence


@triton.jit
def _rotate_heads(
    x_ptr, x_strides, out_ptr, out_strides, b, rows, length, first_head, heads, padding, c, s,
    D: tl.constexpr, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr, COPY: tl.constexpr,
    HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    x_rows = x_ptr + b * x_strides[0] + rows[:, None] * x_strides[1]  # [BLOCK_T, 1]
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    out_rows = out_ptr + b * out_strides[0] + rows[:, None] * out_strides[1]
    for h in tl.static_range(BLOCK_H if R > 0 else 0):
        head = first_head + h
        real = (rows < length)[:, None] & (head < heads)
        x_head = x_rows + head * x_strides[2]
        out_head = out_rows + head * out_strides[2]
        if INTERLEAVED:
            dims = tl.arange(0, 2 * HALF)[None, :]
            mask = real & (dims < R)
            x = tl.load(x_head + (START + dims) * x_strides[3], mask=mask, other=0)  # [BLOCK_T, 2·HALF]
            x0, x1 = tl.split(tl.reshape(x, [BLOCK_T, HALF, 2]))
        else:
            dims = tl.arange(0, HALF)[None, :]
            mask = real & (dims < R // 2)
            x0 = tl.load(x_head + (START + dims) * x_strides[3], mask=mask, other=0)  # [BLOCK_T, HALF]
            x1 = tl.load(x_head + (START + R // 2 + dims) * x_strides[3], mask=mask, other=0)
        y0 = tl.fma(x0.to(ACC), c, -(x1.to(ACC) * s)).to(OUT)
        y1 = tl.fma(x1.to(ACC), c, x0.to(ACC) * s).to(OUT)
        y0 = tl.where(padding[:, None], x0.to(OUT), y0)
        y1 = tl.where(padding[:, None], x1.to(OUT), y1)
        if INTERLEAVED:
            y = tl.reshape(tl.join(y0, y1), [BLOCK_T, 2 * HALF])
            tl.store(out_head + (START + dims) * out_strides[3], y, mask=mask)
        else:
            tl.store(out_head + (START + dims) * out_strides[3], y0, mask=mask)
            tl.store(out_head + (START + R // 2 + dims) * out_strides[3], y1, mask=mask)
    if COPY:
        dims = tl.arange(0, PASS)[None, :]  # the dimensions that pass through, the rotated ones skipped
        dims = tl.where(dims < START, dims, dims + R)
        for h in tl.static_range(BLOCK_H):
            head = first_head + h
            mask = (rows < length)[:, None] & (head < heads) & (dims < D)
            x = tl.load(x_rows + head * x_strides[2] + dims * x_strides[3], mask=mask, other=0)  # [BLOCK_T, PASS]
            tl.store(out_rows + head * out_strides[2] + dims * out_strides[3], x, mask=mask)


@triton.jit(do_not_specialize=["length", "tiles", "table_length", "offset", "sequences", "search_steps"])
def rope_kernel(
    q_ptr, q_strides, q_out_ptr, q_out_strides, q_heads, k_ptr, k_strides, k_out_ptr, k_out_strides, k_heads,
    cos_ptr, cos_strides, sin_ptr, sin_strides, positions_ptr, position_strides, offsets_ptr, offset_stride,
    cu_seqlens_ptr, cu_stride, length, tiles, table_length, offset, sequences, search_steps,
    D: tl.constexpr, R: tl.constexpr, START: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    COPY: tl.constexpr, HALF: tl.constexpr, PASS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A program rotates BLOCK_T tokens of BLOCK_H heads, of q or of k; groups of heads are the fastest index.

    HALF is R/2 and PASS is D − R, each rounded up to a power of two; COPY: the out tensors are fresh and D > R.
    """
    q_groups = tl.cdiv(q_heads, BLOCK_H)
    groups = q_groups + tl.cdiv(k_heads, BLOCK_H)
    pid = tl.program_id(0).to(tl.int64)
    group = pid % groups
    b = pid // groups // tiles
    rows = pid // groups % tiles * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    position, sequence = _locate(
        b, rows, length, positions_ptr, position_strides, offsets_ptr, offset_stride, offset, cu_seqlens_ptr, cu_stride,
        sequences, search_steps,
    )  # fmt: skip
    pairs = tl.arange(0, HALF)[None, :]
    known = ((position >= 0) & (position < table_length))[:, None] & (pairs < R // 2)
    cos_rows = cos_ptr + (sequence * cos_strides[0] + position * cos_strides[1])[:, None]
    sin_rows = sin_ptr + (sequence * sin_strides[0] + position * sin_strides[1])[:, None]
    c = tl.load(cos_rows + pairs * cos_strides[2], mask=known, other=float("nan")).to(ACC)  # [BLOCK_T, HALF]
    s = tl.load(sin_rows + pairs * sin_strides[2], mask=known, other=float("nan")).to(ACC)
    s = -s if INVERSE else s
    if group < q_groups:
        _rotate_heads(
            q_ptr, q_strides, q_out_ptr, q_out_strides, b, rows, length, group * BLOCK_H, q_heads, position < 0, c, s,
            D, R, START, INTERLEAVED, COPY, HALF, PASS, BLOCK_T, BLOCK_H, ACC,
        )  # fmt: skip
    else:
        first_head = (group - q_groups) * BLOCK_H
        _rotate_heads(
            k_ptr, k_strides, k_out_ptr, k_out_strides, b, rows, length, first_head, k_heads, position < 0, c, s,
            D, R, START, INTERLEAVED, COPY, HALF, PASS, BLOCK_T, BLOCK_H, ACC,
        )  # fmt: skip
