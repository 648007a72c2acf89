"""The Triton kernels, in the names of the README. Imported on first use, with triton.

A tensor is (pointer, strides). A segment is `span` tokens of a sequence: a chunk, or several small ones (SEVERAL). i
and j count the tokens of a segment from its first. A panel has weights, or their gradients, of every token,
[B, n, H, width], from j = `first_key` on. States are [segments of all sequences, H_k, s, e].
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
    kept,
    load_factors,
    load_rows,
    multiply,
    narrow,
    rows_of,
    score,
    slope,
    store_outputs,
    store_rows,
)


@triton.jit
def _first_state(ends_ptr, n, length, places, span):
    """The place of the state of sequence n's first segment."""
    if ends_ptr is None:
        return (n * places).to(tl.int64)
    else:
        return first_block(ends_ptr, n, length, span, span)


@triton.jit
def _segment(block, ends_ptr, batch, length, sequences, places, span, BLOCK):
    """Of a block of a head: the place of its segment's state, and which segment of the sequence it is; the row where
    that begins, and how many of the sequence's are from there on; and the block's first token, counted from there."""
    n = batch
    block = block.to(tl.int32)
    if ends_ptr is not None:
        n, block = find(ends_ptr, block, sequences, length, span, BLOCK)
    begin, tokens = rows_of(ends_ptr, n, length)
    blocks = (span - 1) // BLOCK + 1
    index = block // blocks
    state = _first_state(ends_ptr, n, length, places, span) + index
    left = tl.where(block >= 0, tokens - index * span, 0)
    return state, index, begin + index * span, left, block % blocks * BLOCK


@triton.jit
def _last_seen(first, tokens, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys of its segment a block of queries sees."""
    if CAUSAL:
        return tl.minimum(first + BM, tokens)
    return tokens


@triton.jit
def _of_batch(by_row_ptr, batch, n):
    """Where the rows of a batch entry begin."""
    if by_row_ptr is None:
        return None
    else:
        return by_row_ptr + batch * n


@triton.jit
def _number(x, ACC: tl.constexpr):
    return (tl.full([], 1.0, ACC) * x).to(ACC)


@triton.jit
def _near(i, j, chunk):
    """[i, j]: which are of one chunk."""
    return (i // chunk)[:, None] == (j // chunk)[None, :]


@triton.jit
def _panel_rows(batch, rows, n, heads, head, width):
    """[rows, 1]: where rows of a panel begin."""
    return ((batch * n + rows) * heads + head)[:, None] * width


@triton.jit
def _through_state(
    reached, x, gate, states_ptr, state, index, kv_head, kv_heads, batch, rows, keep, head, dims, OF_KEYS: tl.constexpr,
    S: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of x, times the gate where there is one, through what their segment takes of states [s, e]: from s to
    columns of e if OF_KEYS, else from e to columns of s; 0 where it takes nothing."""
    total = tl.zeros([rows.shape[0], dims.shape[0]], ACC)
    if states_ptr is not None and reached:
        place = state if CAUSAL else state - index
        taken = states_ptr + (place * kv_heads + kv_head) * S * E
        if OF_KEYS:
            total = multiply(
                x, gate, (taken, 0, 1, 0, E), batch, rows, keep, head, dims, dims < E, 0, S, BD, ACC, DOT, PRECISION
            )  # fmt: skip
        else:
            total = multiply(
                x, gate, (taken, 0, E, 0, 1), batch, rows, keep, head, dims, dims < S, 0, E, BD, ACC, DOT, PRECISION
            )  # fmt: skip
    return total


@triton.jit
def _weights(
    quad_q, quad_k, lin_q, lin_k, bias, factors, pointers, batch, head, kv_head, i, j, rows, y_rows, at, inside, keep,
    y_keep, chunk, S: tl.constexpr, F: tl.constexpr, CAUSAL: tl.constexpr, SEVERAL: tl.constexpr, BS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What values are multiplied with [i, j]: c P, and between small chunks of a segment d q′·k′; what the gradients of
    that are multiplied with for those of x, or of q′·k′; and where there are any."""
    products = multiply(
        quad_q, (None,), quad_k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION
    )  # fmt: skip
    a = by_row(factors[0], pointers[0], at, inside, ACC)
    b = by_row(factors[1], pointers[1], at, inside, ACC)
    c = by_row(factors[2], pointers[2], at, inside, ACC)[:, None]
    x, seen = score(products, i, j, keep, y_keep, a, b, bias, head, 0, CAUSAL)
    near = seen
    if SEVERAL:
        near = seen & _near(i, j, chunk)
    weights = tl.where(near, activate(x, F) * c, 0)
    slopes = slope(x, F) * c
    if SEVERAL and CAUSAL:
        d = by_row(factors[3], pointers[3], at, inside, ACC)[:, None]
        linear = multiply(
            lin_q, (None,), lin_k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION
        )  # fmt: skip
        weights = tl.where(seen & ~near, linear * d, weights)
        slopes = tl.where(near, slopes, d)
    else:
        seen = near
    return weights, slopes, seen


@triton.jit
def _add_outer_products(
    total, x, factor_ptr, y, gate, mask, batch, head, begin, tokens, x_dims, y_dims, S: tl.constexpr, E: tl.constexpr,
    BR: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [x_dims, y_dims] + Σ over rows of x yᵀ, y times the gate and x times a number [rows] where these are."""
    for start in range(0, tokens, BR):
        i = start + tl.arange(0, BR)
        rows = begin + i
        keep = kept(mask, batch, rows, i < tokens)
        left = load_factors(x, (None,), factor_ptr, batch, rows, keep, head, x_dims, S, ACC, DOT, PRECISION)
        right = load_factors(y, gate, None, batch, rows, keep, head, y_dims, E, ACC, DOT, PRECISION)
        total = add_product(total, tl.trans(left), right, DOT, ACC, PRECISION)
    return total


@triton.jit(do_not_specialize=["batches", "n", "heads", "sequences", "places", "span"])
def mixed_states_kernel(
    lin_q, lin_k, v, gate, g, d_ptr, query_mask, key_mask, ends_ptr, s_ptr, u_ptr, batches, n, heads, sequences,
    places, span, lin_scale: tl.float64, S: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, S_SLICES: tl.constexpr, E_SLICES: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of a segment's own S, or where there are gradients g of its own U."""
    pid = tl.program_id(0).to(tl.int64)
    x_dims = (pid % S_SLICES).to(tl.int32) * BK + tl.arange(0, BK)
    y_dims = (pid // S_SLICES % E_SLICES).to(tl.int32) * BE + tl.arange(0, BE)
    unit = pid // (S_SLICES * E_SLICES)
    kv_heads = heads // GROUP
    kv_head = unit % kv_heads
    batch = unit // kv_heads // places % batches
    of_gradients = unit // kv_heads // places >= batches
    state, index, begin, left, _ = _segment(
        unit // kv_heads % places, ends_ptr, batch, n, sequences, places, span, span
    )  # fmt: skip
    tokens = tl.minimum(left, span)
    if tokens <= 0:
        return
    at = ((state * kv_heads + kv_head) * S + x_dims)[:, None] * E + y_dims[None, :]
    real = (x_dims < S)[:, None] & (y_dims < E)[None, :]
    total = tl.zeros([BK, BE], ACC)
    if not of_gradients:
        if not CAUSAL or left > span:  # nothing comes after the last
            total = _add_outer_products(
                total, lin_k, None, v, (None,), key_mask, batch, kv_head, begin, tokens, x_dims, y_dims, S, E, BR, ACC,
                DOT, PRECISION,
            )  # fmt: skip
            tl.store(s_ptr + at, total, mask=real)
    elif u_ptr is not None and (not CAUSAL or index > 0):
        for h in range(GROUP):
            total = _add_outer_products(
                total, lin_q, _of_batch(d_ptr, batch, n), g, gate, query_mask, batch, kv_head * GROUP + h, begin,
                tokens, x_dims, y_dims, S, E, BR, ACC, DOT, PRECISION,
            )  # fmt: skip
        tl.store(u_ptr + at, total * _number(lin_scale, ACC), mask=real)


@triton.jit(do_not_specialize=["batches", "n", "heads", "sequences", "places", "span"])
def mixed_chain_kernel(
    states_ptr, sums_ptr, ends_ptr, batches, n, heads, sequences, places, span, S: tl.constexpr, E: tl.constexpr,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a part of what the segments of a sequence take of S, or behind that of U: the sum over those before,
    or after; or if not causal over all, at the place of the first."""
    pid = tl.program_id(0).to(tl.int64)
    size = heads // GROUP * S * E  # numbers of the states of a segment
    parts = tl.cdiv(size, BLOCK)
    numbers = pid % parts * BLOCK + tl.arange(0, BLOCK)
    sequence = (pid // parts % sequences).to(tl.int32)
    reverse = pid // parts >= sequences
    _, tokens = rows_of(ends_ptr, sequence, n)
    count = tl.cdiv(tokens, span)
    first = _first_state(ends_ptr, sequence, n, places, span) + tl.where(reverse, batches, 0).to(tl.int64) * places
    total = tl.zeros([BLOCK], ACC)
    known = count - 1 if CAUSAL else count  # nothing comes after the last
    for m in range(count):
        at = (first + tl.where(reverse, count - 1 - m, m)) * size + numbers
        own = tl.load(states_ptr + at, mask=(numbers < size) & (m < known), other=0)
        if CAUSAL:
            tl.store(sums_ptr + at, narrow(total, DOT, PRECISION), mask=(numbers < size) & (m > 0))
        total += own
    if not CAUSAL:
        tl.store(sums_ptr + first * size + numbers, narrow(total, DOT, PRECISION), mask=(numbers < size) & (count > 0))


@triton.jit(do_not_specialize=["n", "heads", "sequences", "blocks", "places", "span", "chunk"])
def mixed_attention_kernel(
    quad_q, quad_k, lin_q, lin_k, v, gate, bias, a_ptr, b_ptr, c_ptr, d_ptr, query_mask, key_mask, ends_ptr, s_ptr, out,
    ungated, n, heads, sequences, blocks, places, span, chunk, scale: tl.float64, bias_scale: tl.float64,
    out_scale: tl.float64, lin_scale: tl.float64, S: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
    CAUSAL: tl.constexpr, SEVERAL: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the outputs' columns, for a block of tokens; P is made here."""
    pid = tl.program_id(0).to(tl.int64)
    first_column = (pid % SLICES).to(tl.int32) * BE
    unit = pid // SLICES
    head = unit // blocks % heads
    batch = unit // blocks // heads
    state, index, begin, left, first = _segment(
        unit % blocks, ends_ptr, batch, n, sequences, places, span, BM
    )  # fmt: skip
    tokens = tl.minimum(left, span)
    if first >= tokens:
        return
    i = first + tl.arange(0, BM)
    inside = i < tokens
    rows = begin + i
    keep = kept(query_mask, batch, rows, inside)
    at = batch * n + rows
    kv_head = head // GROUP
    dims = first_column + tl.arange(0, BE)
    factors = (scale, bias_scale, out_scale, lin_scale)
    pointers = (a_ptr, b_ptr, c_ptr, d_ptr)

    total = _through_state(
        not CAUSAL or index > 0, lin_q, (None,), s_ptr, state, index, kv_head, heads // GROUP, batch, rows, keep, head,
        dims, True, S, E, CAUSAL, BS, ACC, DOT, PRECISION,
    )  # fmt: skip
    total *= by_row(lin_scale, d_ptr, at, inside, ACC)[:, None]
    for key in range(0, _last_seen(first, tokens, BM, CAUSAL), BN):
        j = key + tl.arange(0, BN)
        y_rows = begin + j
        y_keep = kept(key_mask, batch, y_rows, j < tokens)
        weights, _, _ = _weights(
            quad_q, quad_k, lin_q, lin_k, bias, factors, pointers, batch, head, kv_head, i, j, rows, y_rows, at, inside,
            keep, y_keep, chunk, S, F, CAUSAL, SEVERAL, BS, ACC, DOT, PRECISION,
        )  # fmt: skip
        values = load_rows(v, batch, y_rows, y_keep, kv_head, dims, E).to(DOT)  # [BN, BE]
        total = add_product(total, narrow(weights, DOT, PRECISION), values, DOT, ACC, PRECISION)
    total = tl.where(keep[:, None], total, 0)
    store_outputs(out, ungated, gate, batch, rows, keep, inside, head, first_column, total, E, BM, BE, ACC)


@triton.jit(do_not_specialize=["n", "heads", "sequences", "blocks", "places", "span", "chunk", "first_key"])
def mixed_scores_kernel(
    quad_q, quad_k, lin_q, lin_k, v, gate, g, bias, a_ptr, b_ptr, c_ptr, d_ptr, query_mask, key_mask, ends_ptr,
    panel_ptr, grad_panel_ptr, n, heads, sequences, blocks, places, span, chunk, first_key, width,
    scale: tl.float64, bias_scale: tl.float64, out_scale: tl.float64, lin_scale: tl.float64, S: tl.constexpr,
    E: tl.constexpr, F: tl.constexpr, CAUSAL: tl.constexpr, SEVERAL: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: P and X of a panel, for a block of tokens and one of keys."""
    pid = tl.program_id(0).to(tl.int64)
    key_blocks = width // BN
    column = (pid % key_blocks).to(tl.int32) * BN
    unit = pid // key_blocks
    head = unit // blocks % heads
    batch = unit // blocks // heads
    _, _, begin, left, first = _segment(unit % blocks, ends_ptr, batch, n, sequences, places, span, BM)
    tokens = tl.minimum(left, span)
    key = first_key + column
    if first >= tokens or key >= _last_seen(first, tokens, BM, CAUSAL):
        return
    i = first + tl.arange(0, BM)
    inside = i < tokens
    rows = begin + i
    keep = kept(query_mask, batch, rows, inside)
    at = batch * n + rows
    j = key + tl.arange(0, BN)
    y_rows = begin + j
    y_keep = kept(key_mask, batch, y_rows, j < tokens)
    kv_head = head // GROUP
    of_weights = multiply(g, gate, v, batch, rows, keep, head, y_rows, y_keep, kv_head, E, BD, ACC, DOT, PRECISION)
    weights, slopes, seen = _weights(
        quad_q, quad_k, lin_q, lin_k, bias, (scale, bias_scale, out_scale, lin_scale), (a_ptr, b_ptr, c_ptr, d_ptr),
        batch, head, kv_head, i, j, rows, y_rows, at, inside, keep, y_keep, chunk, S, F, CAUSAL, SEVERAL, BS, ACC,
        DOT, PRECISION,
    )  # fmt: skip
    grads = tl.where(seen, slopes * of_weights, 0)
    to = _panel_rows(batch, rows, n, heads, head, width) + (column + tl.arange(0, BN))[None, :]
    tl.store(panel_ptr + to, narrow(weights, DOT, PRECISION), mask=inside[:, None])
    tl.store(grad_panel_ptr + to, narrow(grads, DOT, PRECISION), mask=inside[:, None])


@triton.jit
def _sum_over_queries(
    total, panel_ptr, x, gate, factor_ptr, query_mask, batch, kv_head, n, heads, begin, tokens, key, first_key, width,
    chunk, dims, WHICH: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BN, dims] + Σ over queries of a panel's tile and rows of x, times the gate and a number where they are."""
    column = tl.multiple_of(key - first_key, BN)
    for h in range(GROUP):
        head = kv_head * GROUP + h
        for start in range(key if CAUSAL else 0, tokens, BR):
            i = start + tl.arange(0, BR)
            inside = i < tokens
            rows = begin + i
            keep = kept(query_mask, batch, rows, inside)
            at = _panel_rows(batch, rows, n, heads, head, width) + (column + tl.arange(0, BN))[None, :]
            tile = tl.load(panel_ptr + at, mask=inside[:, None], other=0)  # [BR, BN]
            if WHICH != "all":
                near = _near(i, key + tl.arange(0, BN), chunk)
                tile = tl.where(near if WHICH == "near" else ~near, tile, 0)
            right = load_factors(x, gate, factor_ptr, batch, rows, keep, head, dims, D, ACC, DOT, PRECISION)
            total = add_product(total, tl.trans(tile), right, DOT, ACC, PRECISION)
    return total


@triton.jit(do_not_specialize=["n", "heads", "sequences", "blocks", "places", "span", "chunk", "first_key"])
def mixed_keys_kernel(
    quad_q, lin_q, lin_k, v, gate, g, a_ptr, query_mask, key_mask, ends_ptr, u_ptr, panel_ptr, grad_panel_ptr,
    grad_quad_k, grad_lin_k, grad_v, n, heads, sequences, blocks, places, span, chunk, first_key, width,
    scale: tl.float64, S: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr, SEVERAL: tl.constexpr,
    GROUP: tl.constexpr, S_SLICES: tl.constexpr, E_SLICES: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the gradients of a block of values, of linear keys or of the others, of a panel."""
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % (E_SLICES + 2 * S_SLICES)).to(tl.int32)
    unit = pid // (E_SLICES + 2 * S_SLICES)
    kv_heads = heads // GROUP
    kv_head = unit // blocks % kv_heads
    batch = unit // blocks // kv_heads
    state, index, begin, left, key = _segment(unit % blocks, ends_ptr, batch, n, sequences, places, span, BN)
    tokens = tl.minimum(left, span)
    if key < first_key or key >= tl.minimum(first_key + width, tokens):
        return
    j = key + tl.arange(0, BN)
    y_inside = j < tokens
    y_rows = begin + j
    y_keep = kept(key_mask, batch, y_rows, y_inside)
    after = not CAUSAL or left > span  # whether the sequence has segments that see these keys
    if part < E_SLICES:
        dims = part * BE + tl.arange(0, BE)
        total = _through_state(
            after, lin_k, (None,), u_ptr, state, index, kv_head, kv_heads, batch, y_rows, y_keep, kv_head, dims, True,
            S, E, CAUSAL, BS, ACC, DOT, PRECISION,
        )  # fmt: skip
        total = _sum_over_queries(
            total, panel_ptr, g, gate, None, query_mask, batch, kv_head, n, heads, begin, tokens, key, first_key, width,
            chunk, dims, "all", E, CAUSAL, GROUP, BN, BR, ACC, DOT, PRECISION,
        )  # fmt: skip
        store_rows(grad_v, batch, y_rows, y_inside, kv_head, dims, tl.where(y_keep[:, None], total, 0), E)
    elif part < E_SLICES + S_SLICES:
        dims = (part - E_SLICES) * BK + tl.arange(0, BK)
        total = _through_state(
            after, v, (None,), u_ptr, state, index, kv_head, kv_heads, batch, y_rows, y_keep, kv_head, dims, False, S,
            E, CAUSAL, BD, ACC, DOT, PRECISION,
        )  # fmt: skip
        if SEVERAL and CAUSAL:
            total = _sum_over_queries(
                total, grad_panel_ptr, lin_q, (None,), None, query_mask, batch, kv_head, n, heads, begin, tokens, key,
                first_key, width, chunk, dims, "far", S, CAUSAL, GROUP, BN, BR, ACC, DOT, PRECISION,
            )  # fmt: skip
        store_rows(grad_lin_k, batch, y_rows, y_inside, kv_head, dims, tl.where(y_keep[:, None], total, 0), S)
    else:
        dims = (part - E_SLICES - S_SLICES) * BK + tl.arange(0, BK)
        total = _sum_over_queries(
            tl.zeros([BN, BK], ACC), grad_panel_ptr, quad_q, (None,), _of_batch(a_ptr, batch, n), query_mask, batch,
            kv_head, n, heads, begin, tokens, key, first_key, width, chunk, dims,
            "near" if SEVERAL and CAUSAL else "all", S, CAUSAL, GROUP, BN, BR, ACC, DOT, PRECISION,
        )  # fmt: skip
        total = tl.where(y_keep[:, None], total * _number(scale, ACC), 0)
        store_rows(grad_quad_k, batch, y_rows, y_inside, kv_head, dims, total, S)


@triton.jit
def _sum_over_keys(
    total, panel_ptr, k, key_mask, batch, head, kv_head, n, heads, i, rows, inside, begin, tokens, first_key, width,
    last_key, chunk, dims, WHICH: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total [i, dims] + Σ over keys of a panel's tile and rows of k."""
    for column in range(0, tl.minimum(width, last_key - first_key), BN):
        columns = column + tl.arange(0, BN)
        j = first_key + columns
        y_rows = begin + j
        y_keep = kept(key_mask, batch, y_rows, j < tokens)
        at = _panel_rows(batch, rows, n, heads, head, width) + columns[None, :]
        tile = tl.load(panel_ptr + at, mask=inside[:, None], other=0)  # [BM, BN]
        if WHICH != "all":
            near = _near(i, j, chunk)
            tile = tl.where(near if WHICH == "near" else ~near, tile, 0)
        keys = load_rows(k, batch, y_rows, y_keep, kv_head, dims, S).to(DOT)  # [BN, dims]
        total = add_product(total, tile, keys, DOT, ACC, PRECISION)
    return total


@triton.jit(
    do_not_specialize=[
        "n", "heads", "sequences", "blocks", "places", "span", "chunk", "first_key", "is_first", "is_last"
    ]
)  # fmt: skip
def mixed_queries_kernel(
    quad_k, lin_k, gate, g, a_ptr, d_ptr, query_mask, key_mask, ends_ptr, s_ptr, grad_panel_ptr, carry, grad_quad_q,
    grad_lin_q, n, heads, sequences, blocks, places, span, chunk, first_key, width, is_first, is_last,
    scale: tl.float64, lin_scale: tl.float64, S: tl.constexpr, E: tl.constexpr, CAUSAL: tl.constexpr,
    SEVERAL: tl.constexpr, GROUP: tl.constexpr, S_SLICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the gradients of a block of linear queries, or what a panel adds to those of others."""
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % (2 * S_SLICES)).to(tl.int32)
    unit = pid // (2 * S_SLICES)
    head = unit // blocks % heads
    batch = unit // blocks // heads
    state, index, begin, left, first = _segment(
        unit % blocks, ends_ptr, batch, n, sequences, places, span, BM
    )  # fmt: skip
    tokens = tl.minimum(left, span)
    if first >= tokens:
        return
    i = first + tl.arange(0, BM)
    inside = i < tokens
    rows = begin + i
    keep = kept(query_mask, batch, rows, inside)
    at = batch * n + rows
    kv_head = head // GROUP
    dims = part % S_SLICES * BK + tl.arange(0, BK)
    last_key = _last_seen(first, tokens, BM, CAUSAL)
    if part < S_SLICES:
        if is_first == 0:
            return
        total = _through_state(
            not CAUSAL or index > 0, g, gate, s_ptr, state, index, kv_head, heads // GROUP, batch, rows, keep, head,
            dims, False, S, E, CAUSAL, BD, ACC, DOT, PRECISION,
        )  # fmt: skip
        total *= by_row(lin_scale, d_ptr, at, inside, ACC)[:, None]
        if SEVERAL and CAUSAL:
            total = _sum_over_keys(
                total, grad_panel_ptr, lin_k, key_mask, batch, head, kv_head, n, heads, i, rows, inside, begin, tokens,
                first_key, width, last_key, chunk, dims, "far", S, BN, ACC, DOT, PRECISION,
            )  # fmt: skip
        store_rows(grad_lin_q, batch, rows, inside, head, dims, tl.where(keep[:, None], total, 0), S)
    else:
        total = _sum_over_keys(
            tl.zeros([BM, BK], ACC), grad_panel_ptr, quad_k, key_mask, batch, head, kv_head, n, heads, i, rows, inside,
            begin, tokens, first_key, width, last_key, chunk, dims, "near" if SEVERAL and CAUSAL else "all", S, BN, ACC,
            DOT, PRECISION,
        )  # fmt: skip
        total = tl.where(keep[:, None], total * by_row(scale, a_ptr, at, inside, ACC)[:, None], 0)
        if carry[0] is not None:
            if is_first == 0:
                total += load_rows(carry, batch, rows, inside, head, dims, S)
            if is_last == 0:
                store_rows(carry, batch, rows, inside, head, dims, total, S)
        if is_last != 0:
            store_rows(grad_quad_q, batch, rows, inside, head, dims, total, S)


@triton.jit(
    do_not_specialize=[
        "n", "heads", "sequences", "places", "units", "share", "bias_heads", "span", "chunk", "first_key"
    ]
)  # fmt: skip
def mixed_bias_kernel(
    grad_panel_ptr, b_ptr, sums_ptr, ends_ptr, n, heads, sequences, places, units, share, bias_heads,
    distances, span, chunk, first_key, width, bias_scale: tl.float64, CAUSAL: tl.constexpr, SEVERAL: tl.constexpr,
    BI: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: what a panel's share of segments adds to the gradients of a block of distances, of one bias."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(distances, BR)
    lowest = (pid % blocks).to(tl.int32) * BR - distances // 2
    bias_head = pid // blocks % bias_heads
    part = pid // blocks // bias_heads
    r = lowest + tl.arange(0, BR)
    own_heads = heads // bias_heads
    total = tl.zeros([BR], ACC)
    for unit in range(part * share, tl.minimum(part * share + share, units)):
        head = bias_head * own_heads + unit // places % own_heads
        batch = unit // places // own_heads
        _, _, begin, left, _ = _segment(unit % places, ends_ptr, batch, n, sequences, places, span, span)
        tokens = tl.minimum(left, span)
        last_key = tl.minimum(first_key + width, tokens)
        for start in range(tl.maximum(first_key - lowest - BR + 1, 0), tl.minimum(last_key - lowest, tokens), BI):
            i = start + tl.arange(0, BI)
            j = i[:, None] + r[None, :]  # [BI, BR]
            known = (i < tokens)[:, None] & (j >= first_key) & (j < last_key)
            if CAUSAL:
                known &= (r <= 0)[None, :]
            if SEVERAL:
                known &= (i // chunk)[:, None] == j // chunk
            at = _panel_rows(batch, begin + i, n, heads, head, width) + (j - first_key)
            grads = tl.load(grad_panel_ptr + at, mask=known, other=0).to(ACC)
            b = by_row(bias_scale, b_ptr, batch * n + begin + i, i < tokens, ACC)
            total += tl.sum(grads * b[:, None], 0)
    real = r <= distances // 2
    to = sums_ptr + (part * bias_heads + bias_head) * distances + r + distances // 2
    tl.store(to, tl.load(to, mask=real, other=0) + total, mask=real)
