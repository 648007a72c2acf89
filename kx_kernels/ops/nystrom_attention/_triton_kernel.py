"""The Triton kernels, in the names of the README. Imported on first use, with triton.

A tensor is (pointer, strides); what has m rows to a head is without gaps. A `unit` is a head of a sequence; t counts
the rows of a sequence from its first, i and j landmarks. A part is `span` rows of a sequence, and what parts sum up
lies one after the other in a workspace, at the `place` of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._core.triton_kernel import find, first_block, kept, load_rows, rows_of, store_rows

# Numbered as in presets.py.
_NYSTROM = tl.constexpr(0)
_BY_KEYS = tl.constexpr(1)
_BY_QUERIES = tl.constexpr(2)
_NOTHING = tl.constexpr(3)


@triton.jit
def _add_product(total, x, y, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """total + x·y. Numbers that are wider than products take go as two of them, and the small half of each is a product
    of its own: all but that of both small halves."""
    if DOT == ACC:
        return total + tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    else:
        x_high, y_high = x.to(DOT), y.to(DOT)
        if x.dtype != DOT:
            total = tl.dot((x - x_high.to(ACC)).to(DOT), y_high, acc=total, out_dtype=ACC)
        if y.dtype != DOT:
            total = tl.dot(x_high, (y - y_high.to(ACC)).to(DOT), acc=total, out_dtype=ACC)
        return tl.dot(x_high, y_high, acc=total, out_dtype=ACC)


@triton.jit
def _load(x_ptr, unit, i, columns, M: tl.constexpr, D: tl.constexpr):
    """[i, columns] of a tensor [N, H, m, D], 0 where there is none."""
    at = (unit * M + i)[:, None] * D + columns[None, :]
    return tl.load(x_ptr + at, mask=(i < M)[:, None] & (columns < D)[None, :], other=0)


@triton.jit
def _store(x_ptr, unit, i, columns, values, M: tl.constexpr, D: tl.constexpr):
    at = (unit * M + i)[:, None] * D + columns[None, :]
    tl.store(x_ptr + at, values, mask=(i < M)[:, None] & (columns < D)[None, :])


@triton.jit
def _part(place, parts, ends_ptr, length, heads, sequences, span):
    """The sequence, batch and head of a part; where the sequence's rows begin, how many it has; where the part's rows
    begin and end."""
    head = place // parts % heads
    batch = place // parts // heads
    n, block = batch, (place % parts).to(tl.int32)
    if ends_ptr is not None:
        n, block = find(ends_ptr, block, sequences, length, span, span)
    begin, tokens = rows_of(ends_ptr, n, length)
    first = block * span
    return n, batch, head, begin, tokens, first, tl.minimum(first + span, tokens)


@triton.jit
def _places(n, head, parts, ends_ptr, length, heads, span):
    """The place of the first part of a sequence, and how many there are; and how many rows."""
    _, tokens = rows_of(ends_ptr, n, length)
    unit = n * heads + head
    if ends_ptr is not None:
        unit = head
    return unit * parts + first_block(ends_ptr, n, length, span, span), tl.cdiv(tokens, span), tokens


@triton.jit
def _bounds(bounds_ptr, n, begin, i, M: tl.constexpr):
    """Where segments begin and end, counted as t; those past the last have no rows."""
    at = bounds_ptr + n * (M + 1) + i
    lower = tl.load(at, mask=i < M, other=0) - begin
    upper = tl.load(at + 1, mask=i < M, other=0) - begin
    return tl.where(i < M, lower, 0).to(tl.int32), tl.where(i < M, upper, 0).to(tl.int32)


@triton.jit
def _alive(divisors_ptr, n, i, M: tl.constexpr):
    return tl.load(divisors_ptr + n * M + i, mask=i < M, other=0) != 0


@triton.jit
def _weights(scores, seen):
    """Softmax of each row of what is seen, and of a row that sees nothing 0."""
    x = tl.where(seen, scores, -float("inf"))
    top = tl.max(x, 1)
    x = tl.exp(x - tl.where(top == -float("inf"), 0, top)[:, None])
    total = tl.sum(x, 1)
    return x / tl.where(total == 0, 1, total)[:, None]


@triton.jit(do_not_specialize=["heads", "groups"])
def nystrom_pool_kernel(
    x, mask, packed, bounds_ptr, divisors_ptr, out_ptr, heads, groups, M: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: some landmarks of a head, the means of their segments."""
    pid = tl.program_id(0).to(tl.int64)
    unit = pid // groups
    n, head = unit // heads, unit % heads
    batch = n
    if packed is not None:
        batch = n * 0
    i = (pid % groups).to(tl.int32) * BM + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    lower, upper = _bounds(bounds_ptr, n, 0, i, M)
    total = tl.full([BM, BD], 0, ACC)
    for start in range(0, tl.max(upper - lower), BR):
        rows = (lower + start)[:, None].to(tl.int64) + tl.arange(0, BR)[None, :]  # [BM, BR]
        keep = kept(mask, batch, rows, rows < upper[:, None])
        at = x[0] + batch * x[1] + rows[:, :, None] * x[2] + head * x[3] + dims[None, None, :] * x[4]
        values = tl.load(at, mask=keep[:, :, None] & (dims < D)[None, None, :], other=0)
        total += tl.sum(values.to(ACC), 1)
    divisors = tl.load(divisors_ptr + n * M + i, mask=i < M, other=0)
    alive = divisors != 0
    _store(out_ptr, unit, i, dims, tl.where(alive[:, None], total / tl.where(alive, divisors, 1)[:, None], 0), M, D)


@triton.jit
def _scores(
    x, landmarks, landmarks_ptr, factor, batch, rows, keep, head, unit, i, TURNED: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x·landmarks [rows, i], or [i, rows], times a factor; and the rows of x, if BD columns are all. The landmarks
    times the factor are at hand then."""
    total = tl.full([i.shape[0], rows.shape[0]] if TURNED else [rows.shape[0], i.shape[0]], 0, ACC)
    if BD >= D:
        values = load_rows(x, batch, rows, keep, head, tl.arange(0, BD), D)
        if TURNED:
            total = _add_product(total, landmarks, tl.trans(values), DOT, ACC, PRECISION)
        else:
            total = _add_product(total, values, tl.trans(landmarks), DOT, ACC, PRECISION)
        return total, values
    else:
        for d in range(0, D, BD):
            dims = d + tl.arange(0, BD)
            some = _load(landmarks_ptr, unit, i, dims, M, D) * factor
            part = load_rows(x, batch, rows, keep, head, dims, D)
            if TURNED:
                total = _add_product(total, some, tl.trans(part), DOT, ACC, PRECISION)
            else:
                total = _add_product(total, part, tl.trans(some), DOT, ACC, PRECISION)
        return total, None


@triton.jit(do_not_specialize=["n_k", "heads", "sequences", "parts", "span"])
def nystrom_keys_kernel(
    k, v, key_mask, ends_ptr, bounds_ptr, road_ptr, landmarks_q_ptr, tops_ptr, sums_ptr, sum_keys_ptr, sum_values_ptr,
    n_k, heads, sequences, parts, span, scale: tl.float64, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a part's sums of keys by segments, and of values by weights of B under a maximum of its own: a slice
    of their columns."""
    pid = tl.program_id(0).to(tl.int64)
    place, part = pid // SLICES, (pid % SLICES).to(tl.int32)
    n, batch, head, begin, _, first, last = _part(place, parts, ends_ptr, n_k, heads, sequences, span)
    if first < 0 or first >= last:
        return
    unit = n * heads + head
    i = tl.arange(0, BM)
    lower, upper = _bounds(bounds_ptr, n, begin, i, M)
    by_keys = tl.load(road_ptr + n) == _BY_KEYS
    k_dims, v_dims = part * BK + tl.arange(0, BK), part * BV + tl.arange(0, BV)
    scale = (tl.full([], 1.0, ACC) * scale).to(ACC)
    landmarks = _load(landmarks_q_ptr, unit, i, tl.arange(0, BD), M, D) * scale  # [BM, BD]

    top = tl.full([BM], -float("inf"), ACC)
    sums = tl.full([BM], 0, ACC)
    sum_keys = tl.full([BM, BK], 0, ACC)
    sum_values = tl.full([BM, BV], 0, ACC)
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        keep = kept(key_mask, batch, begin + t, t < last)
        member = ((t[None, :] >= lower[:, None]) & (t[None, :] < upper[:, None]) & keep[None, :]).to(DOT)  # [BM, BT]
        scores, keys = _scores(
            k, landmarks, landmarks_q_ptr, scale, batch, begin + t, keep, head, unit, i, True, M, D, BD, ACC, DOT,
            PRECISION,
        )  # fmt: skip
        if keys is None or BK != BD:
            keys = load_rows(k, batch, begin + t, keep, head, k_dims, D)
        sum_keys = _add_product(sum_keys, member, keys, DOT, ACC, PRECISION)

        scores = tl.where(keep[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0, higher)
        factor = tl.exp(top - shift)
        top = higher
        weights = tl.exp(scores - shift[:, None])
        sums = sums * factor + tl.sum(weights, 1)
        if by_keys:
            factor = tl.full([BM], 1.0, ACC)
            weights = member.to(ACC)
        values = load_rows(v, batch, begin + t, keep, head, v_dims, E)
        sum_values = _add_product(sum_values * factor[:, None], weights, values, DOT, ACC, PRECISION)

    _store(sum_keys_ptr, place, i, k_dims, sum_keys, M, D)
    _store(sum_values_ptr, place, i, v_dims, sum_values, M, E)
    if part == 0:
        tl.store(tops_ptr + place * M + i, top, mask=i < M)
        tl.store(sums_ptr + place * M + i, sums, mask=i < M)


@triton.jit(do_not_specialize=["n_k", "heads", "parts", "span"])
def nystrom_combine_kernel(
    ends_ptr, divisors_q_ptr, divisors_k_ptr, road_ptr, tops_ptr, sums_ptr, sum_keys_ptr, sum_values_ptr,
    landmarks_k_ptr, summary_ptr, weighted_ptr, norms_ptr, n_k, heads, parts, span, M: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, SLICES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a slice of K̃ and Y of a head, of what parts of keys have summed up; and the norms of rows of B."""
    pid = tl.program_id(0).to(tl.int64)
    unit, part = pid // SLICES, (pid % SLICES).to(tl.int32)
    n, head = unit // heads, unit % heads
    place, count, tokens = _places(n, head, parts, ends_ptr, n_k, heads, span)
    i = tl.arange(0, BM)
    top = tl.full([BM], -float("inf"), ACC)
    for p in range(count):
        top = tl.maximum(top, tl.load(tops_ptr + (place + p) * M + i, mask=i < M, other=-float("inf")))
    top = tl.where(top == -float("inf"), 0, top)
    total = tl.full([BM], 0, ACC)
    k_dims, v_dims = part * BK + tl.arange(0, BK), part * BV + tl.arange(0, BV)
    keys = tl.full([BM, BK], 0, ACC)
    values = tl.full([BM, BV], 0, ACC)
    by_keys = tl.load(road_ptr + n) == _BY_KEYS
    for p in range(count):
        at = (place + p) * M + i
        factor = tl.exp(tl.load(tops_ptr + at, mask=i < M, other=0) - top)
        total += factor * tl.load(sums_ptr + at, mask=i < M, other=0)
        factor = tl.where(by_keys, 1, factor)
        keys += _load(sum_keys_ptr, place + p, i, k_dims, M, D)
        values += factor[:, None] * _load(sum_values_ptr, place + p, i, v_dims, M, E)
    total = tl.where(_alive(divisors_q_ptr, n, i, M), total, tokens)  # a dead landmark sees padding as well
    total = tl.where(by_keys | (total == 0), 1, total)
    values /= total[:, None]
    divisors = tl.load(divisors_k_ptr + n * M + i, mask=i < M, other=0)
    alive = divisors != 0
    keys = tl.where(alive[:, None], keys / tl.where(alive, divisors, 1)[:, None], 0)
    _store(landmarks_k_ptr, unit, i, k_dims, keys, M, D)
    _store(summary_ptr, unit, i, v_dims, values, M, E)
    _store(weighted_ptr, unit, i, v_dims, values, M, E)  # of which Z makes another one, if there is one
    if part == 0:
        tl.store(norms_ptr + (unit * M + i) * 2, top, mask=i < M)
        tl.store(norms_ptr + (unit * M + i) * 2 + 1, total, mask=i < M)


@triton.jit
def _multiply(
    out_ptr, x_ptr, X_TURNED: tl.constexpr, y_ptr, Y_TURNED: tl.constexpr, factor, diagonal, also_ptr, also, at,
    BM: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = factor·x·y + a diagonal matrix + also·another one, all [BM, BM]; x and y may be turned, and out must be
    neither. `at` are the places of a tile's numbers, and the diagonal a tile. All threads wait for each other."""
    for i in range(0, BM, TILE):
        for j in range(0, BM, TILE):
            total = tl.full([TILE, TILE], 0, ACC)
            for d in range(0, BM, TILE):
                x = tl.load(x_ptr + (d * BM + i if X_TURNED else i * BM + d) + at)
                y = tl.load(y_ptr + (j * BM + d if Y_TURNED else d * BM + j) + at)
                x = tl.trans(x) if X_TURNED else x
                y = tl.trans(y) if Y_TURNED else y
                total += tl.dot(x, y, input_precision=PRECISION, out_dtype=ACC)
            if factor != 1:
                total *= factor
            if diagonal is not None:
                total += tl.where(i == j, diagonal, 0)
            if also_ptr is not None:
                total += also * tl.load(also_ptr + (i * BM + j) + at)
            tl.store(out_ptr + (i * BM + j) + at, total)
    tl.debug_barrier()


@triton.jit
def _multiply_landmarks(
    out_ptr, x, y, also_ptr, factor, M: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = factor·(x·y + another matrix): of m rows and any size, zeros up to ROWS and WIDTH; x and y are (pointer,
    stride of rows, stride of columns). All threads wait for each other."""
    lane = tl.arange(0, TILE)
    for first_row in range(0, ROWS, TILE):
        i = first_row + lane
        for first_column in range(0, WIDTH, TILE):
            j = first_column + lane
            total = tl.full([TILE, TILE], 0, ACC)
            for depth in range(0, DEPTH, TILE):
                d = depth + lane
                left = (i < M)[:, None] & (d < DEPTH)[None, :]
                right = (d < DEPTH)[:, None] & (j < COLUMNS)[None, :]
                total += tl.dot(
                    tl.load(x[0] + (i[:, None] * x[1] + d[None, :] * x[2]), mask=left, other=0),
                    tl.load(y[0] + (d[:, None] * y[1] + j[None, :] * y[2]), mask=right, other=0),
                    input_precision=PRECISION,
                    out_dtype=ACC,
                )
            at = i[:, None] * WIDTH + j[None, :]
            inside = (i < ROWS)[:, None] & (j < WIDTH)[None, :]
            if also_ptr is not None:
                total += tl.load(also_ptr + at, mask=inside, other=0)
            tl.store(out_ptr + at, factor * total, mask=inside)
    tl.debug_barrier()


@triton.jit
def _matrix(
    out_ptr, landmarks_q_ptr, landmarks_k_ptr, divisors_q_ptr, divisors_k_ptr, n, scale, ridge, M: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A of a head to memory [BM, BM], zeros where it has no rows and columns; the sums of its columns."""
    _multiply_landmarks(
        out_ptr, (landmarks_q_ptr, D, 1), (landmarks_k_ptr, 1, D), None, scale, M, M, D, BM, BM, TILE, ACC, PRECISION
    )  # fmt: skip
    j = tl.arange(0, BM)
    alive_k = _alive(divisors_k_ptr, n, j, M)
    columns = tl.full([BM], 0, ACC)
    for first in range(0, BM, ROWS):
        i = first + tl.arange(0, ROWS)
        at = out_ptr + (i[:, None] * BM + j[None, :])
        inside = (i < M)[:, None] & (j < M)[None, :]
        x = _weights(tl.load(at), alive_k[None, :])
        x = tl.where(_alive(divisors_q_ptr, n, i, M)[:, None], x, 1.0 / M)  # a dead landmark sees everything alike
        x = tl.where(inside, x + ridge * (i[:, None] == j[None, :]).to(ACC), 0)
        tl.store(at, x)
        columns += tl.sum(x, 0)
    tl.debug_barrier()
    return columns


@triton.jit
def _largest(columns_ptr, count, ACC: tl.constexpr):
    """Of all numbers the largest, and how many are."""
    top = tl.full([], 0, ACC)
    for first in range(0, count, 1024):
        at = first + tl.arange(0, 1024)
        top = tl.maximum(top, tl.max(tl.load(columns_ptr + at, mask=at < count, other=0)))
    ties = tl.full([], 0, tl.int32)
    for first in range(0, count, 1024):
        at = first + tl.arange(0, 1024)
        ties += tl.sum((tl.load(columns_ptr + at, mask=at < count, other=0) == top).to(tl.int32))
    return top, ties


@triton.jit
def _first_state(
    z_ptr, a_ptr, norm, BM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Z₀ = Aᵀ / norm."""
    j = tl.arange(0, BM)
    for first in range(0, BM, ROWS):
        i = first + tl.arange(0, ROWS)
        tl.store(z_ptr + (i[:, None] + j[None, :] * BM), tl.load(a_ptr + (i[:, None] * BM + j[None, :])) / norm)
    tl.debug_barrier()


@triton.jit
def _polynomials(
    a_ptr, z_ptr, x_ptr, t2_ptr, t3_ptr, identity, at, BM: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """X, T₂ = 15 I − 7 X + X X and T₃ of a step from Z."""
    _multiply(x_ptr, a_ptr, False, z_ptr, False, 1.0, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
    _multiply(t2_ptr, x_ptr, False, x_ptr, False, 1.0, 15 * identity, x_ptr, -7.0, at, BM, TILE, ACC, PRECISION)
    _multiply(t3_ptr, x_ptr, False, t2_ptr, False, -1.0, 13 * identity, None, 0.0, at, BM, TILE, ACC, PRECISION)


@triton.jit(do_not_specialize=["heads", "sequences", "iterations"])
def nystrom_inverse_kernel(
    landmarks_q_ptr, landmarks_k_ptr, divisors_q_ptr, divisors_k_ptr, road_ptr, inverse_ptr, columns_ptr, scratch_ptr,
    summary_ptr, weighted_ptr, heads, sequences, iterations, scale: tl.float64, ridge: tl.float64, ROLE: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    MATRICES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: W = Z Y of a head.

    ROLE  "weigh": that, by the inverse if it is given; by a norm that is the largest of `columns`, if these are given
          "measure": A, and the sums of its columns
    """
    unit = tl.program_id(0).to(tl.int64)
    n = unit // heads
    j = tl.arange(0, BM)
    if tl.load(road_ptr + n) != _NYSTROM:
        if ROLE == "measure":
            tl.store(columns_ptr + unit * M + j, tl.full([BM], 0, ACC), mask=j < M)
        return
    scale = (tl.full([], 1.0, ACC) * scale).to(ACC)
    ridge = (tl.full([], 1.0, ACC) * ridge).to(ACC)
    if inverse_ptr is not None:
        z, width = inverse_ptr + unit * M * M, M
    else:
        SIZE: tl.constexpr = BM * BM
        a = scratch_ptr + unit * SIZE * MATRICES
        columns = _matrix(
            a, landmarks_q_ptr + unit * M * D, landmarks_k_ptr + unit * M * D, divisors_q_ptr, divisors_k_ptr, n, scale,
            ridge, M, D, BM, ROWS, TILE, ACC, PRECISION,
        )  # fmt: skip
        if ROLE == "measure":
            tl.store(columns_ptr + unit * M + j, columns, mask=j < M)
            return
        norm = tl.max(columns)
        if columns_ptr is not None:
            norm, _ = _largest(columns_ptr, sequences * heads * M, ACC)
        x, t2, t3, states = a + SIZE, a + 2 * SIZE, a + 3 * SIZE, a + 4 * SIZE
        lane = tl.arange(0, TILE)
        at = lane[:, None] * BM + lane[None, :]
        identity = (lane[:, None] == lane[None, :]).to(ACC)
        _first_state(states, a, norm * (1 + ridge), BM, ROWS)
        for step in range(iterations):
            z = states + step % 2 * SIZE
            _polynomials(a, z, x, t2, t3, identity, at, BM, TILE, ACC, PRECISION)
            after = states + (step + 1) % 2 * SIZE
            _multiply(after, z, False, t3, False, 0.25, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
        z, width = states + iterations % 2 * SIZE, BM
    summary = (summary_ptr + unit * M * E, E, 1)
    _multiply_landmarks(
        weighted_ptr + unit * M * E, (z, width, 1), summary, None, 1.0, M, E, M, M, E, TILE, ACC, PRECISION
    )  # fmt: skip


@triton.jit
def _front(scores, alive, t, lower, upper, by_queries):
    """Rows of F."""
    member = (t[:, None] >= lower[None, :]) & (t[:, None] < upper[None, :])
    weights = _weights(scores, alive[None, :])
    return tl.where(by_queries, member.to(weights.dtype), weights)


@triton.jit
def _convolve(
    total, x, mask, weight_ptr, batch, head, begin, tokens, first, dims, D: tl.constexpr, TAPS: tl.constexpr,
    REVERSE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BT, dims] and the rows of x around each of the rows from the first, by a head's weights, or by these in
    reverse: a product with a matrix whose rows are the weights, each a column further right."""
    before: tl.constexpr = TAPS - 1 - TAPS // 2 if REVERSE else TAPS // 2
    for start in range(0, BT + TAPS - 1, BC):
        c = start + tl.arange(0, BC)
        t = first - before + c
        keep = kept(mask, batch, begin + t, (t >= 0) & (t < tokens))
        tap = c[None, :] - tl.arange(0, BT)[:, None]
        known = (tap >= 0) & (tap < TAPS)
        if REVERSE:
            tap = TAPS - 1 - tap
        weights = tl.load(weight_ptr + head * TAPS + tap, mask=known, other=0)  # [BT, BC]
        rows = load_rows(x, batch, begin + t, keep, head, dims, D)
        total = _add_product(total, weights, rows, DOT, ACC, PRECISION)
    return total


@triton.jit(do_not_specialize=["n_q", "heads", "sequences", "parts", "span"])
def nystrom_output_kernel(
    q, v, out, query_mask, key_mask, ends_ptr, bounds_ptr, divisors_k_ptr, road_ptr, landmarks_k_ptr, weighted_ptr,
    conv_ptr, n_q, heads, sequences, parts, span, scale: tl.float64, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    TAPS: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a part of the outputs."""
    place = tl.program_id(0).to(tl.int64)
    n, batch, head, begin, tokens, first, last = _part(place, parts, ends_ptr, n_q, heads, sequences, span)
    if first < 0 or first >= last:
        return
    unit = n * heads + head
    i = tl.arange(0, BM)
    lower, upper = _bounds(bounds_ptr, n, begin, i, M)
    alive = _alive(divisors_k_ptr, n, i, M)
    road = tl.load(road_ptr + n)
    scale = (tl.full([], 1.0, ACC) * scale).to(ACC)
    landmarks = _load(landmarks_k_ptr, unit, i, tl.arange(0, BD), M, D) * scale
    values = _load(weighted_ptr, unit, i, tl.arange(0, BE), M, E)
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        rows, inside = begin + t, t < last
        keep = kept(query_mask, batch, rows, inside)
        scores, _ = _scores(
            q, landmarks, landmarks_k_ptr, scale, batch, rows, keep, head, unit, i, False, M, D, BD, ACC, DOT, PRECISION
        )  # fmt: skip
        weights = _front(scores, alive, t, lower, upper, road == _BY_QUERIES)  # [BT, BM]
        for e in range(0, E, BE):
            dims = e + tl.arange(0, BE)
            if BE < E:
                values = _load(weighted_ptr, unit, i, dims, M, E)
            o = _add_product(tl.full([BT, BE], 0, ACC), weights, values, DOT, ACC, PRECISION)
            if conv_ptr is not None:
                o = _convolve(
                    o, v, key_mask, conv_ptr, batch, head, begin, tokens, start, dims, E, TAPS, False, BT, BC, ACC, DOT,
                    PRECISION,
                )  # fmt: skip
            o = tl.where(keep[:, None] & (road != _NOTHING), o, 0)
            store_rows(out, batch, rows, inside, head, dims, o, E)


@triton.jit
def _gradients(
    q, g, landmarks, weighted, landmarks_k_ptr, weighted_ptr, scale, batch, rows, keep, head, unit, i, alive, t, lower,
    upper, by_queries, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of F and of S₁; and those of q and g, as they come of scores."""
    scores, queries = _scores(
        q, landmarks, landmarks_k_ptr, scale, batch, rows, keep, head, unit, i, False, M, D, BD, ACC, DOT, PRECISION
    )  # fmt: skip
    weights = _front(scores, alive, t, lower, upper, by_queries)
    grads, values = _scores(
        g, weighted, weighted_ptr, 1.0, batch, rows, keep, head, unit, i, False, M, E, BD, ACC, DOT, PRECISION
    )  # fmt: skip
    grads = weights * (grads - tl.sum(weights * grads, 1)[:, None])
    return weights, tl.where(by_queries, 0, grads), queries, values


@triton.jit
def _share(
    grads_ptr, divisors_ptr, n, unit, t, upper, dims, M: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What rows [t, dims] have of the gradient of the landmark that each is in."""
    i = tl.sum((t[:, None] >= upper[None, :]).to(tl.int32), 1) - (BM - M)  # those past the last end at 0
    divisors = tl.load(divisors_ptr + n * M + i, mask=i < M, other=0)
    return _load(grads_ptr, unit, i, dims, M, D) / tl.where(divisors == 0, 1, divisors)[:, None]


@triton.jit(do_not_specialize=["n_q", "heads", "sequences", "parts", "span"])
def nystrom_queries_kernel(
    q, g, query_mask, ends_ptr, bounds_ptr, divisors_k_ptr, road_ptr, landmarks_k_ptr, weighted_ptr, sums_ptr, n_q,
    heads, sequences, parts, span, scale: tl.float64, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: what a part of the queries adds to ∂W and ∂K̃ / a: a slice of their columns."""
    pid = tl.program_id(0).to(tl.int64)
    place, part = pid // SLICES, (pid % SLICES).to(tl.int32)
    n, batch, head, begin, _, first, last = _part(place, parts, ends_ptr, n_q, heads, sequences, span)
    if first < 0 or first >= last:
        return
    unit = n * heads + head
    i = tl.arange(0, BM)
    lower, upper = _bounds(bounds_ptr, n, begin, i, M)
    alive = _alive(divisors_k_ptr, n, i, M)
    by_queries = tl.load(road_ptr + n) == _BY_QUERIES
    k_dims, v_dims = part * BK + tl.arange(0, BK), part * BV + tl.arange(0, BV)
    scale = (tl.full([], 1.0, ACC) * scale).to(ACC)
    landmarks = _load(landmarks_k_ptr, unit, i, tl.arange(0, BD), M, D) * scale
    weighted = _load(weighted_ptr, unit, i, tl.arange(0, BD), M, E)
    grad_keys = tl.full([BM, BK], 0, ACC)
    grad_values = tl.full([BM, BV], 0, ACC)
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        keep = kept(query_mask, batch, begin + t, t < last)
        weights, grads, queries, values = _gradients(
            q, g, landmarks, weighted, landmarks_k_ptr, weighted_ptr, scale, batch, begin + t, keep, head, unit, i,
            alive, t, lower, upper, by_queries, M, D, E, BD, ACC, DOT, PRECISION,
        )  # fmt: skip
        if values is None or BV != BD:
            values = load_rows(g, batch, begin + t, keep, head, v_dims, E)
        grad_values = _add_product(grad_values, tl.trans(weights), values, DOT, ACC, PRECISION)
        if queries is None or BK != BD:
            queries = load_rows(q, batch, begin + t, keep, head, k_dims, D)
        grad_keys = _add_product(grad_keys, tl.trans(grads), queries, DOT, ACC, PRECISION)
    sums = sums_ptr + place * M * (D + E)
    _store(sums, 0, i, v_dims, grad_values, M, E)
    _store(sums + M * E, 0, i, k_dims, grad_keys, M, D)


@triton.jit(do_not_specialize=["length", "heads", "parts", "span"])
def nystrom_sum_kernel(
    x_ptr, also_ptr, out_ptr, ends_ptr, length, heads, parts, span, numbers, scale: tl.float64, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: a block of a head's numbers, the sums of those of its parts and of others, times a."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(numbers, BLOCK)
    unit = pid // blocks
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    place, count, _ = _places(unit // heads, unit % heads, parts, ends_ptr, length, heads, span)
    total = tl.full([BLOCK], 0, ACC)
    if also_ptr is not None:
        total = tl.load(also_ptr + unit * numbers + at, mask=at < numbers, other=0)
    for p in range(count):
        total += tl.load(x_ptr + (place + p) * numbers + at, mask=at < numbers, other=0)
    tl.store(out_ptr + unit * numbers + at, total * (tl.full([], 1.0, ACC) * scale).to(ACC), mask=at < numbers)


@triton.jit
def _gradient_of_inverse(
    a_ptr, grad_ptr, spares_ptr, states_ptr, identity, at, iterations, BM: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From Z₀ in memory: Z; adds to the gradient of A what comes by the steps. Of ∂Z in the first of six matrices makes
    ∂Z₀, in the first or the second of them. The places of Z and of ∂Z₀."""
    SIZE: tl.constexpr = BM * BM
    x, t2, t3, g3 = spares_ptr + 2 * SIZE, spares_ptr + 3 * SIZE, spares_ptr + 4 * SIZE, spares_ptr + 5 * SIZE
    for step in range(iterations):
        z = states_ptr + step * SIZE
        _polynomials(a_ptr, z, x, t2, t3, identity, at, BM, TILE, ACC, PRECISION)
        _multiply(z + SIZE, z, False, t3, False, 0.25, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
    for step in range(iterations):
        z = states_ptr + (iterations - 1 - step) * SIZE
        before, after = spares_ptr + step % 2 * SIZE, spares_ptr + (step + 1) % 2 * SIZE
        _polynomials(a_ptr, z, x, t2, t3, identity, at, BM, TILE, ACC, PRECISION)
        _multiply(g3, z, True, before, False, 0.25, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
        _multiply(after, before, False, t3, True, 0.25, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
        g2, r = t3, before  # which are not asked for any more
        _multiply(g2, x, True, g3, False, -1.0, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
        _multiply(r, x, True, g2, False, 1.0, None, g2, -7.0, at, BM, TILE, ACC, PRECISION)
        _multiply(r, g2, False, x, True, 1.0, None, r, 1.0, at, BM, TILE, ACC, PRECISION)
        _multiply(r, g3, False, t2, True, -1.0, None, r, 1.0, at, BM, TILE, ACC, PRECISION)
        _multiply(grad_ptr, r, False, z, True, 1.0, None, grad_ptr, 1.0, at, BM, TILE, ACC, PRECISION)
        _multiply(after, a_ptr, True, r, False, 1.0, None, after, 1.0, at, BM, TILE, ACC, PRECISION)
    return states_ptr + iterations * SIZE, spares_ptr + iterations % 2 * SIZE


@triton.jit(do_not_specialize=["heads", "sequences", "iterations"])
def nystrom_inverse_backward_kernel(
    landmarks_q_ptr, landmarks_k_ptr, divisors_q_ptr, divisors_k_ptr, road_ptr, inverse_ptr, columns_ptr, norms_ptr,
    scratch_ptr, summary_ptr, sums_ptr, grad_summary_ptr, grad_q_ptr, grad_k_ptr, heads, sequences, iterations,
    scale: tl.float64, ridge: tl.float64, ROLE: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, MATRICES: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: of ∂W and ∂K̃ / a as the queries gave them, ∂Y, ∂K̃, and what the matrix adds to ∂Q̃ / a.

    ROLE  "all"
          "iterate": ∂Y, ∂A but for what comes by the norm, and −⟨∂Z₀, Z₀⟩ as the norm's gradient
          "finish": the rest, for a norm that is the largest of the sums of columns of the call
    """
    unit = tl.program_id(0).to(tl.int64)
    n = unit // heads
    sums = sums_ptr + unit * M * (D + E)
    grad_summary, grad_q, grad_k = grad_summary_ptr + unit * M * E, grad_q_ptr + unit * M * D, grad_k_ptr + unit * M * D
    scale = (tl.full([], 1.0, ACC) * scale).to(ACC)
    ridge = (tl.full([], 1.0, ACC) * ridge).to(ACC)
    if tl.load(road_ptr + n) != _NYSTROM:
        for first in range(0, M * E, 1024):
            x = first + tl.arange(0, 1024)
            tl.store(grad_summary + x, tl.load(sums + x, mask=x < M * E, other=0), mask=x < M * E)
        for first in range(0, M * D, 1024):
            x = first + tl.arange(0, 1024)
            tl.store(grad_k + x, scale * tl.load(sums + M * E + x, mask=x < M * D, other=0), mask=x < M * D)
            tl.store(grad_q + x, tl.full([1024], 0, ACC), mask=x < M * D)
        if ROLE == "iterate":
            tl.store(norms_ptr + unit, tl.full([], 0, ACC))
        return

    SIZE: tl.constexpr = BM * BM
    a = scratch_ptr + unit * SIZE * MATRICES
    grad, spares, states = a + SIZE, a + 2 * SIZE, a + 8 * SIZE
    j = tl.arange(0, BM)
    if ROLE != "finish":
        lane = tl.arange(0, TILE)
        at = lane[:, None] * BM + lane[None, :]
        identity = (lane[:, None] == lane[None, :]).to(ACC)
        columns = _matrix(
            a, landmarks_q_ptr + unit * M * D, landmarks_k_ptr + unit * M * D, divisors_q_ptr, divisors_k_ptr, n, scale,
            ridge, M, D, BM, ROWS, TILE, ACC, PRECISION,
        )  # fmt: skip
        norm = tl.max(columns)
        ties = tl.sum((columns == norm).to(tl.int32))
        if columns_ptr is not None:
            norm, _ = _largest(columns_ptr, sequences * heads * M, ACC)
        summary = (summary_ptr + unit * M * E, 1, E)
        _multiply_landmarks(spares, (sums, E, 1), summary, None, 1.0, M, M, E, BM, BM, TILE, ACC, PRECISION)  # ∂Z
        if inverse_ptr is not None:
            z = states
            for first in range(0, BM, ROWS):
                i = first + tl.arange(0, ROWS)
                tl.store(z + (i[:, None] * BM + j[None, :]), _load(inverse_ptr, unit, i, j, M, M))
            tl.debug_barrier()
            _multiply(spares + SIZE, z, True, spares, False, 1.0, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
            _multiply(grad, spares + SIZE, False, z, True, -1.0, None, None, 0.0, at, BM, TILE, ACC, PRECISION)
        else:
            _first_state(states, a, norm * (1 + ridge), BM, ROWS)
            for first in range(0, BM, ROWS):
                i = first + tl.arange(0, ROWS)
                tl.store(grad + (i[:, None] * BM + j[None, :]), tl.full([ROWS, BM], 0, ACC))
            tl.debug_barrier()
            z, grad_z = _gradient_of_inverse(
                a, grad, spares, states, identity, at, iterations, BM, TILE, ACC, PRECISION
            )  # fmt: skip
            product = tl.full([BM], 0, ACC)
            for first in range(0, BM, ROWS):
                i = first + tl.arange(0, ROWS)
                turned = tl.load(grad_z + (j[None, :] * BM + i[:, None]))
                of_norm = tl.load(states + (j[None, :] * BM + i[:, None]))
                product += tl.sum(turned * of_norm, 0)
                x = grad + (i[:, None] * BM + j[None, :])
                tl.store(x, tl.load(x) + turned / (norm * (1 + ridge)))
            tl.debug_barrier()
            of_norm = -tl.sum(product)
            if ROLE == "iterate":
                tl.store(norms_ptr + unit, of_norm)
        _multiply_landmarks(
            grad_summary, (z, 1, BM), (sums, E, 1), None, 1.0, M, E, M, M, E, TILE, ACC, PRECISION
        )  # fmt: skip

    if ROLE != "iterate":
        if ROLE == "finish":
            columns = tl.load(columns_ptr + unit * M + j, mask=j < M, other=0)
            norm, ties = _largest(columns_ptr, sequences * heads * M, ACC)
            of_norm = tl.full([], 0, ACC)
            for first in range(0, sequences * heads, 1024):
                x = first + tl.arange(0, 1024)
                of_norm += tl.sum(tl.load(norms_ptr + x, mask=x < sequences * heads, other=0))
        share = tl.full([BM], 0, ACC)
        if inverse_ptr is None:
            share = tl.where(columns == norm, of_norm / norm / ties, 0)
        for first in range(0, BM, ROWS):
            i = first + tl.arange(0, ROWS)
            x = i[:, None] * BM + j[None, :]
            weights = tl.load(a + x)
            weights = tl.where((i[:, None] == j[None, :]) & (j < M)[None, :], weights - ridge, weights)
            grads = tl.load(grad + x) + share[None, :]
            grads = weights * (grads - tl.sum(weights * grads, 1)[:, None])  # S₂
            tl.store(grad + x, grads)
        tl.debug_barrier()
        landmarks_q, landmarks_k = (landmarks_q_ptr + unit * M * D, D, 1), (landmarks_k_ptr + unit * M * D, D, 1)
        _multiply_landmarks(
            grad_k, (grad, 1, BM), landmarks_q, sums + M * E, scale, M, D, M, M, D, TILE, ACC, PRECISION
        )  # fmt: skip
        _multiply_landmarks(
            grad_q, (grad, BM, 1), landmarks_k, None, 1.0, M, D, M, M, D, TILE, ACC, PRECISION
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_k", "heads", "sequences", "parts", "span"])
def nystrom_keys_backward_kernel(
    k, v, g, grad_k, grad_v, query_mask, key_mask, ends_ptr, bounds_ptr, divisors_k_ptr, road_ptr, landmarks_q_ptr,
    norms_ptr, summary_ptr, grad_summary_ptr, grad_landmarks_k_ptr, sums_ptr, conv_ptr, n_k, heads, sequences, parts,
    span, scale: tl.float64, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, TAPS: tl.constexpr,
    SLICES: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ∂K and ∂V of a part, and what it adds to ∂Q̃ / a: a slice of their columns."""
    pid = tl.program_id(0).to(tl.int64)
    place, part = pid // SLICES, (pid % SLICES).to(tl.int32)
    n, batch, head, begin, tokens, first, last = _part(place, parts, ends_ptr, n_k, heads, sequences, span)
    if first < 0 or first >= last:
        return
    unit = n * heads + head
    i = tl.arange(0, BM)
    lower, upper = _bounds(bounds_ptr, n, begin, i, M)
    road = tl.load(road_ptr + n)
    top = tl.load(norms_ptr + (unit * M + i) * 2, mask=i < M, other=0)
    share = 1 / tl.load(norms_ptr + (unit * M + i) * 2 + 1, mask=i < M, other=1)
    shift = tl.full([BM], 0, ACC)
    for e in range(0, E, BD):
        dims = e + tl.arange(0, BD)
        shift += tl.sum(_load(grad_summary_ptr, unit, i, dims, M, E) * _load(summary_ptr, unit, i, dims, M, E), 1)
    k_dims, v_dims = part * BK + tl.arange(0, BK), part * BV + tl.arange(0, BV)
    scale = (tl.full([], 1.0, ACC) * scale).to(ACC)
    landmarks = _load(landmarks_q_ptr, unit, i, tl.arange(0, BD), M, D) * scale
    summary = _load(grad_summary_ptr, unit, i, tl.arange(0, BD), M, E)
    of_keys = _load(landmarks_q_ptr, unit, i, k_dims, M, D) * scale
    of_values = _load(grad_summary_ptr, unit, i, v_dims, M, E)
    sums = tl.full([BM, BK], 0, ACC)
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        rows, inside = begin + t, t < last
        keep = kept(key_mask, batch, rows, inside)
        scores, keys = _scores(  # the same bits as forward: what divides them has their error
            k, landmarks, landmarks_q_ptr, scale, batch, rows, keep, head, unit, i, True, M, D, BD, ACC, DOT, PRECISION
        )  # fmt: skip
        scores = tl.trans(scores)
        grads, _ = _scores(
            v, summary, grad_summary_ptr, 1.0, batch, rows, keep, head, unit, i, False, M, E, BD, ACC, DOT, PRECISION
        )  # fmt: skip
        weights = tl.where(keep[:, None], tl.exp(scores - top[None, :]) * share[None, :], 0)  # [BT, BM]
        grads = weights * (grads - shift[None, :])
        member = (t[:, None] >= lower[None, :]) & (t[:, None] < upper[None, :])
        weights = tl.where(road == _BY_KEYS, member.to(ACC), weights)
        grads = tl.where(road == _BY_KEYS, 0, grads)

        if keys is None or BK != BD:
            keys = load_rows(k, batch, rows, keep, head, k_dims, D)
        sums = _add_product(sums, tl.trans(grads), keys, DOT, ACC, PRECISION)
        grad_keys = _add_product(tl.full([BT, BK], 0, ACC), grads, of_keys, DOT, ACC, PRECISION)
        grad_keys += _share(grad_landmarks_k_ptr, divisors_k_ptr, n, unit, t, upper, k_dims, M, D, BM)
        grad_values = _add_product(tl.full([BT, BV], 0, ACC), weights, of_values, DOT, ACC, PRECISION)
        if conv_ptr is not None:
            grad_values = _convolve(
                grad_values, g, query_mask, conv_ptr, batch, head, begin, tokens, start, v_dims, E, TAPS, True, BT, BC,
                ACC, DOT, PRECISION,
            )  # fmt: skip
        keep &= road != _NOTHING
        store_rows(grad_k, batch, rows, inside, head, k_dims, tl.where(keep[:, None], grad_keys, 0), D)
        store_rows(grad_v, batch, rows, inside, head, v_dims, tl.where(keep[:, None], grad_values, 0), E)
    _store(sums_ptr, place, i, k_dims, sums, M, D)


@triton.jit(do_not_specialize=["n_q", "heads", "sequences", "parts", "span"])
def nystrom_queries_backward_kernel(
    q, g, grad_q, query_mask, ends_ptr, bounds_ptr, divisors_q_ptr, divisors_k_ptr, road_ptr, landmarks_k_ptr,
    weighted_ptr, grad_landmarks_q_ptr, n_q, heads, sequences, parts, span, scale: tl.float64, M: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: ∂Q of a part."""
    place = tl.program_id(0).to(tl.int64)
    n, batch, head, begin, _, first, last = _part(place, parts, ends_ptr, n_q, heads, sequences, span)
    if first < 0 or first >= last:
        return
    unit = n * heads + head
    i = tl.arange(0, BM)
    lower, upper = _bounds(bounds_ptr, n, begin, i, M)
    alive = _alive(divisors_k_ptr, n, i, M)
    road = tl.load(road_ptr + n)
    scale = (tl.full([], 1.0, ACC) * scale).to(ACC)
    landmarks = _load(landmarks_k_ptr, unit, i, tl.arange(0, BD), M, D) * scale
    weighted = _load(weighted_ptr, unit, i, tl.arange(0, BD), M, E)
    factors = _load(landmarks_k_ptr, unit, i, tl.arange(0, BK), M, D) * scale
    for start in range(first, last, BT):
        t = start + tl.arange(0, BT)
        rows, inside = begin + t, t < last
        keep = kept(query_mask, batch, rows, inside)
        grads = _gradients(
            q, g, landmarks, weighted, landmarks_k_ptr, weighted_ptr, scale, batch, rows, keep, head, unit, i, alive, t,
            lower, upper, road == _BY_QUERIES, M, D, E, BD, ACC, DOT, PRECISION,
        )[1]  # fmt: skip
        keep &= road != _NOTHING
        for d in range(0, D, BK):
            dims = d + tl.arange(0, BK)
            if BK < D:
                factors = _load(landmarks_k_ptr, unit, i, dims, M, D) * scale
            total = _add_product(tl.full([BT, BK], 0, ACC), grads, factors, DOT, ACC, PRECISION)
            total += _share(grad_landmarks_q_ptr, divisors_q_ptr, n, unit, t, upper, dims, M, D, BM)
            store_rows(grad_q, batch, rows, inside, head, dims, tl.where(keep[:, None], total, 0), D)


@triton.jit(do_not_specialize=["length", "heads", "sequences", "parts", "span"])
def nystrom_conv_kernel(
    v, g, query_mask, key_mask, ends_ptr, sums_ptr, length, heads, sequences, parts, span, E: tl.constexpr,
    TAPS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: what a part adds to the gradients of a block of weights: sums along diagonals of V·Gᵀ."""
    pid = tl.program_id(0).to(tl.int64)
    place, block = pid // tl.cdiv(TAPS, BT), (pid % tl.cdiv(TAPS, BT)).to(tl.int32)
    _, batch, head, begin, tokens, first, last = _part(place, parts, ends_ptr, length, heads, sequences, span)
    if first < 0 or first >= last:
        return
    lane = tl.arange(0, BT)
    diagonals = lane[:, None] + lane[None, :]
    total = tl.full([BT], 0, tl.float64)  # one number of all rows
    for start in range(first, last, BT):
        t = start + lane
        keep = kept(key_mask, batch, begin + t, t < last)
        s = start - (TAPS - 1 - TAPS // 2) + block * BT + tl.arange(0, 2 * BT)
        keep_g = kept(query_mask, batch, begin + s, (s >= 0) & (s < tokens))
        products = tl.full([BT, 2 * BT], 0, ACC)
        for e in range(0, E, BE):
            dims = e + tl.arange(0, BE)
            values = load_rows(v, batch, begin + t, keep, head, dims, E)
            grads = load_rows(g, batch, begin + s, keep_g, head, dims, E)
            products = _add_product(products, values, tl.trans(grads), DOT, ACC, PRECISION)
        total += tl.sum(tl.gather(products, diagonals, 1).to(tl.float64), 0)
    tap = TAPS - 1 - (block * BT + lane)
    tl.store(sums_ptr + place * TAPS + tap, total, mask=tap >= 0)
