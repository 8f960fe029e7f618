# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of the dual-state delta rule: the chunk form of dual_state.py, forward and backward.

Every number outside q, k, v is float32. In the order of a training step:
    prepare             all chunks at once: the products N and P, T = (I + A)^-1 by forward substitution, scores
    scan                chunk after chunk, a program for a head and some columns of V: U, the states between the chunks
    read_out            all chunks at once: o
    scan_back           the scan from the last chunk to the first: dR, the gradients of the states between the chunks
    state_gradients     all chunks at once: what comes through the states, to v, q, k and the factors
    pair_gradients      all chunks at once: what comes through the pairs of a chunk, and the gates
The forward pass keeps its inputs alone; the backward pass runs prepare and scan again.

With X_b = Z_b^T k, right sides R_a = beta_a (v - sum_b P_ab X_b) and A_ia,jb = beta_ia (k_i . k_j) N_ij,ab for j < i:
    U = T R         o_i = sum_b (rho_i^T P_i)_b Z_b^T q_i + sum_jb (q_i . k_j) (rho_i^T N_ij)_b u_jb
    Z_out,a = sum_b (C_last P_last)_ab Z_b + sum_j k_j (sum_b G_ab,j u_jb)^T        G_j = C_last N_last,j
and back, from dU: dR = T^T dU, dA = -dR U^T. The gradient of a step comes from products too, so that nothing is divided:
    dB_m = sum_ij N_im^T dN_ij N_m-1,j^T + sum_i N_im^T dP_i P_m-1^T
Tokens past the end have k = q = beta = 0, g = 0 and C = I, and change nothing.

Rows of size R = M C run over memories and, inside a memory, over tokens: 64 rows make full use of four warps. Buffers,
for every head of every text and every chunk of it, `entering` and `leaving` for the states between chunks:
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
def _place(chunk, length, heads, C: tl.constexpr):
    """Of the running number of a chunk: its first token, that one's place in `[B T]` and its row in `[B T H, *]`."""
    chunks = tl.cdiv(length, C)
    head, first = chunk // chunks, (chunk % chunks) * C
    text = (head // heads) * length + first
    return first, text, text * heads + head % heads


@triton.jit
def _tile(x, rows, width, columns, there):
    """Rows of `x [*, width]` as float32, zeros where not `there` and past the width."""
    there = there[:, None] & (columns < width)[None, :]
    return tl.load(x + rows[:, None] * width + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def _put(x, rows, width, columns, there, values):
    there = there[:, None] & (columns < width)[None, :]
    tl.store(x + rows[:, None] * width + columns[None, :], values.to(x.dtype.element_ty), mask=there)


@triton.jit
def _square(x, index, columns, width: tl.constexpr):
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
def _fold(x, M: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Sum over the memories of a token: `[R, D] -> [C, D]`."""
    return tl.sum(tl.reshape(x, [M, C, D]), 0)


@triton.jit
def _pick(x, at, index):
    """Entries `at` of the vector x, zero for those that it does not have."""
    return tl.sum(tl.where(at[:, None] == index[None, :], x[None, :], 0.0), 1)


@triton.jit
def prepare(
    q, k, g, beta, read, leak, starts, factors, solve, scores, between, scale, length, heads, key_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    first, text, row = _place(chunk, length, heads, C)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    key = _tile(k, row + index % C * heads, key_size, columns, first + index % C < length)
    later = _tile(k, row + tokens * heads, key_size, columns, first + tokens < length)
    query = _tile(q, row + tokens * heads, key_size, columns, first + tokens < length)
    keys = tl.dot(key, tl.trans(later), input_precision=PRECISION)  # the earlier token first
    pairs = tl.dot(key, tl.trans(query), input_precision=PRECISION)
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
                decay = tl.where(tl.load(starts + text + i, mask=inside, other=0) != 0, 0.0, decay)
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
    tl.store(scores + (chunk * R + index[:, None]) * C + tokens[None, :], weights * pairs)
    if DELTA:
        tl.store(solve + (chunk * R + index[:, None]) * R + index[None, :], inverse)


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
            state += (_tile(initial, rows, value_size, values, columns < key_size),)
        else:
            state += (tl.zeros([BK, BV], tl.float32),)
    for n in range(chunks):
        chunk = head * chunks + n
        first, _, row = _place(chunk, length, heads, C)
        there, rows = first + index % C < length, row + index % C * heads
        key = _tile(k, rows, key_size, columns, there)
        error = _tile(v, rows, value_size, values, there)
        factor = factors + chunk * (2 * M + 2) * R
        for b in tl.static_range(M):
            _put(entering, (chunk * M + b) * key_size + columns, value_size, values, columns < key_size, state[b])
            if DELTA:
                found = tl.dot(key, state[b], input_precision=PRECISION)
                error -= tl.load(factor + b * R + index)[:, None] * found
        update = tl.load(beta + rows * M + index // C, mask=there, other=0.0)[:, None] * error
        if DELTA:
            update = tl.dot(_square(solve + chunk * R * R, index, index, R), update, input_precision=PRECISION)
        _put(updates, chunk * R + index, value_size, values, index < R, update)
        after = ()
        for a in tl.static_range(M):
            fresh = tl.zeros([BK, BV], tl.float32)
            for b in tl.static_range(M):
                fresh += tl.load(factor + (2 * M + 1) * R + a * M + b) * state[b]
            write = tl.load(factor + (M + a) * R + index)[:, None] * update
            after += (tl.dot(tl.trans(key), write, fresh, input_precision=PRECISION),)
        state = after
    for a in tl.static_range(M):
        _put(final, (head * M + a) * key_size + columns, value_size, values, columns < key_size, state[a])


@triton.jit
def read_out(
    q, factors, scores, entering, updates, o, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    values = tl.program_id(1) * BV + tl.arange(0, BV)
    first, _, row = _place(chunk, length, heads, C)
    there, rows = first + tokens < length, row + tokens * heads
    query = _tile(q, rows, key_size, columns, there)
    update = _tile(updates, chunk * R + index, value_size, values, index < R)
    weights = tl.trans(_square(scores + chunk * R * C, index, tokens, C))
    total = tl.dot(weights, update, input_precision=PRECISION)
    for b in tl.static_range(M):
        state = _tile(entering, (chunk * M + b) * key_size + columns, value_size, values, columns < key_size)
        weight = tl.load(factors + (chunk * (2 * M + 2) + 2 * M) * R + b * C + tokens)
        total += weight[:, None] * tl.dot(query, state, input_precision=PRECISION)
    _put(o, rows, value_size, values, there, total)


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
            d_state += (_tile(d_final, rows, value_size, values, columns < key_size),)
        else:
            d_state += (tl.zeros([BK, BV], tl.float32),)
    for n in range(chunks):
        chunk = head * chunks + chunks - 1 - n
        first, _, row = _place(chunk, length, heads, C)
        there, rows = first + index % C < length, row + index % C * heads
        key = _tile(k, rows, key_size, columns, there)
        query = _tile(q, row + tokens * heads, key_size, columns, first + tokens < length)
        d_out = _tile(d_o, row + tokens * heads, value_size, values, first + tokens < length)
        factor = factors + chunk * (2 * M + 2) * R
        d_right = tl.dot(_square(scores + chunk * R * C, index, tokens, C), d_out, input_precision=PRECISION)
        for a in tl.static_range(M):
            _put(leaving, (chunk * M + a) * key_size + columns, value_size, values, columns < key_size, d_state[a])
            gained = tl.dot(key, d_state[a], input_precision=PRECISION)
            d_right += tl.load(factor + (M + a) * R + index)[:, None] * gained
        if DELTA:
            transposed = tl.trans(_square(solve + chunk * R * R, index, index, R))
            d_right = tl.dot(transposed, d_right, input_precision=PRECISION)
        _put(errors, chunk * R + index, value_size, values, index < R, d_right)
        strength = tl.load(beta + rows * M + index // C, mask=there, other=0.0)
        after = ()
        for b in tl.static_range(M):
            fresh = tl.zeros([BK, BV], tl.float32)
            for a in tl.static_range(M):
                fresh += tl.load(factor + (2 * M + 1) * R + a * M + b) * d_state[a]
            reading = tl.load(factor + 2 * M * R + b * C + tokens)[:, None] * d_out
            fresh = tl.dot(tl.trans(query), reading, fresh, input_precision=PRECISION)
            if DELTA:
                lost = (strength * tl.load(factor + b * R + index))[:, None] * d_right
                fresh -= tl.dot(tl.trans(key), lost, input_precision=PRECISION)
            after += (fresh,)
        d_state = after
    for a in tl.static_range(M):
        _put(d_initial, (head * M + a) * key_size + columns, value_size, values, columns < key_size, d_state[a])


@triton.jit
def _rho(read, leak, rows, memory, there, scale, M: tl.constexpr):
    rho = tl.zeros_like(memory).to(tl.float32)
    for a in tl.static_range(M):
        coupling = tl.load(leak + (rows * M + a) * M + memory, mask=there, other=0.0) + tl.where(memory == a, 1.0, 0.0)
        rho += tl.load(read + rows * M + a, mask=there, other=0.0) * scale * coupling
    return rho


@triton.jit
def state_gradients(
    q, k, v, beta, read, leak, factors, entering, leaving, updates, errors, d_o, d_v, part_q, part_k, parts,
    scale, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """d_v, and shares in the gradients of q and k and (parts `[2 M + 3, R]`) of factors, rho and beta."""
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    first, _, row = _place(chunk, length, heads, C)
    there, rows = first + index % C < length, row + index % C * heads
    key = _tile(k, rows, key_size, columns, there)
    query = _tile(q, rows, key_size, columns, there)
    factor = factors + chunk * (2 * M + 2) * R
    strength = tl.load(beta + rows * M + index // C, mask=there, other=0.0)
    rho = _rho(read, leak, rows, index // C, there, scale, M)

    d_query, d_key = tl.zeros([R, BK], tl.float32), tl.zeros([R, BK], tl.float32)
    d_strength, d_rho = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    d_since, d_writes, d_kept = (), (), ()
    for a in tl.static_range(M):
        d_since += (tl.zeros([R], tl.float32),)
        d_writes += (tl.zeros([R], tl.float32),)
        for b in tl.static_range(M):
            d_kept += (tl.full([], 0.0, tl.float32),)
    for start in range(0, value_size, BV):
        values = start + tl.arange(0, BV)
        d_out = _tile(d_o, rows, value_size, values, there)
        error = _tile(v, rows, value_size, values, there)
        update = _tile(updates, chunk * R + index, value_size, values, index < R)
        d_right = _tile(errors, chunk * R + index, value_size, values, index < R)
        d_error = strength[:, None] * d_right
        _put(d_v, row + tokens * heads, value_size, values, first + tokens < length, _fold(d_error, M, C, BV))
        states, since_after, writes_after, kept_after = (), (), (), ()
        for b in tl.static_range(M):
            state = _tile(entering, (chunk * M + b) * key_size + columns, value_size, values, columns < key_size)
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
            d_state = _tile(leaving, (chunk * M + a) * key_size + columns, value_size, values, columns < key_size)
            gained = tl.dot(key, d_state, input_precision=PRECISION)
            writes_after += (d_writes[a] + tl.sum(gained * update, 1),)
            write = tl.load(factor + (M + a) * R + index)[:, None] * update
            d_key = tl.dot(write, tl.trans(d_state), d_key, input_precision=PRECISION)
            for b in tl.static_range(M):
                kept_after += (d_kept[a * M + b] + tl.sum(tl.sum(d_state * states[b], 1), 0),)
        d_since, d_writes, d_kept = since_after, writes_after, kept_after
    _put(part_q, row + tokens * heads, key_size, columns, first + tokens < length, _fold(d_query, M, C, BK))
    _put(part_k, row + tokens * heads, key_size, columns, first + tokens < length, _fold(d_key, M, C, BK))
    parts += chunk * (2 * M + 3) * R
    for a in tl.static_range(M):
        tl.store(parts + a * R + index, d_since[a])
        tl.store(parts + (M + a) * R + index, d_writes[a])
        for b in tl.static_range(M):
            tl.store(parts + (2 * M + 2) * R + a * M + b, d_kept[a * M + b])
    tl.store(parts + 2 * M * R + index, d_rho)
    tl.store(parts + (2 * M + 1) * R + index, d_strength)


@triton.jit
def pair_gradients(
    q, k, g, beta, read, leak, starts, factors, between, updates, errors, d_o, part_q, part_k, parts,
    d_q, d_k, d_g, d_beta, d_read, d_leak, scale, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and the gates: the shares of state_gradients, and what comes through scores and T."""
    R: tl.constexpr = M * C
    chunk = tl.program_id(0).to(tl.int64)
    index, tokens, columns = tl.arange(0, R), tl.arange(0, C), tl.arange(0, BK)
    first, text, row = _place(chunk, length, heads, C)
    token, memory = index % C, index // C
    there, rows = first + token < length, row + token * heads
    key = _tile(k, rows, key_size, columns, there)
    query = _tile(q, rows, key_size, columns, there)
    factor, part = factors + chunk * (2 * M + 2) * R, parts + chunk * (2 * M + 3) * R
    reach = _square(between + chunk * R * R, index, index, R)  # row: the later token
    strength = tl.load(beta + rows * M + memory, mask=there, other=0.0)
    rho = _rho(read, leak, rows, memory, there, scale, M)

    of_scores, of_solve = tl.zeros([R, R], tl.float32), tl.zeros([R, R], tl.float32)
    for start in range(0, value_size, BV):
        values = start + tl.arange(0, BV)
        update = tl.trans(_tile(updates, chunk * R + index, value_size, values, index < R))
        d_out = _tile(d_o, rows, value_size, values, there)
        of_scores = tl.dot(d_out, update, of_scores, input_precision=PRECISION)
        if DELTA:
            d_right = _tile(errors, chunk * R + index, value_size, values, index < R)
            of_solve = tl.dot(d_right, update, of_solve, input_precision=PRECISION)
    earlier = token[:, None] > token[None, :]
    of_solve = tl.where(earlier, of_solve, 0.0)

    d_pairs = of_scores * rho[:, None] * reach
    d_query = tl.dot(d_pairs, key, input_precision=PRECISION)
    d_key = tl.dot(tl.trans(d_pairs), query, input_precision=PRECISION)
    seen = of_scores * tl.dot(query, tl.trans(key), input_precision=PRECISION)
    d_rho = tl.load(part + 2 * M * R + index) + tl.sum(seen * reach, 1)
    d_strength = tl.load(part + (2 * M + 1) * R + index)
    d_reach = rho[:, None] * seen
    if DELTA:
        d_keys = of_solve * strength[:, None] * reach
        d_key -= tl.dot(d_keys + tl.trans(d_keys), key, input_precision=PRECISION)
        solved = of_solve * tl.dot(key, tl.trans(key), input_precision=PRECISION)
        d_strength -= tl.sum(solved * reach, 1)
        d_reach -= strength[:, None] * solved
    tl.store(d_beta + rows * M + memory, d_strength, mask=there)
    inside = first + tokens < length
    d_query = _fold(d_query, M, C, BK) + _tile(part_q, row + tokens * heads, key_size, columns, inside)
    d_key = _fold(d_key, M, C, BK) + _tile(part_k, row + tokens * heads, key_size, columns, inside)
    _put(d_q, row + tokens * heads, key_size, columns, inside, d_query)
    _put(d_k, row + tokens * heads, key_size, columns, inside, d_key)

    # The last token's N and P go on into the next chunk through its coupling.
    last, whole = token == C - 1, (token == C - 1) & (first + token < length)
    ends, d_products = (), ()
    for a in tl.static_range(M):
        coupling = tl.load(leak + (rows * M + a) * M + memory, mask=whole, other=0.0) + tl.where(memory == a, 1.0, 0.0)
        ends += (tl.where(last, coupling, 0.0),)
        d_reach += ends[a][:, None] * tl.load(part + (M + a) * R + index)[None, :]
    for b in tl.static_range(M):
        product = tl.load(part + b * R + index)
        for a in tl.static_range(M):
            product += ends[a] * tl.load(part + (2 * M + 2) * R + a * M + b)
        d_products += (product,)
    d_reach = tl.where(earlier, d_reach, 0.0)
    passed = tl.dot(tl.trans(reach), d_reach, input_precision=PRECISION)
    through = ()
    for b in tl.static_range(M):
        through += (tl.sum(tl.trans(reach) * d_products[b][None, :], 1),)

    decay = tl.exp(tl.load(g + rows * M + memory, mask=there, other=0.0))
    if starts is not None:
        decay = tl.where(tl.load(starts + text + token, mask=there, other=0) != 0, 0.0, decay)
    d_decay, d_reading = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    reading = tl.load(read + rows * M + memory, mask=there, other=0.0) * scale
    for b in tl.static_range(M):
        # N and P of the token before, from its memory b; that of the token before the chunk is the unit matrix.
        cells = between + (chunk * R + b * C + token - 1)[:, None] * R + index[None, :]
        entering = tl.load(cells, mask=(token > 0)[:, None] & (index < R)[None, :], other=0.0)
        d_step = tl.sum(passed * entering, 1)
        for d in tl.static_range(M):
            product = tl.load(factor + d * R + b * C + token - 1, mask=token > 0, other=1.0 * (b == d))
            d_step += through[d] * product
        d_step *= decay
        before = tl.load(
            leak + ((rows - heads) * M + memory) * M + b, mask=(token > 0) & (first + token <= length), other=0.0
        )
        d_decay += d_step * (before + tl.where(memory == b, 1.0, 0.0))
        # The coupling: in the step of the next token, in the reads, and at the end of the chunk.
        d_rho_b = _pick(d_rho, b * C + token, index)
        d_coupling = _pick(d_step, tl.where(last, -1, index + 1), index) + reading * d_rho_b
        for a in tl.static_range(M):
            ended = tl.sum(
                tl.load(part + (M + a) * R + index) * tl.load(between + (chunk * R + b * C + C - 1) * R + index), 0
            )
            for d in tl.static_range(M):
                ended += tl.load(part + (2 * M + 2) * R + a * M + d) * tl.load(factor + d * R + b * C + C - 1)
            d_coupling += tl.where(index == a * C + C - 1, ended, 0.0)
        tl.store(d_leak + (rows * M + memory) * M + b, d_coupling, mask=there)
        coupling = tl.load(leak + (rows * M + memory) * M + b, mask=there, other=0.0)
        d_reading += (coupling + tl.where(memory == b, 1.0, 0.0)) * d_rho_b
    tl.store(d_g + rows * M + memory, d_decay, mask=there)
    tl.store(d_read + rows * M + memory, d_reading * scale, mask=there)
