# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
# Generated when a model is saved, from the package lalm, which is where to change it.
from __future__ import annotations


# ---- lalm.modeling.ops.delta.dual_state_kernels ----
"""Triton kernels of the dual-state delta rule: the chunk form of dual_state.py, forward and backward.

Every number outside q, k, v is float32. In the order of a training step:
    prepare             all chunks at once: the products N and P, T = (I + A)^-1 by forward substitution, scores
    scan                chunk after chunk, a program per head and block of columns: U, the states between the chunks
    read_out            all chunks at once: o
    scan_back           the scan from the last chunk to the first: dR, the gradients of the states between the chunks
and then those of dual_state_gradients.py, again all chunks at once.
The forward pass keeps its inputs alone; the backward pass runs prepare and scan again.

With X_b = Z_b^T k, right sides R_a = beta_a (v - sum_b P_ab X_b) and A_ia,jb = beta_ia (k_i . k_j) N_ij,ab for j < i:
    U = T R         o_i = sum_b (rho_i^T P_i)_b Z_b^T q_i + sum_jb (q_i . k_j) (rho_i^T N_ij)_b u_jb
    Z_out,a = sum_b (C_last P_last)_ab Z_b + sum_j k_j (sum_b G_ab,j u_jb)^T        G_j = C_last N_last,j
and back, from dU: dR = T^T dU, dA = -dR U^T. The gradient of a step comes from products too; nothing is divided:
    dB_m = sum_ij N_im^T dN_ij N_m-1,j^T + sum_i N_im^T dP_i P_m-1^T
Tokens past the end have k = q = beta = 0, g = 0 and C = I, and change nothing.

Rows of size R = M C run over memories and, inside a memory, over tokens: 64 rows make full use of four warps. Buffers,
for every head of every sequence and every chunk of it, `entering` and `leaving` for the states between chunks:
    solve T, between N `[R, R]`; scores `[R, C]`, the earlier token first; entering, leaving `[M, K, V]`;
    updates U, errors dR `[R, V]`; factors `[2 M + 2, R]`: rows b < M are P_ab,i and rows M + a are G_ab,j, both along
    R; row 2 M is (rho_i^T P_i)_b along R, row 2 M + 1 begins with C_last P_last.
"""


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("linear_attn_implementation='triton' needs Triton: pip install triton") from error


def interpreted() -> bool:
    """Whether the kernels run on the CPU, in Triton's interpreter."""
    return not isinstance(prepare, triton.JITFunction)


@triton.jit
def place(chunk, length, heads, C: tl.constexpr):
    """Of the running number of a chunk: its first token, that one's place in `[B T]` and its row in `[B T H, *]`."""
    chunks = tl.cdiv(length, C)
    head, first = chunk // chunks, (chunk % chunks) * C
    at_token = (head // heads) * length + first
    return first, at_token, at_token * heads + head % heads


@triton.jit
def tile(x, rows, width, columns, there):
    """Rows of `x [*, width]` as float32, zeros where not `there` and past the width."""
    there = there[:, None] & (columns < width)[None, :]
    return tl.load(x + rows[:, None] * width + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def put(x, rows, width, columns, there, values):
    there = there[:, None] & (columns < width)[None, :]
    tl.store(x + rows[:, None] * width + columns[None, :], values.to(x.dtype.element_ty), mask=there)


@triton.jit
def square(x, index, columns, width: tl.constexpr):
    """A matrix `x [*, width]` that has no ragged edge."""
    return tl.load(x + index[:, None] * width + columns[None, :])


@triton.jit
def _times(x, y, M: tl.constexpr):
    """Matrix product of tuples: x of M numbers a row; y of M rows."""
    columns: tl.constexpr = len(y) // M
    product = ()
    for a in tl.static_range(len(x) // M):
        for b in tl.static_range(columns):
            entry = x[a * M] * y[b]
            for c in tl.static_range(1, M):
                entry += x[a * M + c] * y[c * columns + b]
            product += (entry,)
    return product


@triton.jit
def prepare(
    q, k, g, beta, read, leak, starts, factors, solve, scores, between, scale, length, heads, key_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    first, at_token, row = place(chunk, length, heads, C)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    there, rows = first + index % C < length, row + index % C * heads
    later = tile(k, row + tokens * heads, key_size, columns, first + tokens < length)
    keys = tl.dot(tile(k, rows, key_size, columns, there), tl.trans(later), input_precision=PRECISION)
    factors += chunk * (2 * M + 2) * R

    coupling, since, reach = (), (), ()
    for a in tl.static_range(M):
        reach += (tl.zeros([R], tl.float32),)  # N of this token, memory a, and all earlier ones
        for b in tl.static_range(M):
            coupling += (tl.full([], 1.0 * (a == b), tl.float32),)  # C of the token before
            since += (tl.full([], 1.0 * (a == b), tl.float32),)  # P of this token
    inverse = tl.where(index[:, None] == index[None, :], 1.0, 0.0)
    weights = tl.zeros([R, C], tl.float32)
    for i in range(C):
        inside, at = first + i < length, row + i * heads
        steps, after, strengths, reads, marked = (), (), (), (), ()
        for a in tl.static_range(M):
            decay = tl.exp(tl.load(g + at * M + a, mask=inside, other=0.0))
            if starts is not None:
                decay = tl.where(tl.load(starts + at_token + i, mask=inside, other=0) != 0, 0.0, decay)
            strengths += (tl.load(beta + at * M + a, mask=inside, other=0.0),)
            reads += (tl.load(read + at * M + a, mask=inside, other=0.0) * scale,)
            for b in tl.static_range(M):
                steps += (decay * coupling[a * M + b],)
                after += (tl.load(leak + (at * M + a) * M + b, mask=inside, other=0.0) + 1.0 * (a == b),)
        coupling, since, reach = after, _times(steps, since, M), _times(steps, reach, M)
        key_i = tl.sum(tl.where(tokens[None, :] == i, keys, 0.0), 1)
        for a in tl.static_range(M):
            if DELTA:  # rows i of T are those of the unit matrix less A times the rows above
                above = strengths[a] * tl.sum((reach[a] * key_i)[:, None] * inverse, 0)
                inverse = tl.where(index[:, None] == a * C + i, inverse - above[None, :], inverse)
            marked += (tl.where(index == a * C + i, 1.0, reach[a]),)
            if between is not None:
                tl.store(between + (chunk * R + a * C + i) * R + index, marked[a])
        reach, rho = marked, _times(reads, coupling, M)
        read_since = _times(rho, since, M)
        for a in tl.static_range(M):
            weights += tl.where(tokens[None, :] == i, (rho[a] * reach[a])[:, None], 0.0)
            tl.store(factors + 2 * M * R + a * C + i, read_since[a])
            for b in tl.static_range(M):
                tl.store(factors + b * R + a * C + i, since[a * M + b])
    writes, kept = _times(coupling, reach, M), _times(coupling, since, M)
    for a in tl.static_range(M):
        tl.store(factors + (M + a) * R + index, writes[a])
        for b in tl.static_range(M):
            tl.store(factors + (2 * M + 1) * R + a * M + b, kept[a * M + b])
    if DELTA:
        tl.store(solve + (chunk * R + index[:, None]) * R + index[None, :], inverse)
    query = tile(q, row + tokens * heads, key_size, columns, first + tokens < length)
    pairs = tl.dot(tile(k, rows, key_size, columns, there), tl.trans(query), input_precision=PRECISION)
    tl.store(scores + (chunk * R + index[:, None]) * C + tokens[None, :], weights * pairs)


@triton.jit
def scan(
    k, v, beta, factors, solve, initial, entering, updates, final, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = M * C
    head = tl.program_id(0).to(tl.int64)
    index, columns, values = tl.arange(0, R), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    chunks = tl.cdiv(length, C)
    state = ()
    for a in tl.static_range(M):
        if initial is not None:
            rows = (head * M + a) * key_size + columns
            state += (tile(initial, rows, value_size, values, columns < key_size),)
        else:
            state += (tl.zeros([BK, BV], tl.float32),)
    _, _, start = place(head * chunks, length, heads, C)
    token = index % C
    following = tile(k, start + token * heads, key_size, columns, token < length)
    for n in range(chunks):
        chunk, rows = head * chunks + n, start + (n * C + token) * heads
        there = n * C + token < length
        key = following  # read a chunk ahead: waiting for it would be the longest part of a step
        following = tile(k, rows + C * heads, key_size, columns, (n + 1) * C + token < length)
        error = tile(v, rows, value_size, values, there)
        factor = factors + chunk * (2 * M + 2) * R
        kept = ()
        for pair in tl.static_range(M * M):
            kept += (tl.load(factor + (2 * M + 1) * R + pair),)
        for b in tl.static_range(M):
            put(entering, (chunk * M + b) * key_size + columns, value_size, values, columns < key_size, state[b])
            if DELTA:
                found = tl.dot(key, state[b], input_precision=PRECISION)
                error -= tl.load(factor + b * R + index)[:, None] * found
        update = tl.load(beta + rows * M + index // C, mask=there, other=0.0)[:, None] * error
        if DELTA:
            update = tl.dot(square(solve + chunk * R * R, index, index, R), update, input_precision=PRECISION)
        put(updates, chunk * R + index, value_size, values, index < R, update)
        after = ()
        for a in tl.static_range(M):
            fresh = tl.zeros([BK, BV], tl.float32)
            for b in tl.static_range(M):
                fresh += kept[a * M + b] * state[b]
            write = tl.load(factor + (M + a) * R + index)[:, None] * update
            after += (tl.dot(tl.trans(key), write, fresh, input_precision=PRECISION),)
        state = after
    for a in tl.static_range(M):
        put(final, (head * M + a) * key_size + columns, value_size, values, columns < key_size, state[a])


@triton.jit
def read_out(
    q, factors, scores, entering, updates, o, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    first, _, row = place(chunk, length, heads, C)
    there, rows = first + tokens < length, row + tokens * heads
    query = tile(q, rows, key_size, columns, there)
    update = tile(updates, chunk * R + index, value_size, values, index < R)
    weights = tl.trans(square(scores + chunk * R * C, index, tokens, C))
    total = tl.dot(weights, update, input_precision=PRECISION)
    for b in tl.static_range(M):
        state = tile(entering, (chunk * M + b) * key_size + columns, value_size, values, columns < key_size)
        weight = tl.load(factors + (chunk * (2 * M + 2) + 2 * M) * R + b * C + tokens)
        total += weight[:, None] * tl.dot(query, state, input_precision=PRECISION)
    put(o, rows, value_size, values, there, total)


@triton.jit
def scan_back(
    q, k, beta, factors, solve, scores, d_o, d_final, leaving, errors, d_initial, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = M * C
    head = tl.program_id(0).to(tl.int64)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    chunks = tl.cdiv(length, C)
    d_state = ()
    for a in tl.static_range(M):
        if d_final is not None:
            rows = (head * M + a) * key_size + columns
            d_state += (tile(d_final, rows, value_size, values, columns < key_size),)
        else:
            d_state += (tl.zeros([BK, BV], tl.float32),)
    _, _, start = place(head * chunks, length, heads, C)
    token, final = index % C, (chunks - 1) * C
    following = tile(k, start + (final + token) * heads, key_size, columns, final + token < length)
    query_following = tile(q, start + (final + tokens) * heads, key_size, columns, final + tokens < length)
    for n in range(chunks):
        first = final - n * C
        chunk, rows, row = head * chunks + chunks - 1 - n, start + (first + token) * heads, start + first * heads
        there = first + token < length
        key, query = following, query_following
        following = tile(k, rows - C * heads, key_size, columns, token < first)
        query_following = tile(q, row + (tokens - C) * heads, key_size, columns, tokens < first)
        d_out = tile(d_o, row + tokens * heads, value_size, values, first + tokens < length)
        factor = factors + chunk * (2 * M + 2) * R
        kept = ()
        for pair in tl.static_range(M * M):
            kept += (tl.load(factor + (2 * M + 1) * R + pair),)
        d_right = tl.dot(square(scores + chunk * R * C, index, tokens, C), d_out, input_precision=PRECISION)
        for a in tl.static_range(M):
            put(leaving, (chunk * M + a) * key_size + columns, value_size, values, columns < key_size, d_state[a])
            gained = tl.dot(key, d_state[a], input_precision=PRECISION)
            d_right += tl.load(factor + (M + a) * R + index)[:, None] * gained
        if DELTA:
            transposed = tl.trans(square(solve + chunk * R * R, index, index, R))
            d_right = tl.dot(transposed, d_right, input_precision=PRECISION)
        put(errors, chunk * R + index, value_size, values, index < R, d_right)
        strength = tl.load(beta + rows * M + index // C, mask=there, other=0.0)
        after = ()
        for b in tl.static_range(M):
            fresh = tl.zeros([BK, BV], tl.float32)
            for a in tl.static_range(M):
                fresh += kept[a * M + b] * d_state[a]
            reading = tl.load(factor + 2 * M * R + b * C + tokens)[:, None] * d_out
            fresh = tl.dot(tl.trans(query), reading, fresh, input_precision=PRECISION)
            if DELTA:
                lost = (strength * tl.load(factor + b * R + index))[:, None] * d_right
                fresh -= tl.dot(tl.trans(key), lost, input_precision=PRECISION)
            after += (fresh,)
        d_state = after
    for a in tl.static_range(M):
        put(d_initial, (head * M + a) * key_size + columns, value_size, values, columns < key_size, d_state[a])


# ---- lalm.modeling.ops.delta.dual_state_gradients ----
"""Triton kernels of the dual-state delta rule: the gradients of the inputs, all chunks at once.

What the names and buffers mean stands in dual_state_kernels.py. Three kernels, so that each fits the registers:
    state_gradients     what comes through the states between the chunks: to v, to q and k, to the factors
    pair_gradients      what comes through the pairs of tokens of a chunk: to q, k, beta, and to N
    gate_gradients      from N and P to the steps B, and from them to the other gates
Between them go `d_between [R, R]`, the gradient of N, and `shares [2 M + 4, R]`, gradients of P_ab (rows b), G_ab
(rows M + a), rho (2 M), beta (2 M + 1), C_last P_last (2 M + 2) and, what pair_gradients adds, rho (2 M + 3).
"""




@triton.jit
def _fold(x, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Sum over the memories of a token: `[R, D] -> [C, D]`."""
    return tl.sum(tl.reshape(x, [M, C, D]), 0)


@triton.jit
def _pick(x, at, index):
    """Entries `at` of the vector x, zero for those that it does not have."""
    return tl.sum(tl.where(at[:, None] == index[None, :], x[None, :], 0.0), 1)


@triton.jit
def _rho(read, leak, rows, memory, there, scale, M: tl.constexpr):
    rho = tl.zeros_like(memory).to(tl.float32)
    for a in tl.static_range(M):
        coupling = tl.load(leak + (rows * M + a) * M + memory, mask=there, other=0.0) + tl.where(memory == a, 1.0, 0.0)
        rho += tl.load(read + rows * M + a, mask=there, other=0.0) * scale * coupling
    return rho


@triton.jit
def state_gradients(
    q, k, v, beta, read, leak, factors, entering, leaving, updates, errors, d_o, d_v, share_q, share_k, shares,
    scale, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_v, and shares in the gradients of q and k and (`shares`) of factors, rho and beta."""
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    first, _, row = place(chunk, length, heads, C)
    there, rows = first + index % C < length, row + index % C * heads
    key = tile(k, rows, key_size, columns, there)
    query = tile(q, rows, key_size, columns, there)
    factor = factors + chunk * (2 * M + 2) * R
    strength = tl.load(beta + rows * M + index // C, mask=there, other=0.0)
    rho = _rho(read, leak, rows, index // C, there, scale, M)

    d_query, d_key = tl.zeros([R, BK], tl.float32), tl.zeros([R, BK], tl.float32)
    d_strength, d_rho = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    d_since, d_writes, d_kept = (), (), ()
    for _ in tl.static_range(M):
        d_since += (tl.zeros([R], tl.float32),)
        d_writes += (tl.zeros([R], tl.float32),)
    for _ in tl.static_range(M * M):
        d_kept += (tl.full([], 0.0, tl.float32),)
    for start in range(0, value_size, BV):
        values = start + tl.arange(0, BV)
        d_out = tile(d_o, rows, value_size, values, there)
        error = tile(v, rows, value_size, values, there)
        update = tile(updates, chunk * R + index, value_size, values, index < R)
        d_right = tile(errors, chunk * R + index, value_size, values, index < R)
        d_error = strength[:, None] * d_right
        put(d_v, row + tokens * heads, value_size, values, first + tokens < length, _fold(d_error, M, C, BV))
        states, since_after, writes_after, kept_after = (), (), (), ()
        for b in tl.static_range(M):
            state = tile(entering, (chunk * M + b) * key_size + columns, value_size, values, columns < key_size)
            since = tl.load(factor + b * R + index)
            reading = tl.dot(d_out, tl.trans(state), input_precision=PRECISION)
            d_query += (rho * since)[:, None] * reading
            weight = tl.sum(query * reading, 1)
            d_rho += since * weight
            change = d_since[b] + rho * weight
            if DELTA:
                found = tl.dot(key, state, input_precision=PRECISION)
                error -= since[:, None] * found
                change -= tl.sum(d_error * found, 1)
                d_key -= tl.dot(since[:, None] * d_error, tl.trans(state), input_precision=PRECISION)
            states += (state,)
            since_after += (change,)
        d_strength += tl.sum(d_right * error, 1)
        for a in tl.static_range(M):
            d_state = tile(leaving, (chunk * M + a) * key_size + columns, value_size, values, columns < key_size)
            gained = tl.dot(key, d_state, input_precision=PRECISION)
            writes_after += (d_writes[a] + tl.sum(gained * update, 1),)
            write = tl.load(factor + (M + a) * R + index)[:, None] * update
            d_key = tl.dot(write, tl.trans(d_state), d_key, input_precision=PRECISION)
            for b in tl.static_range(M):
                kept_after += (d_kept[a * M + b] + tl.sum(tl.sum(d_state * states[b], 1), 0),)
        d_since, d_writes, d_kept = since_after, writes_after, kept_after
    put(share_q, row + tokens * heads, key_size, columns, first + tokens < length, _fold(d_query, M, C, BK))
    put(share_k, row + tokens * heads, key_size, columns, first + tokens < length, _fold(d_key, M, C, BK))
    shares += chunk * (2 * M + 4) * R
    for a in tl.static_range(M):
        tl.store(shares + a * R + index, d_since[a])
        tl.store(shares + (M + a) * R + index, d_writes[a])
        for b in tl.static_range(M):
            tl.store(shares + (2 * M + 2) * R + a * M + b, d_kept[a * M + b])
    tl.store(shares + 2 * M * R + index, d_rho)
    tl.store(shares + (2 * M + 1) * R + index, d_strength)


@triton.jit
def pair_gradients(
    q, k, beta, read, leak, factors, between, updates, errors, d_o, share_q, share_k, shares,
    d_q, d_k, d_beta, d_between, scale, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_q, d_k, d_beta, d_between and the last row of shares."""
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    first, _, row = place(chunk, length, heads, C)
    token, memory = index % C, index // C
    there, rows = first + token < length, row + token * heads
    share = shares + chunk * (2 * M + 4) * R
    of_scores, of_solve = tl.zeros([R, R], tl.float32), tl.zeros([R, R], tl.float32)
    for start in range(0, value_size, BV):
        values = start + tl.arange(0, BV)
        update = tl.trans(tile(updates, chunk * R + index, value_size, values, index < R))
        d_out = tile(d_o, rows, value_size, values, there)
        of_scores = tl.dot(d_out, update, of_scores, input_precision=PRECISION)
        if DELTA:
            d_right = tile(errors, chunk * R + index, value_size, values, index < R)
            of_solve = tl.dot(d_right, update, of_solve, input_precision=PRECISION)

    key = tile(k, rows, key_size, columns, there)
    query = tile(q, rows, key_size, columns, there)
    reach = square(between + chunk * R * R, index, index, R)  # row: the later token
    rho = _rho(read, leak, rows, memory, there, scale, M)
    d_strength = tl.load(share + (2 * M + 1) * R + index)
    d_pairs = of_scores * rho[:, None] * reach
    d_query = tl.dot(d_pairs, key, input_precision=PRECISION)
    d_key = tl.dot(tl.trans(d_pairs), query, input_precision=PRECISION)
    seen = of_scores * tl.dot(query, tl.trans(key), input_precision=PRECISION)
    tl.store(share + (2 * M + 3) * R + index, tl.sum(seen * reach, 1))
    d_reach = rho[:, None] * seen
    earlier = token[:, None] > token[None, :]
    if DELTA:
        strength = tl.load(beta + rows * M + memory, mask=there, other=0.0)
        of_solve = tl.where(earlier, of_solve, 0.0)
        d_keys = of_solve * strength[:, None] * reach
        d_key -= tl.dot(d_keys + tl.trans(d_keys), key, input_precision=PRECISION)
        solved = of_solve * tl.dot(key, tl.trans(key), input_precision=PRECISION)
        d_strength -= tl.sum(solved * reach, 1)
        d_reach -= strength[:, None] * solved
    # The last token's N goes on into the next chunk through its coupling.
    for a in tl.static_range(M):
        end = _end(leak, rows, memory, token == C - 1, there, a, M)
        d_reach += end[:, None] * tl.load(share + (M + a) * R + index)[None, :]
    tl.store(d_between + (chunk * R + index[:, None]) * R + index[None, :], tl.where(earlier, d_reach, 0.0))
    tl.store(d_beta + rows * M + memory, d_strength, mask=there)

    inside, rows = first + tokens < length, row + tokens * heads
    d_query = _fold(d_query, M, C, BK) + tile(share_q, rows, key_size, columns, inside)
    d_key = _fold(d_key, M, C, BK) + tile(share_k, rows, key_size, columns, inside)
    put(d_q, rows, key_size, columns, inside, d_query)
    put(d_k, rows, key_size, columns, inside, d_key)


@triton.jit
def _end(leak, rows, memory, last, there, a, M: tl.constexpr):
    """C_ac of the last token in the rows (c, last), zero elsewhere."""
    coupling = tl.load(leak + (rows * M + a) * M + memory, mask=last & there, other=0.0)
    return tl.where(last, coupling + tl.where(memory == a, 1.0, 0.0), 0.0)


@triton.jit
def gate_gradients(
    g, read, leak, starts, factors, between, d_between, shares, d_g, d_read, d_leak, scale, length, heads,
    M: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, R)
    first, at_token, row = place(chunk, length, heads, C)
    token, memory = index % C, index // C
    there, rows, last = first + token < length, row + token * heads, token == C - 1
    factor, share = factors + chunk * (2 * M + 2) * R, shares + chunk * (2 * M + 4) * R
    between += chunk * R * R
    # Sums over the later token of N^T dN and N^T dP: what each step passed on, and to what.
    reach = tl.trans(square(between, index, index, R))
    passed = tl.dot(reach, square(d_between + chunk * R * R, index, index, R), input_precision=PRECISION)
    through = ()
    for b in tl.static_range(M):
        product = tl.load(share + b * R + index)
        for a in tl.static_range(M):
            product += _end(leak, rows, memory, last, there, a, M) * tl.load(share + (2 * M + 2) * R + a * M + b)
        through += (tl.sum(reach * product[None, :], 1),)

    decay = tl.exp(tl.load(g + rows * M + memory, mask=there, other=0.0))
    if starts is not None:
        decay = tl.where(tl.load(starts + at_token + token, mask=there, other=0) != 0, 0.0, decay)
    reading = tl.load(read + rows * M + memory, mask=there, other=0.0) * scale
    d_rho = tl.load(share + 2 * M * R + index) + tl.load(share + (2 * M + 3) * R + index)
    d_decay, d_reading = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    for b in tl.static_range(M):
        same = tl.where(memory == b, 1.0, 0.0)
        # N and P of the token before, from its memory b; before the chunk's first token P is the unit matrix.
        cells = between + (b * C + token - 1)[:, None] * R + index[None, :]
        entering = tl.load(cells, mask=(token > 0)[:, None] & (index < R)[None, :], other=0.0)
        d_step = tl.sum(passed * entering, 1)
        for d in tl.static_range(M):
            product = tl.load(factor + d * R + b * C + token - 1, mask=token > 0, other=1.0 * (b == d))
            d_step += through[d] * product
        d_step *= decay
        before = (token > 0) & (first + token <= length)
        d_decay += d_step * (tl.load(leak + ((rows - heads) * M + memory) * M + b, mask=before, other=0.0) + same)
        # The coupling acts in the step of the next token, in the reads, and at the end of the chunk.
        d_rho_b = _pick(d_rho, b * C + token, index)
        d_coupling = _pick(d_step, tl.where(last, -1, index + 1), index) + reading * d_rho_b
        for a in tl.static_range(M):
            ended = tl.load(share + (M + a) * R + index) * tl.load(between + (b * C + C - 1) * R + index)
            end = tl.sum(ended, 0)
            for d in tl.static_range(M):
                end += tl.load(share + (2 * M + 2) * R + a * M + d) * tl.load(factor + d * R + b * C + C - 1)
            d_coupling += tl.where(index == a * C + C - 1, end, 0.0)
        tl.store(d_leak + (rows * M + memory) * M + b, d_coupling, mask=there)
        d_reading += (tl.load(leak + (rows * M + memory) * M + b, mask=there, other=0.0) + same) * d_rho_b
    tl.store(d_g + rows * M + memory, d_decay, mask=there)
    tl.store(d_read + rows * M + memory, d_reading * scale, mask=there)


# ---- lalm.modeling.ops.delta.dual_state_triton ----
"""The dual-state delta rule by the Triton kernels of dual_state_kernels.py, with a backward pass that recomputes.

Import this module only where Triton is wanted; it needs the package.
"""


import torch

from .linear_attention_ops import differentiable_by
from .linear_attention_ops import DualInputs, recurrent_dual
from .linear_attention_ops import compute_dtype
from .linear_attention_ops import SequenceLayout

# Rows of a chunk, its tokens times their memories: four warps of 16.
_ROWS = 64
# Columns of V that a program of a scan holds; the fewest while there are fewer programs than a large GPU has cores,
# for long keys, and where gradients fill the registers.
_COLUMNS, _FEWEST, _PROGRAMS = 32, 16, 128
_LONGEST_KEY = 256


def _precision(*tensors: torch.Tensor) -> str:
    """Of the matrix products. What is bfloat16 or float16 loses nothing in TF32; float32 takes three such products."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if any(x.dtype == torch.float32 for x in tensors) else "tf32"


class _Launch:
    """Runs the kernels on inputs of one shape, and makes the buffers that they share."""

    def __init__(self, q, k, v, g, scale, delta, chunk_size):
        batch, length, heads, key_size = q.shape
        value_size, memories = v.shape[-1], g.shape[-1]
        sequences, rows = batch * heads, memories * chunk_size
        self.chunks = sequences * -(-length // chunk_size)
        self.scale, self.delta, self.like = scale, delta, g
        few = sequences * -(-value_size // _COLUMNS) < _PROGRAMS
        columns = _FEWEST if few or value_size <= _FEWEST or key_size > _LONGEST_KEY // 2 else _COLUMNS
        blocks = -(-value_size // columns)
        self.scans, self.reads = (sequences, blocks), (self.chunks, blocks)
        precision = _precision(q, k, v)
        self.of_gates = {"length": length, "heads": heads, "M": memories, "C": chunk_size, "PRECISION": precision}
        self.of_keys = self.of_gates | {"key_size": key_size, "BK": max(16, 1 << (key_size - 1).bit_length())}
        self.of_values = self.of_keys | {"value_size": value_size, "BV": columns}
        self.pairs, self.scores = (rows, rows), (rows, chunk_size)
        self.factors, self.shares = (2 * memories + 2, rows), (2 * memories + 4, rows)
        self.states, self.updates = (memories, key_size, value_size), (rows, value_size)
        self.ends = (sequences, *self.states)

    def buffer(self, shape):
        return self.like.new_empty(self.chunks, *shape)

    def prepare(self, q, k, g, beta, read, leak, starts, keep_between=False):
        """factors, solve, scores, between."""
        solve = self.buffer(self.pairs) if self.delta else None
        between = self.buffer(self.pairs) if keep_between else None
        made = (self.buffer(self.factors), solve, self.buffer(self.scores), between)
        prepare[(self.chunks,)](
            q, k, g, beta, read, leak, starts, *made, scale=self.scale, DELTA=self.delta, num_warps=8, **self.of_keys
        )
        return made

    def scan(self, k, v, beta, factors, solve, initial):
        """The states that enter the chunks, U, and the last states."""
        made = (self.buffer(self.states), self.buffer(self.updates), self.like.new_empty(self.ends))
        scan[self.scans](k, v, beta, factors, solve, initial, *made, DELTA=self.delta, num_stages=2, **self.of_values)
        return made

    def read_out(self, q, factors, scores, entering, updates):
        o = self.like.new_empty(*q.shape[:3], self.states[-1])
        warps = max(1, self.scores[1] // 16)
        read_out[self.reads](q, factors, scores, entering, updates, o, num_warps=warps, **self.of_values)
        return o

    def scan_back(self, q, k, beta, factors, solve, scores, d_o, d_final):
        """The gradients of the states that leave the chunks, dR, and the gradients of the first states."""
        made = (self.buffer(self.states), self.buffer(self.updates), self.like.new_empty(self.ends))
        tensors = (q, k, beta, factors, solve, scores, d_o, d_final, *made)
        scan_back[self.scans](*tensors, DELTA=self.delta, num_stages=2, **self.of_values)
        return made

    def gradients(self, inputs, starts, factors, between, entering, leaving, updates, errors, d_o):
        q, k, v, g, beta, read, leak = inputs
        d_q, d_k, d_v, d_g, d_beta, d_read, d_leak = (torch.empty_like(x) for x in inputs)
        shares = (torch.empty_like(q, dtype=g.dtype), torch.empty_like(k, dtype=g.dtype), self.buffer(self.shares))
        options = self.of_values | {"BV": _FEWEST, "scale": self.scale, "DELTA": self.delta}
        options |= {"num_warps": 8, "num_stages": 1}
        gates, states = (beta, read, leak), (entering, leaving, updates, errors)
        state_gradients[(self.chunks,)](q, k, v, *gates, factors, *states, d_o, d_v, *shares, **options)
        d_between, given = torch.empty_like(between), (factors, between, updates, errors, d_o, *shares)
        pair_gradients[(self.chunks,)](q, k, *gates, *given, d_q, d_k, d_beta, d_between, **options)
        of_reach, d_gates = (factors, between, d_between, shares[2]), (d_g, d_read, d_leak)
        gate_gradients[(self.chunks,)](g, read, leak, starts, *of_reach, *d_gates, scale=self.scale, **self.of_gates)
        return d_q, d_k, d_v, d_g, d_beta, d_read, d_leak


def _plain(ctx, q, k, v, g, beta, read, leak, state, starts) -> tuple[torch.Tensor, torch.Tensor]:
    layout = SequenceLayout(segments=None if starts is None else starts.cumsum(1))
    x = DualInputs(q, k, v, g, beta, read, leak)
    return recurrent_dual(x, ctx.launch.scale, state, layout, ctx.launch.delta)


class _TritonDual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, delta, chunk_size, *tensors):
        q, k, v, g, beta, read, leak, state, starts = tensors
        ctx.launch = launch = _Launch(q, k, v, g, scale, delta, chunk_size)
        with torch.cuda.device_of(q):
            factors, solve, scores, _ = launch.prepare(q, k, g, beta, read, leak, starts)
            entering, updates, final = launch.scan(k, v, beta, factors, solve, state)
            o = launch.read_out(q, factors, scores, entering, updates)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return o, final.view(q.shape[0], q.shape[2], *final.shape[1:])

    @staticmethod
    @differentiable_by(_plain, constants=3)
    def backward(ctx, d_o, d_final):
        *inputs, state, starts = ctx.saved_tensors
        (q, k, v, g, beta, read, leak), launch = inputs, ctx.launch
        d_o = g.new_zeros(v.shape) if d_o is None else d_o.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        with torch.cuda.device_of(q):
            factors, solve, scores, between = launch.prepare(q, k, g, beta, read, leak, starts, keep_between=True)
            entering, updates, _ = launch.scan(k, v, beta, factors, solve, state)
            leaving, errors, d_state = launch.scan_back(q, k, beta, factors, solve, scores, d_o, d_final)
            found = launch.gradients(inputs, starts, factors, between, entering, leaving, updates, errors, d_o)
        return None, None, None, *found, None if state is None else d_state.view(state.shape), None


def triton_dual(
    x: DualInputs, scale: float, state: torch.Tensor | None, layout: SequenceLayout, use_delta_rule: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` by Triton kernels; states and sums are float32.

    Raises:
        RuntimeError: tensors on the CPU (but for Triton's interpreter, TRITON_INTERPRET=1), float64, keys of more than
            256 channels, or a number of memories that is not 1, 2 or 4.
    """
    memories = x.g.shape[-1]
    fits = memories in (1, 2, 4) and x.q.shape[-1] <= _LONGEST_KEY
    fits = fits and compute_dtype(*x) == torch.float32
    if not fits or (x.q.device.type == "cpu" and not interpreted()):
        raise RuntimeError(
            f"The Triton kernels need a GPU, no float64, 1, 2 or 4 memories per head and keys of at most "
            f"{_LONGEST_KEY} channels. Use linear_attn_implementation='auto'."
        )
    tensors = [y.contiguous() for y in x[:3]] + [y.float().contiguous() for y in x[3:]]
    state = None if state is None else state.float().contiguous()
    starts = layout.starts()
    starts = None if starts is None else starts.to(torch.uint8).contiguous()
    return _TritonDual.apply(float(scale), bool(use_delta_rule), _ROWS // memories, *tensors, state, starts)
