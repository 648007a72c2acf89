"""The Triton kernels, in the names of the README. Imported on first use, with triton.

A tensor is (pointer, strides). i and j count the queries and keys of a sequence from its first. A panel is a part of P,
and backward of X, in a workspace: blocks of BM queries, one unit after the other, by `width` keys from `first_key` on.
Units count blocks of queries, head by head; those of packed sequences go by `_find`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(x, batch, rows, keep, head, dims, D: tl.constexpr):
    """[rows, dims] of x, 0 where there is none."""
    at = x[0] + batch * x[1] + rows[:, None] * x[2] + head * x[3] + dims[None, :] * x[4]
    return tl.load(at, mask=keep[:, None] & (dims < D)[None, :], other=0)


@triton.jit
def _store_rows(x, batch, rows, keep, head, dims, values, D: tl.constexpr):
    at = x[0] + batch * x[1] + rows[:, None] * x[2] + head * x[3] + dims[None, :] * x[4]
    tl.store(at, values.to(x[0].dtype.element_ty), mask=keep[:, None] & (dims < D)[None, :])


@triton.jit
def _narrow(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x as products take it: in tf32, rounded to the 11 bits that they look at."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DOT)


@triton.jit
def _load_factors(
    x, gate, factor_ptr, batch, rows, keep, head, dims, D: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[rows, dims] of x as products take it, times the gate and a number [rows] where these are."""
    values = _load_rows(x, batch, rows, keep, head, dims, D)
    if gate[0] is not None:
        values = values.to(ACC) * _load_rows(gate, batch, rows, keep, head, dims, D).to(ACC)
    if factor_ptr is not None:
        values = values.to(ACC) * tl.load(factor_ptr + rows, mask=keep, other=0)[:, None]
    if gate[0] is not None or factor_ptr is not None:
        values = _narrow(values, DOT, PRECISION)
    return values.to(DOT)


@triton.jit
def _add_product(total, x, y, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """total + x·y. Tensor cores cut off what they add to a long sum: float32 and float16 would notice, bfloat16 not."""
    if tl.bfloat16 == DOT:
        return tl.dot(x, y, acc=total, input_precision=PRECISION, out_dtype=ACC)
    else:
        return total + tl.dot(x, y, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _products(
    x, gate, y, batch, rows, keep, head, y_rows, y_keep, kv_head, D: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x·y [rows, y_rows], x times the gate where there is one."""
    total = tl.zeros([rows.shape[0], y_rows.shape[0]], ACC)
    for d in range(0, D, BD):
        dims = d + tl.arange(0, BD)
        left = _load_factors(x, gate, None, batch, rows, keep, head, dims, D, ACC, DOT, PRECISION)
        right = _load_rows(y, batch, y_rows, y_keep, kv_head, dims, D).to(DOT)
        total = _add_product(total, left, tl.trans(right), DOT, ACC, PRECISION)
    return total


@triton.jit
def _begin(ends_ptr, n, length):
    """The first row of packed sequence n, and nothing outside the tensor."""
    return tl.minimum(tl.maximum(tl.load(ends_ptr + n), 0), length)


@triton.jit
def _rows(ends_ptr, n, length):
    """Where the rows of sequence n begin, and how many there are."""
    if ends_ptr is None:
        return tl.full([], 0, tl.int64), length
    else:
        begin = _begin(ends_ptr, n, length)
        return begin.to(tl.int64), tl.maximum(_begin(ends_ptr, n + 1, length) - begin, 0)


@triton.jit
def _first_block(ends_ptr, n, length, BLOCK: tl.constexpr):
    """The place of the first block of sequence n among those of a head.

    A packed sequence has all up to the next one's: never fewer than its rows need, maybe one more.
    """
    if ends_ptr is None:
        return tl.full([], 0, tl.int64)
    else:
        return (_begin(ends_ptr, n, length) // BLOCK + n).to(tl.int64)


@triton.jit
def _find(ends_ptr, block, sequences, length, BLOCK: tl.constexpr):
    """The packed sequence that a block of a head is of, and its place there."""
    low, high = sequences * 0, sequences - 1  # the last sequence that begins no later
    while low < high:
        middle = (low + high + 1) // 2
        if _first_block(ends_ptr, middle, length, BLOCK) <= block:
            low = middle
        else:
            high = middle - 1
    return low, (block - _first_block(ends_ptr, low, length, BLOCK)).to(tl.int32)


@triton.jit
def _query_block(unit, blocks, ends, n_q, n_k, heads, sequences, BM: tl.constexpr):
    """batch, head; how many queries the sequence has, where its keys begin, how many there are; the first query of the
    block, and [BM] all i, their rows, and which of them there are."""
    head = unit // blocks % heads
    batch = unit // blocks // heads
    n, block = batch, (unit % blocks).to(tl.int32)
    if ends[0] is not None:
        n, block = _find(ends[0], block, sequences, n_q, BM)
    q_begin, q_tokens = _rows(ends[0], n, n_q)
    k_begin, k_tokens = _rows(ends[1], n, n_k)
    first = block * BM
    i = first + tl.arange(0, BM)
    return batch, head, q_tokens, k_begin, k_tokens, first, i, q_begin + i, i < q_tokens


@triton.jit
def _kept(mask, batch, rows, inside):
    """[rows]: which are no padding."""
    if mask[0] is not None:
        inside &= tl.load(mask[0] + batch * mask[1] + rows * mask[2], mask=inside, other=0) != 0
    return inside


@triton.jit
def _by_row(number, factor_ptr, at, inside, ACC: tl.constexpr):
    """A number, and one for each row `at` [rows] where there are such."""
    x = (tl.full(at.shape, 1.0, ACC) * number).to(ACC)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + at, mask=inside, other=0)
    return x


@triton.jit
def _inverse(x):
    return tl.where(x != 0, 1 / tl.where(x != 0, x, 1.0), 0.0)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first columns, and the others."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _scores(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL: tl.constexpr):
    """x [i, j] from q·k, and which of them count."""
    apart = j[None, :] - (i + shift)[:, None]
    seen = keep[:, None] & y_keep[None, :]
    if CAUSAL:
        seen &= apart <= 0
    x = products * a[:, None]
    if bias[0] is not None:
        at = apart + bias[3] // 2
        known = seen & (at >= 0) & (at < bias[3])
        x += b[:, None] * tl.load(bias[0] + head * bias[1] + at * bias[2], mask=known, other=0)
    return x, seen


@triton.jit
def _activate(x, F: tl.constexpr):
    """f(x)."""
    if F == "relu2":
        return tl.maximum(x, 0) * tl.maximum(x, 0)
    elif F == "relu":
        return tl.maximum(x, 0)
    elif F == "silu":
        return x / (1 + tl.exp(-x))
    elif F == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    elif F == "laplace":
        return 0.5 * (1 + tl.erf((x - 0.7071067811865476) * 2.5066282746310002))
    else:
        return x


@triton.jit
def _slope(x, F: tl.constexpr):
    """f′(x)."""
    if F == "relu2":
        return 2 * tl.maximum(x, 0)
    elif F == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif F == "silu":
        sigma = 1 / (1 + tl.exp(-x))
        return sigma * (1 + x * (1 - sigma))
    elif F == "sigmoid":
        sigma = 1 / (1 + tl.exp(-x))
        return sigma * (1 - sigma)
    elif F == "laplace":
        apart = x - 0.7071067811865476
        return 1.4142135623730951 * tl.exp(-6.283185307179586 * apart * apart)
    else:
        return tl.full(x.shape, 1.0, x.dtype)


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
        return _inverse(tl.load(sums_ptr + at * heads + head, mask=inside, other=0))
    else:
        return _by_row(out_scale, c_ptr, at, inside, ACC)


@triton.jit
def _gradients_of_scores(
    q, k, v, gate, bias, g, factors, pointers, heads, batch, head, kv_head, i, j, rows, y_rows, at, inside, keep,
    y_keep, shift, S: tl.constexpr, E: tl.constexpr, F: tl.constexpr, CAUSAL: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c·P and X [i, j], as products take them."""
    d = _products(g, gate, v, batch, rows, keep, head, y_rows, y_keep, kv_head, E, BD, ACC, DOT, PRECISION)
    products = _products(q, (None,), k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION)
    a = _by_row(factors[0], pointers[0], at, inside, ACC)
    b = _by_row(factors[1], pointers[1], at, inside, ACC)
    c = _inverse_of_normalizer(factors[2], pointers[2], pointers[3], head, heads, at, inside, ACC)
    x, seen = _scores(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
    d *= c[:, None]
    if pointers[4] is not None:
        d -= tl.load(pointers[4] + at * heads + head, mask=inside, other=0)[:, None]
    weights = tl.where(seen, _activate(x, F) * c[:, None], 0)
    grads = tl.where(seen, _slope(x, F) * d, 0)
    return _narrow(weights, DOT, PRECISION), _narrow(grads, DOT, PRECISION)


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
    batch, head, q_tokens, k_begin, k_tokens, first, i, rows, inside = _query_block(
        unit, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    if first < 0 or first >= q_tokens:
        return
    keep = _kept(query_mask, batch, rows, inside)
    at = batch * n_q + rows
    shift = k_tokens - q_tokens
    kv_head = head // GROUP
    dims = (part * BE).to(tl.int32) + tl.arange(0, BE)
    if panel_ptr is None:
        a = _by_row(scale, a_ptr, at, inside, ACC)
        b = _by_row(bias_scale, b_ptr, at, inside, ACC)
        queries = _load_rows(q, batch, rows, keep, head, tl.arange(0, BS), S).to(DOT)  # [BM, BS]

    total = tl.zeros([BM, BE], ACC)
    sums = tl.zeros([BM], ACC)
    for key in range(0, _last_seen(first, q_tokens, shift, k_tokens, BM, CAUSAL), BN):
        j = key + tl.arange(0, BN)
        y_rows = k_begin + j
        y_keep = _kept(key_mask, batch, y_rows, j < k_tokens)
        if panel_ptr is None:
            keys = _load_rows(k, batch, y_rows, y_keep, kv_head, tl.arange(0, BS), S).to(DOT)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
            x, seen = _scores(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
            weights = _narrow(tl.where(seen, _activate(x, F), 0), DOT, PRECISION)  # [BM, BN]
        else:
            at_panel = (place * BM + tl.arange(0, BM))[:, None] * width + j[None, :]
            weights = tl.load(panel_ptr + at_panel)
        values = _load_rows(v, batch, y_rows, y_keep, kv_head, dims, E).to(DOT)  # [BN, BE]
        total = _add_product(total, weights, values, DOT, ACC, PRECISION)
        if sums_ptr is not None:
            sums += tl.sum(weights.to(ACC), 1)

    if sums_ptr is not None:
        c = _inverse(sums)
        tl.store(sums_ptr + at * heads + head, sums, mask=inside & (part == 0))
    else:
        c = _by_row(out_scale, c_ptr, at, inside, ACC)
    total = tl.where(keep[:, None], total * c[:, None], 0)
    halves = _halves(total, BM, BE)
    for quarter in tl.static_range(4):  # gates of all columns would not fit into registers beside the outputs
        columns = _halves(halves[quarter // 2], BM, BE // 2)[quarter % 2]
        dims = (part * BE + quarter * (BE // 4)).to(tl.int32) + tl.arange(0, BE // 4)
        if ungated[0] is not None:
            _store_rows(ungated, batch, rows, inside, head, dims, columns, E)
        if gate[0] is not None:
            columns *= _load_rows(gate, batch, rows, keep, head, dims, E).to(ACC)
        _store_rows(out, batch, rows, inside, head, dims, columns, E)


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
    batch, head, q_tokens, k_begin, k_tokens, first, i, rows, inside = _query_block(
        first_unit + place, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    column = (pid % key_blocks).to(tl.int32) * BN
    key = first_key + column
    shift = k_tokens - q_tokens
    if first < 0 or first >= q_tokens or key >= _last_seen(first, q_tokens, shift, k_tokens, BM, CAUSAL):
        return
    keep = _kept(query_mask, batch, rows, inside)
    at = batch * n_q + rows
    j = key + tl.arange(0, BN)
    y_rows = k_begin + j
    y_keep = _kept(key_mask, batch, y_rows, j < k_tokens)
    kv_head = head // GROUP
    at_panel = (place * BM + tl.arange(0, BM))[:, None] * width + (column + tl.arange(0, BN))[None, :]
    if grad_panel_ptr is None:
        products = _products(
            q, (None,), k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION
        )  # fmt: skip
        a = _by_row(scale, a_ptr, at, inside, ACC)
        b = _by_row(bias_scale, b_ptr, at, inside, ACC)
        x, seen = _scores(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
        tl.store(panel_ptr + at_panel, _narrow(tl.where(seen, _activate(x, F), 0), DOT, PRECISION))
    else:
        weights, grads = _gradients_of_scores(
            q, k, v, gate, bias, g, (scale, bias_scale, out_scale), (a_ptr, b_ptr, c_ptr, sums_ptr, delta_ptr), heads,
            batch, head, kv_head, i, j, rows, y_rows, at, inside, keep, y_keep, shift, S, E, F, CAUSAL, BS, BD, ACC,
            DOT, PRECISION,
        )  # fmt: skip
        tl.store(panel_ptr + at_panel, weights)
        tl.store(grad_panel_ptr + at_panel, grads)


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "sequences", "blocks"])
def gau_rows_kernel(
    g, factor, ungated, out, sums_ptr, delta_ptr, query_mask, ends, n_q, n_k, heads, sequences, blocks,
    E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows of g times a factor, and δ, their products with A by c, where sums divide."""
    unit = tl.program_id(0).to(tl.int64)
    batch, head, tokens, _, _, first, _, rows, inside = _query_block(
        unit, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    if first < 0 or first >= tokens:
        return
    keep = _kept(query_mask, batch, rows, inside)
    delta = tl.zeros([BM], ACC)
    for e in range(0, E, BE):
        dims = e + tl.arange(0, BE)
        grads = _load_rows(g, batch, rows, keep, head, dims, E).to(ACC)  # [BM, BE]
        if factor[0] is not None:
            grads *= _load_rows(factor, batch, rows, keep, head, dims, E).to(ACC)
        if out[0] is not None:
            _store_rows(out, batch, rows, inside, head, dims, grads, E)
        if delta_ptr is not None:
            delta += tl.sum(grads * _load_rows(ungated, batch, rows, keep, head, dims, E).to(ACC), 1)
    if delta_ptr is not None:
        at = (batch * n_q + rows) * heads + head
        tl.store(delta_ptr + at, delta * _inverse(tl.load(sums_ptr + at, mask=inside, other=0)), mask=inside)


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
        origin = ((pair * GROUP + h) * blocks + _first_block(ends[0], n, n_q, BM)) * BM
        for start in range(first, q_tokens, BR):
            i = start + tl.arange(0, BR)
            inside = i < q_tokens
            rows = q_begin + i
            keep = _kept(query_mask, batch, rows, inside)
            at = batch * n_q + rows
            if panel_ptr is not None:
                at_panel = (origin + i)[:, None] * width + (column + tl.arange(0, BN))[None, :]
                tile = tl.load(panel_ptr + at_panel)  # [BR, BN]
            elif VALUES:
                products = _products(
                    q, (None,), k, batch, rows, keep, head, y_rows, y_keep, kv_head, S, BS, ACC, DOT, PRECISION
                )  # fmt: skip
                a = _by_row(factors[0], pointers[0], at, inside, ACC)
                b = _by_row(factors[1], pointers[1], at, inside, ACC)
                c = _inverse_of_normalizer(factors[2], pointers[2], pointers[3], head, heads, at, inside, ACC)
                x, seen = _scores(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL)
                tile = _narrow(tl.where(seen, _activate(x, F) * c[:, None], 0), DOT, PRECISION)
            else:
                _, tile = _gradients_of_scores(
                    q, k, v, gate, bias, g, factors, pointers, heads, batch, head, kv_head, i, j, rows, y_rows, at,
                    inside, keep, y_keep, shift, S, E, F, CAUSAL, BS, BD, ACC, DOT, PRECISION,
                )  # fmt: skip
            if VALUES:
                right = _load_factors(g, gate, None, batch, rows, keep, head, dims, E, ACC, DOT, PRECISION)
            else:
                a_ptr = pointers[0]
                if pointers[0] is not None:
                    a_ptr += batch * n_q
                right = _load_factors(q, (None,), a_ptr, batch, rows, keep, head, dims, S, ACC, DOT, PRECISION)
            total = _add_product(total, tl.trans(tile), right, DOT, ACC, PRECISION)
    if VALUES:
        _store_rows(out, batch, y_rows, y_inside, kv_head, dims, tl.where(y_keep[:, None], total, 0), E)
    else:
        total = tl.where(y_keep[:, None], total * factors[0], 0)
        _store_rows(out, batch, y_rows, y_inside, kv_head, dims, total, S)


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
        n, block = _find(ends[1], block, sequences, n_k, BN)
        key = block * BN
    q_begin, q_tokens = _rows(ends[0], n, n_q)
    k_begin, k_tokens = _rows(ends[1], n, n_k)
    if key < first_key or key >= tl.minimum(first_key + width, k_tokens):
        return
    j = key + tl.arange(0, BN)
    y_inside = j < k_tokens
    y_rows = k_begin + j
    y_keep = _kept(key_mask, batch, y_rows, y_inside)
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
    batch, head, q_tokens, k_begin, k_tokens, first, i, rows, inside = _query_block(
        first_unit + place, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    if first < 0 or first >= q_tokens:
        return
    keep = _kept(query_mask, batch, rows, inside)
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
        y_keep = _kept(key_mask, batch, y_rows, j < k_tokens)
        if grad_panel_ptr is not None:
            at_panel = (place * BM + tl.arange(0, BM))[:, None] * width + columns[None, :]
            tile = tl.load(grad_panel_ptr + at_panel)  # [BM, BN]
        else:
            _, tile = _gradients_of_scores(
                q, k, v, gate, bias, g, (scale, bias_scale, out_scale), (a_ptr, b_ptr, c_ptr, sums_ptr, delta_ptr),
                heads, batch, head, kv_head, i, j, rows, y_rows, at, inside, keep, y_keep, shift, S, E, F, CAUSAL, BS,
                BD, ACC, DOT, PRECISION,
            )  # fmt: skip
        keys = _load_rows(k, batch, y_rows, y_keep, kv_head, dims, S).to(DOT)  # [BN, BK]
        total = _add_product(total, tile, keys, DOT, ACC, PRECISION)
    total = tl.where(keep[:, None], total * _by_row(scale, a_ptr, at, inside, ACC)[:, None], 0)
    if carry[0] is not None:
        if is_first == 0:
            total += _load_rows(carry, batch, rows, inside, head, dims, S)
        if is_last == 0:
            _store_rows(carry, batch, rows, inside, head, dims, total, S)
    if is_last != 0:
        _store_rows(grad_q, batch, rows, inside, head, dims, total, S)


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
                q_begin, q_tokens = _rows(ends[0], n, n_q)
                _, k_tokens = _rows(ends[1], n, n_k)
                shift = k_tokens - q_tokens
                last_key = tl.minimum(first_key + width, k_tokens)
                origin = (place * blocks + _first_block(ends[0], n, n_q, BM)) * BM
                begin = tl.maximum(first_key - shift - lowest - BR + 1, 0)
                for start in range(begin, tl.minimum(last_key - shift - lowest, q_tokens), BI):
                    i = start + tl.arange(0, BI)
                    j = (i + shift)[:, None] + r[None, :]  # [BI, BR]
                    known = (i < q_tokens)[:, None] & (j >= first_key) & (j < last_key)
                    if CAUSAL:
                        known &= (r <= 0)[None, :]
                    at_panel = (origin + i)[:, None] * width + (j - first_key)
                    grads = tl.load(grad_panel_ptr + at_panel, mask=known, other=0).to(ACC)
                    b = _by_row(bias_scale, b_ptr, batch * n_q + q_begin + i, i < q_tokens, ACC)
                    total += tl.sum(grads * b[:, None], 0)
    at = grad_bias[0] + bias_head * grad_bias[1] + (r + grad_bias[3] // 2) * grad_bias[2]
    real = r <= grad_bias[3] // 2
    tl.store(at, tl.load(at, mask=real, other=0) + total, mask=real)
