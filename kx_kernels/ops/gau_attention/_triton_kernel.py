"""The Triton kernels, in the names of the README. Imported on first use, with triton.

A tensor is (pointer, strides). i and j count the queries and keys of a sequence from its first. A panel is a part of P,
and backward of X, in a workspace: blocks of BM queries, one unit after the other, by `width` keys from `first_key` on.
Units count blocks of queries, head by head; those of packed sequences go by `query_block`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._core.triton_kernel import (
    activate,
    add_product,
    by_row,
    find,
    first_block,
    inverse,
    kept,
    load_factors,
    load_rows,
    multiply,
    narrow,
    query_block,
    rows_of,
    score,
    slope,
    store_outputs,
    store_rows,
)


@triton.jit
def _last_seen(first, tokens, shift, k_tokens, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys a block of queries sees."""
    if CAUSAL:
        return tl.minimum(k_tokens, tl.maximum(tl.minimum(first + BM, tokens) + shift, 0))
    return k_tokens


@triton.jit
def _inverse_of_normalizer(
    out_scale, c_ptr, sums_ptr, head, heads, at, inside, ACC: tl.constexpr
):  # fmt: skip
    """c [rows]."""
    if sums_ptr is not None:
        return inverse(tl.load(sums_ptr + at * heads + head, mask=inside, other=0))
    else:
        return by_row(out_scale, c_ptr, at, inside, ACC)


@triton.jit
def _gradients_of_scores(
    q, k, v, gate, bias, g, factors, pointers, heads, batch, head, kv_head, i, j, rows, y_rows, at, inside, keep,
    y_keep, shift, S: tl.constexpr, E: tl.constexpr, F: tl.constexpr, CAUSAL: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c·P and X [i, j], as products take them."""
    d = multiply(g, gate, v, batch, rows, keep, head, y_rows, y_keep, kv_head, E, BD, ACC, DOT, PRECISION)
    products = multiply(q, (None,), k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION)
    a = by_row(factors[0], pointers[0], at, inside, ACC)
    b = by_row(factors[1], pointers[1], at, inside, ACC)
    c = _inverse_of_normalizer(factors[2], pointers[2], pointers[3], head, heads, at, inside, ACC)
    x, seen = score(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
    d *= c[:, None]
    if pointers[4] is not None:
        d -= tl.load(pointers[4] + at * heads + head, mask=inside, other=0)[:, None]
    weights = tl.where(seen, activate(x, F) * c[:, None], 0)
    grads = tl.where(seen, slope(x, F) * d, 0)
    return narrow(weights, DOT, PRECISION), narrow(grads, DOT, PRECISION)


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "sequences", "blocks", "first_unit", "count"])
def gau_attention_kernel(
    q, k, v, gate, bias, a_ptr, b_ptr, c_ptr, query_mask, key_mask, ends, out, ungated, sums_ptr, panel_ptr, n_q, n_k,
    heads, sequences, blocks, first_unit, count, width, scale: tl.float64, bias_scale: tl.float64,
    out_scale: tl.float64, S: tl.constexpr, E: tl.constexpr, F: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    BE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the outputs' columns, for a block of queries; P is made here, or read from a panel."""
    pid = tl.program_id(0).to(tl.int64)
    part = pid % SLICES
    place = count - 1 - pid // SLICES  # the longest rows first
    unit = first_unit + place
    batch, head, q_tokens, k_begin, k_tokens, first, i, rows, inside = query_block(
        unit, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    if first < 0 or first >= q_tokens:
        return
    keep = kept(query_mask, batch, rows, inside)
    at = batch * n_q + rows
    shift = k_tokens - q_tokens
    kv_head = head // GROUP
    dims = (part * BE).to(tl.int32) + tl.arange(0, BE)
    if panel_ptr is None:
        a = by_row(scale, a_ptr, at, inside, ACC)
        b = by_row(bias_scale, b_ptr, at, inside, ACC)
        queries = load_rows(q, batch, rows, keep, head, tl.arange(0, BS), S).to(DOT)  # [BM, BS]

    total = tl.zeros([BM, BE], ACC)
    sums = tl.zeros([BM], ACC)
    for key in range(0, _last_seen(first, q_tokens, shift, k_tokens, BM, CAUSAL), BN):
        j = key + tl.arange(0, BN)
        y_rows = k_begin + j
        y_keep = kept(key_mask, batch, y_rows, j < k_tokens)
        if panel_ptr is None:
            keys = load_rows(k, batch, y_rows, y_keep, kv_head, tl.arange(0, BS), S).to(DOT)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
            x, seen = score(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
            weights = narrow(tl.where(seen, activate(x, F), 0), DOT, PRECISION)  # [BM, BN]
        else:
            at_panel = (place * BM + tl.arange(0, BM))[:, None] * width + j[None, :]
            weights = tl.load(panel_ptr + at_panel)
        values = load_rows(v, batch, y_rows, y_keep, kv_head, dims, E).to(DOT)  # [BN, BE]
        total = add_product(total, weights, values, DOT, ACC, PRECISION)
        if sums_ptr is not None:
            sums += tl.sum(weights.to(ACC), 1)

    if sums_ptr is not None:
        c = inverse(sums)
        tl.store(sums_ptr + at * heads + head, sums, mask=inside & (part == 0))
    else:
        c = by_row(out_scale, c_ptr, at, inside, ACC)
    total = tl.where(keep[:, None], total * c[:, None], 0)
    store_outputs(
        out, ungated, gate, batch, rows, keep, inside, head, (part * BE).to(tl.int32), total, E, BM, BE, ACC
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "sequences", "blocks", "first_unit", "first_key", "key_blocks"])
def gau_scores_kernel(
    q, k, v, gate, bias, a_ptr, b_ptr, c_ptr, query_mask, key_mask, ends, g, sums_ptr, delta_ptr, panel_ptr,
    grad_panel_ptr, n_q, n_k, heads, sequences, blocks, first_unit, first_key, key_blocks, width, scale: tl.float64,
    bias_scale: tl.float64, out_scale: tl.float64, S: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a panel's P, or c·P and X where there are gradients, for a block of queries and one of keys."""
    pid = tl.program_id(0).to(tl.int64)
    place = pid // key_blocks
    batch, head, q_tokens, k_begin, k_tokens, first, i, rows, inside = query_block(
        first_unit + place, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    column = (pid % key_blocks).to(tl.int32) * BN
    key = first_key + column
    shift = k_tokens - q_tokens
    if first < 0 or first >= q_tokens or key >= _last_seen(first, q_tokens, shift, k_tokens, BM, CAUSAL):
        return
    keep = kept(query_mask, batch, rows, inside)
    at = batch * n_q + rows
    j = key + tl.arange(0, BN)
    y_rows = k_begin + j
    y_keep = kept(key_mask, batch, y_rows, j < k_tokens)
    kv_head = head // GROUP
    at_panel = (place * BM + tl.arange(0, BM))[:, None] * width + (column + tl.arange(0, BN))[None, :]
    if grad_panel_ptr is None:
        products = multiply(
            q, (None,), k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION
        )  # fmt: skip
        a = by_row(scale, a_ptr, at, inside, ACC)
        b = by_row(bias_scale, b_ptr, at, inside, ACC)
        x, seen = score(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
        tl.store(panel_ptr + at_panel, narrow(tl.where(seen, activate(x, F), 0), DOT, PRECISION))
    else:
        weights, grads = _gradients_of_scores(
            q, k, v, gate, bias, g, (scale, bias_scale, out_scale), (a_ptr, b_ptr, c_ptr, sums_ptr, delta_ptr), heads,
            batch, head, kv_head, i, j, rows, y_rows, at, inside, keep, y_keep, shift, S, E, F, CAUSAL, BS, BD, ACC,
            DOT, PRECISION,
        )  # fmt: skip
        tl.store(panel_ptr + at_panel, weights)
        tl.store(grad_panel_ptr + at_panel, grads)


@triton.jit
def _sum_over_queries(
    q, k, v, gate, bias, g, factors, pointers, query_mask, ends, out, panel_ptr, n_q, heads, blocks, width, batch,
    kv_head, pair, n, q_begin, q_tokens, shift, key, first_key, y_rows, y_inside, y_keep, dims, VALUES: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr, F: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of the gradients of a block of values, or of keys."""
    j = key + tl.arange(0, BN)
    column = tl.multiple_of(key - first_key, BN)
    total = tl.zeros([BN, dims.shape[0]], ACC)
    first = 0
    if CAUSAL:
        first = tl.maximum(key - shift, 0) // BR * BR
    for h in range(GROUP):
        head = kv_head * GROUP + h
        origin = ((pair * GROUP + h) * blocks + first_block(ends[0], n, n_q, BM, BM)) * BM
        for start in range(first, q_tokens, BR):
            i = start + tl.arange(0, BR)
            inside = i < q_tokens
            rows = q_begin + i
            keep = kept(query_mask, batch, rows, inside)
            at = batch * n_q + rows
            if panel_ptr is not None:
                at_panel = (origin + i)[:, None] * width + (column + tl.arange(0, BN))[None, :]
                tile = tl.load(panel_ptr + at_panel)  # [BR, BN]
            elif VALUES:
                products = multiply(
                    q, (None,), k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION
                )  # fmt: skip
                a = by_row(factors[0], pointers[0], at, inside, ACC)
                b = by_row(factors[1], pointers[1], at, inside, ACC)
                c = _inverse_of_normalizer(factors[2], pointers[2], pointers[3], head, heads, at, inside, ACC)
                x, seen = score(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
                tile = narrow(tl.where(seen, activate(x, F) * c[:, None], 0), DOT, PRECISION)
            else:
                _, tile = _gradients_of_scores(
                    q, k, v, gate, bias, g, factors, pointers, heads, batch, head, kv_head, i, j, rows, y_rows, at,
                    inside, keep, y_keep, shift, S, E, F, CAUSAL, BS, BD, ACC, DOT, PRECISION,
                )  # fmt: skip
            if VALUES:
                right = load_factors(g, gate, None, batch, rows, keep, head, dims, E, ACC, DOT, PRECISION)
            else:
                a_ptr = pointers[0]
                if pointers[0] is not None:
                    a_ptr += batch * n_q
                right = load_factors(q, (None,), a_ptr, batch, rows, keep, head, dims, S, ACC, DOT, PRECISION)
            total = add_product(total, tl.trans(tile), right, DOT, ACC, PRECISION)
    if VALUES:
        store_rows(out, batch, y_rows, y_inside, kv_head, dims, tl.where(y_keep[:, None], total, 0), E)
    else:
        total = tl.where(y_keep[:, None], total * factors[0], 0)
        store_rows(out, batch, y_rows, y_inside, kv_head, dims, total, S)


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "sequences", "blocks", "first_pair", "first_key", "key_blocks"])
def gau_keys_kernel(
    q, k, v, gate, bias, a_ptr, b_ptr, c_ptr, query_mask, key_mask, ends, g, sums_ptr, delta_ptr, panel_ptr,
    grad_panel_ptr, grad_k, grad_v, n_q, n_k, heads, sequences, blocks, first_pair, first_key, key_blocks, width,
    scale: tl.float64, bias_scale: tl.float64, out_scale: tl.float64, S: tl.constexpr, E: tl.constexpr,
    F: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, S_SLICES: tl.constexpr, E_SLICES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    BE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the gradients of a block of values, or of keys, for a head of keys."""
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % (E_SLICES + S_SLICES)).to(tl.int32)
    block = (pid // (E_SLICES + S_SLICES) % key_blocks).to(tl.int32)
    pair = pid // (E_SLICES + S_SLICES) // key_blocks
    kv_heads = heads // GROUP
    batch, kv_head = (first_pair + pair) // kv_heads, (first_pair + pair) % kv_heads
    n, key = batch, first_key + block * BN
    if ends[1] is not None:
        n, block = find(ends[1], block, sequences, n_k, BN, BN)
        key = block * BN
    q_begin, q_tokens = rows_of(ends[0], n, n_q)
    k_begin, k_tokens = rows_of(ends[1], n, n_k)
    if key < first_key or key >= tl.minimum(first_key + width, k_tokens):
        return
    j = key + tl.arange(0, BN)
    y_inside = j < k_tokens
    y_rows = k_begin + j
    y_keep = kept(key_mask, batch, y_rows, y_inside)
    shift = k_tokens - q_tokens
    factors = ((tl.full([], 1.0, ACC) * scale).to(ACC), bias_scale, out_scale)
    pointers = (a_ptr, b_ptr, c_ptr, sums_ptr, delta_ptr)
    if part < E_SLICES:
        _sum_over_queries(
            q, k, v, gate, bias, g, factors, pointers, query_mask, ends, grad_v, panel_ptr, n_q, heads, blocks, width,
            batch, kv_head, pair, n, q_begin, q_tokens, shift, key, first_key, y_rows, y_inside, y_keep,
            part * BE + tl.arange(0, BE), True, S, E, F, CAUSAL, GROUP, BM, BN, BR, BS, BD, ACC, DOT, PRECISION,
        )  # fmt: skip
    else:
        _sum_over_queries(
            q, k, v, gate, bias, g, factors, pointers, query_mask, ends, grad_k, grad_panel_ptr, n_q, heads, blocks,
            width, batch, kv_head, pair, n, q_begin, q_tokens, shift, key, first_key, y_rows, y_inside, y_keep,
            (part - E_SLICES) * BK + tl.arange(0, BK), False, S, E, F, CAUSAL, GROUP, BM, BN, BR, BS, BD, ACC, DOT,
            PRECISION,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["n_q", "n_k", "heads", "sequences", "blocks", "first_unit", "first_key", "is_first", "is_last"]
)
def gau_queries_kernel(
    q, k, v, gate, bias, a_ptr, b_ptr, c_ptr, query_mask, key_mask, ends, g, sums_ptr, delta_ptr, grad_panel_ptr, carry,
    grad_q, n_q, n_k, heads, sequences, blocks, first_unit, first_key, width, is_first, is_last, scale: tl.float64,
    bias_scale: tl.float64, out_scale: tl.float64, S: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, S_SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: what a panel's keys add to a slice of the gradients of a block of queries."""
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % S_SLICES).to(tl.int32)
    place = pid // S_SLICES
    batch, head, q_tokens, k_begin, k_tokens, first, i, rows, inside = query_block(
        first_unit + place, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    if first < 0 or first >= q_tokens:
        return
    keep = kept(query_mask, batch, rows, inside)
    at = batch * n_q + rows
    shift = k_tokens - q_tokens
    kv_head = head // GROUP
    dims = part * BK + tl.arange(0, BK)
    total = tl.zeros([BM, BK], ACC)
    last_key = _last_seen(first, q_tokens, shift, k_tokens, BM, CAUSAL)
    for column in range(0, tl.minimum(width, last_key - first_key), BN):
        columns = column + tl.arange(0, BN)
        j = first_key + columns
        y_rows = k_begin + j
        y_keep = kept(key_mask, batch, y_rows, j < k_tokens)
        if grad_panel_ptr is not None:
            at_panel = (place * BM + tl.arange(0, BM))[:, None] * width + columns[None, :]
            tile = tl.load(grad_panel_ptr + at_panel)  # [BM, BN]
        else:
            _, tile = _gradients_of_scores(
                q, k, v, gate, bias, g, (scale, bias_scale, out_scale), (a_ptr, b_ptr, c_ptr, sums_ptr, delta_ptr),
                heads, batch, head, kv_head, i, j, rows, y_rows, at, inside, keep, y_keep, shift, S, E, F, CAUSAL, BS,
                BD, ACC, DOT, PRECISION,
            )  # fmt: skip
        keys = load_rows(k, batch, y_rows, y_keep, kv_head, dims, S).to(DOT)  # [BN, BK]
        total = add_product(total, tile, keys, DOT, ACC, PRECISION)
    total = tl.where(keep[:, None], total * by_row(scale, a_ptr, at, inside, ACC)[:, None], 0)
    if carry[0] is not None:
        if is_first == 0:
            total += load_rows(carry, batch, rows, inside, head, dims, S)
        if is_last == 0:
            store_rows(carry, batch, rows, inside, head, dims, total, S)
    if is_last != 0:
        store_rows(grad_q, batch, rows, inside, head, dims, total, S)


@triton.jit(
    do_not_specialize=["n_q", "n_k", "heads", "sequences", "blocks", "first_head", "rows_of_heads", "first_key"]
)
def gau_bias_kernel(
    grad_panel_ptr, b_ptr, grad_bias, ends, n_q, n_k, heads, sequences, blocks, first_head, rows_of_heads, first_key,
    width, bias_scale: tl.float64, CAUSAL: tl.constexpr, SHARED: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
    BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: what a panel adds to the gradients of a block of distances, of one bias."""
    pid = tl.program_id(0).to(tl.int64)
    distances = tl.cdiv(grad_bias[3], BR)
    bias_head = pid // distances
    lowest = (pid % distances).to(tl.int32) * BR - grad_bias[3] // 2
    r = lowest + tl.arange(0, BR)
    total = tl.zeros([BR], ACC)
    for h in range(rows_of_heads):
        place = tl.full([], 0, tl.int64) + h
        head = (first_head + place) % heads
        batch = (first_head + place) // heads
        if SHARED or head == bias_head:
            first_n, last_n = batch, batch + 1
            if ends[0] is not None:
                first_n, last_n = batch * 0, batch * 0 + sequences
            for n in range(first_n, last_n):
                q_begin, q_tokens = rows_of(ends[0], n, n_q)
                _, k_tokens = rows_of(ends[1], n, n_k)
                shift = k_tokens - q_tokens
                last_key = tl.minimum(first_key + width, k_tokens)
                origin = (place * blocks + first_block(ends[0], n, n_q, BM, BM)) * BM
                begin = tl.maximum(first_key - shift - lowest - BR + 1, 0)
                for start in range(begin, tl.minimum(last_key - shift - lowest, q_tokens), BI):
                    i = start + tl.arange(0, BI)
                    j = (i + shift)[:, None] + r[None, :]  # [BI, BR]
                    known = (i < q_tokens)[:, None] & (j >= first_key) & (j < last_key)
                    if CAUSAL:
                        known &= (r <= 0)[None, :]
                    at_panel = (origin + i)[:, None] * width + (j - first_key)
                    grads = tl.load(grad_panel_ptr + at_panel, mask=known, other=0).to(ACC)
                    b = by_row(bias_scale, b_ptr, batch * n_q + q_begin + i, i < q_tokens, ACC)
                    total += tl.sum(grads * b[:, None], 0)
    at = grad_bias[0] + bias_head * grad_bias[1] + (r + grad_bias[3] // 2) * grad_bias[2]
    real = r <= grad_bias[3] // 2
    tl.store(at, tl.load(at, mask=real, other=0) + total, mask=real)
