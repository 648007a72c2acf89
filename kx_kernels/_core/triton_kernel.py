"""Triton functions that the kernels of several operators are made of: gated attention, within chunks and without.

A tensor is (pointer, strides). i and j count the queries and keys of a sequence from its first. Imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(x, batch, rows, keep, head, dims, D: tl.constexpr):
    """[rows, dims] of x, 0 where there is none."""
    at = x[0] + batch * x[1] + rows[:, None] * x[2] + head * x[3] + dims[None, :] * x[4]
    return tl.load(at, mask=keep[:, None] & (dims < D)[None, :], other=0)


@triton.jit
def store_rows(x, batch, rows, keep, head, dims, values, D: tl.constexpr):
    at = x[0] + batch * x[1] + rows[:, None] * x[2] + head * x[3] + dims[None, :] * x[4]
    tl.store(at, values.to(x[0].dtype.element_ty), mask=keep[:, None] & (dims < D)[None, :])


@triton.jit
def narrow(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x as products take it: in tf32, rounded to the 11 bits that they look at."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DOT)


@triton.jit
def load_factors(
    x, gate, factor_ptr, batch, rows, keep, head, dims, D: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[rows, dims] of x as products take it, times the gate and a number [rows] where these are."""
    values = load_rows(x, batch, rows, keep, head, dims, D)
    if gate[0] is not None:
        values = values.to(ACC) * load_rows(gate, batch, rows, keep, head, dims, D).to(ACC)
    if factor_ptr is not None:
        values = values.to(ACC) * tl.load(factor_ptr + rows, mask=keep, other=0)[:, None]
    if gate[0] is not None or factor_ptr is not None:
        values = narrow(values, DOT, PRECISION)
    return values.to(DOT)


@triton.jit
def add_product(total, x, y, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """total + x·y. Tensor cores cut off what they add to a long sum: float32 and float16 would notice, bfloat16 not."""
    if tl.bfloat16 == DOT:
        return tl.dot(x, y, acc=total, input_precision=PRECISION, out_dtype=ACC)
    else:
        return total + tl.dot(x, y, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def multiply(
    x, gate, y, batch, rows, keep, head, y_rows, y_keep, kv_head, D: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x·y [rows, y_rows], x times the gate where there is one."""
    total = tl.zeros([rows.shape[0], y_rows.shape[0]], ACC)
    for d in range(0, D, BD):
        dims = d + tl.arange(0, BD)
        left = load_factors(x, gate, None, batch, rows, keep, head, dims, D, ACC, DOT, PRECISION)
        right = load_rows(y, batch, y_rows, y_keep, kv_head, dims, D).to(DOT)
        total = add_product(total, left, tl.trans(right), DOT, ACC, PRECISION)
    return total


@triton.jit
def _begin(ends_ptr, n, length):
    """The first row of packed sequence n, and nothing outside the tensor."""
    return tl.minimum(tl.maximum(tl.load(ends_ptr + n), 0), length)


@triton.jit
def rows_of(ends_ptr, n, length):
    """Where the rows of sequence n begin, and how many there are."""
    if ends_ptr is None:
        return tl.full([], 0, tl.int64), length
    else:
        begin = _begin(ends_ptr, n, length)
        return begin.to(tl.int64), tl.maximum(_begin(ends_ptr, n + 1, length) - begin, 0)


@triton.jit
def first_block(ends_ptr, n, length, span, BLOCK):
    """The place of the first block of sequence n among those of a head, where each `span` rows begin a block.

    A packed sequence has all up to the next one's: never fewer than its rows need, maybe one or two more.
    """
    if ends_ptr is None:
        return tl.full([], 0, tl.int64)
    else:
        begin = _begin(ends_ptr, n, length)
        return (begin // span * ((span - 1) // BLOCK + 1) + begin % span // BLOCK + n).to(tl.int64)


@triton.jit
def find(ends_ptr, block, sequences, length, span, BLOCK):
    """The packed sequence that a block of a head is of, and its place there: below 0 before all sequences."""
    low, high = sequences * 0, sequences - 1  # the last sequence that begins no later
    while low < high:
        middle = (low + high + 1) // 2
        if first_block(ends_ptr, middle, length, span, BLOCK) <= block:
            low = middle
        else:
            high = middle - 1
    return low, (block - first_block(ends_ptr, low, length, span, BLOCK)).to(tl.int32)


@triton.jit
def query_block(unit, blocks, ends, n_q, n_k, heads, sequences, BM: tl.constexpr):
    """batch, head; how many queries the sequence has, where its keys begin, how many there are; the first query of the
    block, and [BM] all i, their rows, and which of them there are."""
    head = unit // blocks % heads
    batch = unit // blocks // heads
    n, block = batch, (unit % blocks).to(tl.int32)
    if ends[0] is not None:
        n, block = find(ends[0], block, sequences, n_q, BM, BM)
    q_begin, q_tokens = rows_of(ends[0], n, n_q)
    k_begin, k_tokens = rows_of(ends[1], n, n_k)
    first = block * BM
    i = first + tl.arange(0, BM)
    return batch, head, q_tokens, k_begin, k_tokens, first, i, q_begin + i, i < q_tokens


@triton.jit
def kept(mask, batch, rows, inside):
    """[rows]: which are no padding."""
    if mask[0] is not None:
        inside &= tl.load(mask[0] + batch * mask[1] + rows * mask[2], mask=inside, other=0) != 0
    return inside


@triton.jit
def by_row(number, factor_ptr, at, inside, ACC: tl.constexpr):
    """A number, and one for each row `at` [rows] where there are such."""
    x = (tl.full(at.shape, 1.0, ACC) * number).to(ACC)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + at, mask=inside, other=0)
    return x


@triton.jit
def inverse(x):
    return tl.where(x != 0, 1 / tl.where(x != 0, x, 1.0), 0.0)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first columns, and the others."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def store_outputs(
    out, ungated, gate, batch, rows, keep, inside, head, first_column, total, E: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns of outputs from their sums [ROWS, COLUMNS], and where there is a gate the sums themselves."""
    halves = _halves(total, ROWS, COLUMNS)
    for quarter in tl.static_range(4):  # gates of all columns would not fit into registers beside the outputs
        columns = _halves(halves[quarter // 2], ROWS, COLUMNS // 2)[quarter % 2]
        dims = first_column + quarter * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        if ungated[0] is not None:
            store_rows(ungated, batch, rows, inside, head, dims, columns, E)
        if gate[0] is not None:
            columns *= load_rows(gate, batch, rows, keep, head, dims, E).to(ACC)
        store_rows(out, batch, rows, inside, head, dims, columns, E)


@triton.jit
def score(products, i, j, keep, y_keep, a, b, bias, head, shift, CAUSAL: tl.constexpr):
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
def activate(x, F: tl.constexpr):
    """f(x). NaN stays NaN."""
    if F == "relu2":
        return tl.where(x <= 0, 0.0, x * x)
    elif F == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif F == "silu":
        return x / (1 + tl.exp(-x))
    elif F == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    elif F == "laplace":
        return 0.5 * (1 + tl.erf((x - 0.7071067811865476) * 2.5066282746310002))
    else:
        return x


@triton.jit
def slope(x, F: tl.constexpr):
    """f′(x). NaN stays NaN."""
    if F == "relu2":
        return tl.where(x <= 0, 0.0, 2 * x)
    elif F == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
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


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "sequences", "blocks"])
def rows_kernel(
    g, factor, ungated, out, sums_ptr, delta_ptr, query_mask, ends, n_q, n_k, heads, sequences, blocks,
    E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows of g times a factor, and δ, their products with A by c, where sums divide."""
    unit = tl.program_id(0).to(tl.int64)
    batch, head, tokens, _, _, first, _, rows, inside = query_block(
        unit, blocks, ends, n_q, n_k, heads, sequences, BM
    )  # fmt: skip
    if first < 0 or first >= tokens:
        return
    keep = kept(query_mask, batch, rows, inside)
    delta = tl.zeros([BM], ACC)
    for e in range(0, E, BE):
        dims = e + tl.arange(0, BE)
        grads = load_rows(g, batch, rows, keep, head, dims, E).to(ACC)  # [BM, BE]
        if factor[0] is not None:
            grads *= load_rows(factor, batch, rows, keep, head, dims, E).to(ACC)
        if out[0] is not None:
            store_rows(out, batch, rows, inside, head, dims, grads, E)
        if delta_ptr is not None:
            delta += tl.sum(grads * load_rows(ungated, batch, rows, keep, head, dims, E).to(ACC), 1)
    if delta_ptr is not None:
        at = (batch * n_q + rows) * heads + head
        tl.store(delta_ptr + at, delta * inverse(tl.load(sums_ptr + at, mask=inside, other=0)), mask=inside)
