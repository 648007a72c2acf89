"""The Triton kernel: one product of three serves the output and all gradients. Imported on first use, with triton.

With x, y and w rows of one sequence, in the names of the README,

    ROLE  out  x  y  w   over    state Σ y wᵀ   sum beside it
    o     N    ã  b̃  v   j ≤ i   S              z = Σ b
    dq    ∂ã   g  v  b̃   j ≤ i   Sᵀ             z = Σ b
    dk    ∂b̃   v  g  ã   j ≥ i   Uᵀ             w = Σ e·a
    dv    ∂v   b̃  ã  g   j ≥ i   U              none

out_i = Σ_j γ^|i−j| (x_i·y_j) w_j. A program has x and y whole and a slice of w's columns, so that no sum is split.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._core.triton_kernel import inverse, load_rows, narrow


@triton.jit
def _feature(x, real, stabilizer, FEATURE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """φ(x) as products take it, 0 where not real. Its sums are of the same rounded numbers, so that the gradients of
    numerator and denominator cancel as they should."""
    if FEATURE == "elu1":
        x = tl.maximum(x, 0) + tl.exp(tl.minimum(x, 0))
    elif FEATURE == "relu":
        x = tl.maximum(x, 0)
    elif FEATURE == "relu2":
        x = tl.maximum(x, 0) * tl.maximum(x, 0)
    elif FEATURE == "exp":
        x = tl.exp(x - stabilizer)
    x = tl.where(real, x, 0)
    return narrow(x, DOT, PRECISION)


@triton.jit
def _lowest(
    q, batch, rows, keep, head, stabilizer, K: tl.constexpr, FEATURE: tl.constexpr, NORMALIZE: tl.constexpr,
    ALL_K: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What "exp" lowers queries by, [BT, 1]: the largest of a row where that cancels."""
    if FEATURE == "exp" and NORMALIZE:
        columns = tl.arange(0, ALL_K)
        x = load_rows(q, batch, rows, keep, head, columns, K).to(ACC)
        return tl.max(tl.where((columns < K)[None, :], x, -float("inf")), 1)[:, None]
    return tl.full([BT, 1], 1.0, ACC) * stabilizer


@triton.jit
def _slope(x, stabilizer, FEATURE: tl.constexpr):
    """φ′(x)."""
    if FEATURE == "elu1":
        return tl.exp(tl.minimum(x, 0))
    elif FEATURE == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif FEATURE == "relu2":
        return 2 * tl.maximum(x, 0)
    elif FEATURE == "exp":
        return tl.exp(x - stabilizer)
    else:
        return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Neighbouring columns turned by cos and sin [ROWS, COLUMNS / 2]."""
    x0, x1 = tl.split(tl.reshape(x, [ROWS, COLUMNS // 2, 2]))
    return tl.reshape(tl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin), [ROWS, COLUMNS])


@triton.jit
def _angles(
    tables, positions, first_column, table_length, COLUMNS: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """cos and sin [BT, COLUMNS / 2] of the pairs from a column on: 1 and 0 where nothing turns, NaN past the tables."""
    cos, sin = tables
    pairs = first_column // 2 + tl.arange(0, COLUMNS // 2)
    turns = (positions >= 0)[:, None] & (pairs < R // 2)[None, :]
    known = turns & (positions < table_length)[:, None]
    at = positions[:, None] * cos[1] + pairs[None, :] * cos[2]
    c = tl.load(cos[0] + at, mask=known, other=float("nan")).to(ACC)
    at = positions[:, None] * sin[1] + pairs[None, :] * sin[2]
    s = tl.load(sin[0] + at, mask=known, other=float("nan")).to(ACC)
    return tl.where(turns, c, 1.0), tl.where(turns, s, 0.0)


@triton.jit
def _power(n, log_gamma, ACC: tl.constexpr):
    """γ^n for n up to a chunk, by log2 γ in two parts: the first is exact in products with n."""
    coarse = tl.floor(log_gamma * 4096) / 4096
    return tl.exp2(n.to(ACC) * coarse.to(ACC)) * tl.exp2(n.to(ACC) * (log_gamma - coarse).to(ACC))


@triton.jit
def _dot(x, y, total, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(x.to(DOT), y.to(DOT), acc=total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _add_product(state, x, y, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """state + x·y. Tensor cores cut off what they add to a long sum: float32 and float16 would notice, bfloat16 not."""
    if tl.bfloat16 == DOT:
        return _dot(x, y, state, DOT, ACC, PRECISION)
    return state + tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _meet(
    q, g, den_ptr, e_ptr, batch, batches, length, heads, q_head, part, rows, inside, keep, k_dims, v_dims, cos, sin, b,
    turned_b, values, state, z, since, until, kept, weight, stabilizer, eps, scale, total, side,
    ROLE: tl.constexpr, SUM: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, FEATURE: tl.constexpr,
    NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, SLICES: tl.constexpr, E_PARTS: tl.constexpr, ALL_K: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A query head's chunk meets its keys and values: what that adds to the outputs and to the state after it.

    -> total [BT, BW]; side [BT, BK], what is to be added to it after it has turned back, if it turns; state and z after
    the chunk; the denominators [BT] ("o").
    """
    REVERSE: tl.constexpr = ROLE == "dk" or ROLE == "dv"
    row = (batch * length + rows) * heads + q_head
    den = tl.full([BT], 1.0, ACC)
    e = tl.zeros([BT], ACC)
    x, y, w = values, values, turned_b  # dq, where only its sum is asked for
    if ROLE == "o":
        y, w = turned_b, values
    a = b
    turned_a = b
    if REVERSE or not SUM:
        raw = load_rows(q, batch, rows, keep, q_head, k_dims, K).to(ACC)
        lowest = _lowest(q, batch, rows, keep, q_head, stabilizer, K, FEATURE, NORMALIZE, ALL_K, BT, ACC)
        a = _feature(raw, keep[:, None] & (k_dims < K)[None, :], lowest, FEATURE, DOT, PRECISION)  # [BT, BK]
        turned_a = a
        if R > 0:
            turned_a = _turn(a.to(ACC), cos, sin, BT, BK).to(DOT)
        if ROLE == "o":
            x = turned_a
        else:
            if NORMALIZE:
                den = tl.load(den_ptr + row, mask=keep, other=0)
            factor = inverse(den) if NORMALIZE else den * scale
            grad = load_rows(g, batch, rows, keep, q_head, v_dims, V).to(ACC) * factor[:, None]
            grad = grad.to(DOT)  # [BT, BV]
            if NORMALIZE and (ROLE == "dk" or (ROLE == "dq" and SLICES > 1)):
                for m in tl.static_range(E_PARTS):
                    e += tl.load(e_ptr + m * (batches * length * heads) + row, mask=keep, other=0)
            if ROLE == "dq" or ROLE == "e":
                x = grad
            elif ROLE == "dk":
                x, y, w = values, grad, turned_a
            else:
                x, y, w = turned_b, turned_a, grad

    if not SUM:
        if not REVERSE:
            total = _dot(x, state, total, DOT, ACC, PRECISION) * since[:, None]
        if CAUSAL:
            scores = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=ACC) * weight  # [BT, BT]
            total = _dot(scores, w, total, DOT, ACC, PRECISION)
        if NORMALIZE:
            if ROLE == "o":
                den = tl.sum(a.to(ACC) * z[None, :], 1) * since + eps
                if CAUSAL:
                    plain = scores
                    if R > 0:
                        plain = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC) * weight
                    den += tl.sum(plain, 1)
                if part == 0:
                    tl.store(den_ptr + row, den, mask=inside)
            elif ROLE == "e":
                share = -tl.sum(total * turned_a.to(ACC), 1) * factor
                tl.store(e_ptr + part * (batches * length * heads) + row, share, mask=inside)
            elif ROLE == "dq":
                if SLICES == 1:
                    e = -tl.sum(total * turned_a.to(ACC), 1) * factor
                    tl.store(e_ptr + row, e, mask=inside)
                beside = side if R > 0 else total
                beside += z[None, :] * (since * e)[:, None]
                if CAUSAL:
                    beside = _dot(weight * e[:, None], b, beside, DOT, ACC, PRECISION)
                if R > 0:
                    side = beside
                else:
                    total = beside
            elif ROLE == "dk" and CAUSAL:
                if R > 0:
                    side = _dot(weight, a.to(ACC) * e[:, None], side, DOT, ACC, PRECISION)
                else:
                    total = _dot(weight, a.to(ACC) * e[:, None], total, DOT, ACC, PRECISION)
    if CAUSAL or SUM:
        added = tl.sum(b.to(ACC) * until[:, None], 0)
        if ROLE == "dk":
            added = tl.sum(a.to(ACC) * (e * until)[:, None], 0)
        z = z * kept + added
        state = _add_product(state * kept, tl.trans(y), w.to(ACC) * until[:, None], DOT, ACC, PRECISION)
    return total, side, state, z, den


@triton.jit(do_not_specialize=["length", "heads", "segment", "table_length", "offset", "stabilizer", "eps", "scale"])
def linear_attention_kernel(
    q, k, v, g, out, den_ptr, e_ptr, state_in, z_in, state_out, z_out, sums_ptr, z_sums_ptr, decay_ptr, tables,
    offsets_ptr, mask, cu_seqlens_ptr, batches, length, heads, segment, segments, table_length, offset, stabilizer, eps,
    scale, ROLE: tl.constexpr, SUM: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, SLICES: tl.constexpr, E_PARTS: tl.constexpr, ALL_K: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a slice of the output's columns, of one head, for a segment of a sequence.

    q, k, v, g = grad_o, out: (pointer, strides of b, t, h, d). state_in, state_out, z_in, z_out: (pointer, strides of
    n, h and of the columns of x and w). SUM: writes the sums over the segment to sums_ptr and z_sums_ptr, nothing else.
    ROLE "e" is "dq" up to the gradients of turned features, of which it makes a slice's part of e. ALL_K: K to the next
    power of two.
    """
    REVERSE: tl.constexpr = ROLE == "dk" or ROLE == "dv"
    K_INNER: tl.constexpr = ROLE == "o" or ROLE == "dv"  # x and y are features, w are values
    HAS_Z: tl.constexpr = NORMALIZE and ROLE != "dv"
    BX: tl.constexpr = BK if K_INNER else BV
    BW: tl.constexpr = BV if K_INNER else BK

    pid = tl.program_id(0).to(tl.int64)
    part = pid % SLICES
    kv_heads = heads // GROUP
    programs = kv_heads if REVERSE or SUM else heads
    head = pid // SLICES % programs
    this_segment = pid // (SLICES * programs) % segments
    n = pid // (SLICES * programs * segments)
    kv_head = head if REVERSE or SUM else head // GROUP

    batch, begin, tokens = n, n * 0, n * 0 + length
    if cu_seqlens_ptr is not None:
        batch = n * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + n).to(tl.int64), 0), length)
        end = tl.minimum(tl.load(cu_seqlens_ptr + n + 1).to(tl.int64), length)
        tokens = tl.maximum(end - begin, 0)
    first = this_segment * segment
    if first >= tokens and this_segment > 0:
        return
    last = tl.minimum(first + segment, tokens)
    log_gamma = tl.full([], 0.0, tl.float64)
    if decay_ptr is not None:
        log_gamma = tl.log2(tl.load(decay_ptr + kv_head))

    k_first = 0 if K_INNER else part * BK
    v_first = part * BV if K_INNER else 0
    k_columns = k_first + tl.arange(0, BK)
    k_dims = k_columns  # in an order in which the pairs that RoPE turns are neighbours
    if not INTERLEAVED:
        k_dims = tl.where(k_columns < R, k_columns // 2 + k_columns % 2 * (R // 2), k_columns)
    v_dims = v_first + tl.arange(0, BV)
    if K_INNER:
        x_dims, w_dims = k_dims, v_dims
        real_state = (k_dims < K)[:, None] & (v_dims < V)[None, :]
    else:
        x_dims, w_dims = v_dims, k_dims
        real_state = (v_dims < V)[:, None] & (k_dims < K)[None, :]

    # What the segment starts from: the sum over all that is before it, or after it.
    state = tl.zeros([BX, BW], ACC)
    z = tl.zeros([BK], ACC)
    sums = sums_ptr
    z_sums = z_sums_ptr
    if sums_ptr is not None:
        row = ((n * segments) * kv_heads + kv_head) * SLICES + part
        sums += row * BX * BW + tl.arange(0, BX)[:, None] * BW + tl.arange(0, BW)[None, :]
        z_sums += row * BK + tl.arange(0, BK)
    next_sum = kv_heads * SLICES
    if not SUM:
        if state_in[0] is not None:
            from_ptr = state_in[0] + n * state_in[1] + kv_head * state_in[2]
            from_ptr += x_dims[:, None] * state_in[3] + w_dims[None, :] * state_in[4]
            state += tl.load(from_ptr, mask=real_state, other=0)
        if HAS_Z and z_in[0] is not None:
            z += tl.load(z_in[0] + n * z_in[1] + kv_head * z_in[2] + k_dims * z_in[3], mask=k_dims < K, other=0)
        if sums_ptr is not None:
            used = tl.cdiv(tokens, segment)
            others = used
            if CAUSAL:
                others = used - 1 - this_segment if REVERSE else this_segment
            for m in range(others):
                other = used - 1 - m if REVERSE else m + 0 * used
                kept = tl.exp2(log_gamma * tl.minimum(segment, tokens - other * segment)).to(ACC)
                state = state * kept + tl.load(sums + other * next_sum * BX * BW)
                if HAS_Z:
                    z = z * kept + tl.load(z_sums + other * next_sum * BK)

    i = tl.arange(0, BT)
    apart = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]  # how far row i is from what it adds
    chunks = tl.cdiv(last - first, BT)
    for c in range(chunks):
        chunk = chunks - 1 - c if REVERSE else c + 0 * chunks
        count = tl.minimum(last - first - chunk * BT, BT)
        inside = i < count
        place = first + chunk * BT + i  # [BT], in the sequence
        rows = begin + place
        keep = inside
        if mask[0] is not None:
            keep &= tl.load(mask[0] + batch * mask[1] + rows * mask[2], mask=inside, other=0) != 0
        cos, sin = tl.full([BT, BK // 2], 1.0, ACC), tl.zeros([BT, BK // 2], ACC)
        if R > 0:
            position = place + offset
            if offsets_ptr is not None:
                position = place + tl.load(offsets_ptr + n)
            cos, sin = _angles(tables, tl.where(keep, position, -1), k_first, table_length, BK, R, ACC)

        # How much is left: of the state at a row, of a row after the chunk, of the state there.
        weight = tl.where(apart >= 0, 1.0, 0.0).to(ACC)  # [BT, BT]
        since = tl.full([BT], 1.0, ACC)
        until = tl.full([BT], 1.0, ACC)
        kept = tl.full([], 1.0, ACC)
        if decay_ptr is not None:
            weight = tl.where(apart >= 0, _power(tl.maximum(apart, 0), log_gamma, ACC), 0.0)
            later = _power(i + 1, log_gamma, ACC)
            earlier = _power(tl.maximum(count - 1 - i, 0), log_gamma, ACC)
            since, until = (earlier, later) if REVERSE else (later, earlier)
            kept = _power(count, log_gamma, ACC)

        real = keep[:, None] & (k_dims < K)[None, :]
        raw_k = load_rows(k, batch, rows, keep, kv_head, k_dims, K).to(ACC)
        b = _feature(raw_k, real, stabilizer, FEATURE, DOT, PRECISION)  # [BT, BK]
        turned_b = b
        if R > 0:
            turned_b = _turn(b.to(ACC), cos, sin, BT, BK).to(DOT)
        values = turned_b  # dv, which has no need of them
        if ROLE != "dv":
            values = load_rows(v, batch, rows, keep, kv_head, v_dims, V).to(DOT)  # [BT, BV]

        total = tl.zeros([BT, BW], ACC)
        side = tl.zeros([BT, BK], ACC)
        if REVERSE:
            if not SUM:
                x = values if ROLE == "dk" else turned_b
                total = _dot(x, state, total, DOT, ACC, PRECISION) * since[:, None]
                if ROLE == "dk" and R > 0:
                    side = z[None, :] * since[:, None]
                elif ROLE == "dk":
                    total += z[None, :] * since[:, None]
            state *= kept
            z *= kept
            for h in range(GROUP):
                total, side, state, z, _ = _meet(
                    q, g, den_ptr, e_ptr, batch, batches, length, heads, head * GROUP + h, part, rows, inside, keep,
                    k_dims, v_dims, cos, sin, b, turned_b, values, state, z, since, until, 1.0, weight, stabilizer, eps,
                    scale, total, side, ROLE, SUM, K, V, R, FEATURE, NORMALIZE, CAUSAL, SLICES, E_PARTS, ALL_K, BT, BK,
                    ACC, DOT, PRECISION,
                )  # fmt: skip
        else:
            total, side, state, z, den = _meet(
                q, g, den_ptr, e_ptr, batch, batches, length, heads, head, part, rows, inside, keep, k_dims, v_dims,
                cos, sin, b, turned_b, values, state, z, since, until, kept, weight, stabilizer, eps, scale, total,
                side, ROLE, SUM, K, V, R, FEATURE, NORMALIZE, CAUSAL, SLICES, E_PARTS, ALL_K, BT, BK, ACC, DOT,
                PRECISION,
            )  # fmt: skip

        if not SUM:
            if ROLE == "o":
                if NORMALIZE:
                    total = tl.where((den != 0)[:, None], total / tl.where(den != 0, den, 1.0)[:, None], 0.0)
                else:
                    total *= scale
                total = tl.where(keep[:, None], total, 0.0)
            elif ROLE == "dv":
                total = tl.where(keep[:, None], total, 0.0)
            elif ROLE != "e":
                if R > 0:
                    total = _turn(total, cos, -sin, BT, BK)
                raw, lowest = raw_k, stabilizer
                if ROLE == "dq":  # once more: kept since above it would hold registers
                    raw = load_rows(q, batch, rows, keep, head, k_dims, K).to(ACC)
                    lowest = _lowest(q, batch, rows, keep, head, stabilizer, K, FEATURE, NORMALIZE, ALL_K, BT, ACC)
                total = tl.where(keep[:, None], (total + side) * _slope(raw, lowest, FEATURE), 0.0)
            if ROLE != "e":
                out_ptr = out[0] + batch * out[1] + rows[:, None] * out[2] + head * out[3] + w_dims[None, :] * out[4]
                columns = (w_dims < (V if K_INNER else K))[None, :]
                tl.store(out_ptr, total.to(out[0].dtype.element_ty), mask=inside[:, None] & columns)

    if SUM:
        tl.store(sums + this_segment * next_sum * BX * BW, state)
        if HAS_Z:
            tl.store(z_sums + this_segment * next_sum * BK, z)
    else:
        ends = this_segment == 0 if REVERSE else last >= tokens
        if ends:
            writes = part >= 0  # one of the heads that share the state
            if not REVERSE:
                writes = head % GROUP == 0
            if state_out[0] is not None:
                to_ptr = state_out[0] + n * state_out[1] + kv_head * state_out[2]
                to_ptr += x_dims[:, None] * state_out[3] + w_dims[None, :] * state_out[4]
                tl.store(to_ptr, state, mask=real_state & writes)
            if HAS_Z and z_out[0] is not None:
                if K_INNER:
                    writes &= part == 0
                z_ptr = z_out[0] + n * z_out[1] + kv_head * z_out[2] + k_dims * z_out[3]
                tl.store(z_ptr, z, mask=(k_dims < K) & writes)


@triton.jit(do_not_specialize=["length", "heads", "table_length", "offset", "stabilizer", "eps", "scale"])
def linear_attention_step_kernel(
    q, k, v, out, kv_ptr, z_ptr, slots_ptr, decay_ptr, tables, offsets_ptr, mask, length, heads, table_length, offset,
    stabilizer, eps, scale, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    FEATURE: tl.constexpr, NORMALIZE: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program: the tokens of one sequence, for a head of keys and the query heads that share it. The recurrence."""
    pid = tl.program_id(0).to(tl.int64)
    kv_heads = heads // GROUP
    batch, kv_head = pid // kv_heads, pid % kv_heads
    slot = batch
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + batch)
    state_row = slot * kv_heads + kv_head
    gamma = tl.full([], 1.0, ACC)
    if decay_ptr is not None:
        gamma = tl.load(decay_ptr + kv_head).to(ACC)
    k_columns = tl.arange(0, BK)
    k_dims = k_columns  # in an order in which the pairs that RoPE turns are neighbours
    if not INTERLEAVED:
        k_dims = tl.where(k_columns < R, k_columns // 2 + k_columns % 2 * (R // 2), k_columns)
    one = tl.arange(0, 1)

    z = tl.zeros([1, BK], ACC)
    for slice_of_v in range((V + BV - 1) // BV):
        v_dims = slice_of_v * BV + tl.arange(0, BV)
        at = (state_row * K + k_dims[:, None]) * V + v_dims[None, :]
        real_state = (k_dims < K)[:, None] & (v_dims < V)[None, :]
        state = tl.load(kv_ptr + at, mask=real_state, other=0)  # [BK, BV]
        z = tl.zeros([1, BK], ACC)
        if NORMALIZE:
            z += tl.load(z_ptr + state_row * K + k_dims, mask=k_dims < K, other=0)[None, :]
        for t in range(length):
            rows = one + t  # [1]
            keep = one == 0
            if mask[0] is not None:
                keep = tl.load(mask[0] + batch * mask[1] + rows * mask[2]) != 0
            cos, sin = tl.full([1, BK // 2], 1.0, ACC), tl.zeros([1, BK // 2], ACC)
            if R > 0:
                position = rows + offset
                if offsets_ptr is not None:
                    position = rows + tl.load(offsets_ptr + batch)
                cos, sin = _angles(tables, tl.where(keep, position, -1), 0, table_length, BK, R, ACC)
            real = keep[:, None] & (k_dims < K)[None, :]
            raw = load_rows(k, batch, rows, keep, kv_head, k_dims, K).to(ACC)
            b = _feature(raw, real, stabilizer, FEATURE, ACC, "ieee")  # [1, BK]
            values = load_rows(v, batch, rows, keep, kv_head, v_dims, V).to(ACC)  # [1, BV]
            z = z * gamma + b
            state = state * gamma + tl.trans(_turn(b, cos, sin, 1, BK)) * values
            for h in range(GROUP):
                head = kv_head * GROUP + h
                raw = load_rows(q, batch, rows, keep, head, k_dims, K).to(ACC)
                lowest = _lowest(q, batch, rows, keep, head, stabilizer, K, FEATURE, NORMALIZE, BK, 1, ACC)
                a = _feature(raw, real, lowest, FEATURE, ACC, "ieee")
                total = tl.sum(tl.trans(_turn(a, cos, sin, 1, BK)) * state, 0)[None, :]  # [1, BV]
                if NORMALIZE:
                    den = tl.sum(a * z, 1)[:, None] + eps
                    total = tl.where(den != 0, total / tl.where(den != 0, den, 1.0), 0.0)
                else:
                    total *= scale
                total = tl.where(keep[:, None], total, 0.0)
                out_ptr = out[0] + batch * out[1] + rows[:, None] * out[2] + head * out[3] + v_dims[None, :] * out[4]
                tl.store(out_ptr, total.to(out[0].dtype.element_ty), mask=(v_dims < V)[None, :])
        tl.store(kv_ptr + at, state, mask=real_state)
    if NORMALIZE:
        tl.store(z_ptr + state_row * K + k_dims, tl.reshape(z, [BK]), mask=k_dims < K)
