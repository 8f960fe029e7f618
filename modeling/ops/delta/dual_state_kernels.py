# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
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

from __future__ import annotations

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
