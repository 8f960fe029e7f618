# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The dual-state delta rule by Triton kernels on a GPU: the chunk form of dual_state.py, forward and backward.

Import this module only where Triton is wanted. Five kernels; every number outside q, k, v is float32.
    prepare     all chunks at once: the products N and P, T = (I + A)^-1 by forward substitution, scores
    scan        chunk after chunk, one program for a head and some columns of V: U, and the state that enters each chunk
    read_out    all chunks at once: o
    scan_back   the scan from the last chunk to the first: dR, and the gradient of the state that leaves each chunk
    gradients   all chunks at once: the gradients of the inputs
The forward pass keeps its inputs alone; the backward pass runs prepare and scan again.

With X_b = Z_b^T k, right sides R_a = beta_a (v - sum_b P_ab X_b) and A_ia,jb = beta_ia (k_i . k_j) N_ij,ab for j < i:
    U = T R         o_i = sum_b (rho_i^T P_i)_b Z_b^T q_i + sum_jb (q_i . k_j) (rho_i^T N_ij)_b u_jb
    Z_out,a = sum_b (C_last P_last)_ab Z_b + sum_j k_j (sum_b G_ab,j u_jb)^T        G_j = C_last N_last,j
and back, from dU: dR = T^T dU, dA = -dR U^T. The gradient of a step comes from products too, so that nothing is divided:
    dB_m = sum_ij N_im^T dN_ij N_m-1,j^T + sum_i N_im^T dP_i P_m-1^T
Tokens past the end have k = q = beta = 0, g = 0 and C = I, and change nothing.

Buffers, for every head of every row and every chunk of it; memories come before tokens:
    solve T, between N `[M, M, C, C]`; scores `[M, C, C]`, the earlier token first; entering, leaving `[M, K, V]`;
    updates U, errors dR `[M, C, V]`; factors `[2 M M + M + 1, C]`: P, G, rho^T P and, in its last row, C_last P_last.
Tuples hold what a token has for each memory, or each pair of memories: entry a M + b is that of a and b.
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
def _square(x, number, index, C: tl.constexpr):
    """Matrix `number` of `x [*, C, C]`."""
    return tl.load(x + number * C * C + index[:, None] * C + index[None, :])


@triton.jit
def _times(x, y, M: tl.constexpr):
    """Product of two M x M matrices, each a tuple; y may also be one row of M."""
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
def _weigh(x, first: tl.constexpr, step: tl.constexpr, tiles, C: tl.constexpr):
    """Sum over memories of a factor of every token, rows first, first + step ... of `x [*, C]`, times a tile `[C, *]`."""
    total = tl.load(x + first * C)[:, None] * tiles[0]
    for a in tl.static_range(1, len(tiles)):
        total += tl.load(x + (first + a * step) * C)[:, None] * tiles[a]
    return total


@triton.jit
def prepare(
    q, k, g, beta, read, leak, starts, factors, solve, scores, between, scale, length, heads, key_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    first, text, row = _place(chunk, length, heads, C)
    index, columns = tl.arange(0, C), tl.arange(0, BK)
    there = first + index < length
    key = _tile(k, row + index * heads, key_size, columns, there)
    query = _tile(q, row + index * heads, key_size, columns, there)
    keys = tl.dot(key, tl.trans(key), input_precision=PRECISION)
    pairs = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # the earlier token first
    factors += chunk * (2 * M * M + M + 1) * C

    coupling, since, reach, inverse, weights = (), (), (), (), ()
    for a in tl.static_range(M):
        weights += (tl.zeros([C, C], tl.float32),)
        for b in tl.static_range(M):
            coupling += (tl.full([], 1.0 * (a == b), tl.float32),)  # C of the token before
            since += (tl.full([], 1.0 * (a == b), tl.float32),)  # P of this token
            reach += (tl.zeros([C], tl.float32),)  # N of this token and every earlier one
            inverse += (tl.where(index[:, None] == index[None, :], 1.0 * (a == b), 0.0),)
    for i in range(C):
        inside = first + i < length
        at = row + i * heads
        steps, after, strengths, reads = (), (), (), ()
        for a in tl.static_range(M):
            decay = tl.exp(tl.load(g + at * M + a, mask=inside, other=0.0))
            if starts is not None:
                decay = tl.where(tl.load(starts + text + i, mask=inside, other=0) != 0, 0.0, decay)
            strengths += (tl.load(beta + at * M + a, mask=inside, other=0.0),)
            reads += (tl.load(read + at * M + a, mask=inside, other=0.0) * scale,)
            for b in tl.static_range(M):
                steps += (decay * coupling[a * M + b],)
                after += (tl.load(leak + (at * M + a) * M + b, mask=inside, other=0.0) + 1.0 * (a == b),)
        coupling = after
        since = _times(steps, since, M)
        reach = _times(steps, reach, M)
        if DELTA:
            inverse = _substitute(inverse, keys, reach, strengths, i, index, M)
        reach = _add_identity(reach, index == i, M)
        rho = _times(reads, coupling, M)
        read_since, read_reach = _times(rho, since, M), _times(rho, reach, M)
        weights_after = ()
        for a in tl.static_range(M):
            tl.store(factors + (2 * M * M + a) * C + i, read_since[a])
            weights_after += (tl.where(index[None, :] == i, read_reach[a][:, None], weights[a]),)
        weights = weights_after
        for pair in tl.static_range(M * M):
            tl.store(factors + pair * C + i, since[pair])
            if between is not None:
                tl.store(between + ((chunk * M * M + pair) * C + i) * C + index, reach[pair])
    writes, kept = _times(coupling, reach, M), _times(coupling, since, M)
    for pair in tl.static_range(M * M):
        tl.store(factors + (M * M + pair) * C + index, writes[pair])
        tl.store(factors + (2 * M * M + M) * C + pair, kept[pair])
        if DELTA:
            tl.store(solve + (chunk * M * M + pair) * C * C + index[:, None] * C + index[None, :], inverse[pair])
    for a in tl.static_range(M):
        tl.store(scores + (chunk * M + a) * C * C + index[:, None] * C + index[None, :], weights[a] * pairs)


@triton.jit
def _substitute(inverse, keys, reach, strengths, i, index, M: tl.constexpr):
    """Rows i of T from its rows above: those of the unit matrix less A times the rows above."""
    key = tl.sum(tl.where(index[None, :] == i, keys, 0.0), 1)
    after = ()
    for a in tl.static_range(M):
        for b in tl.static_range(M):
            above = (reach[a * M] * key)[:, None] * inverse[b]
            for c in tl.static_range(1, M):
                above += (reach[a * M + c] * key)[:, None] * inverse[c * M + b]
            row = strengths[a] * tl.sum(above, 0)
            old = inverse[a * M + b]
            after += (tl.where(index[:, None] == i, old - row[None, :], old),)
    return after


@triton.jit
def _add_identity(matrix, where, M: tl.constexpr):
    result = ()
    for a in tl.static_range(M):
        for b in tl.static_range(M):
            result += (tl.where(where, 1.0 * (a == b), matrix[a * M + b]),)
    return result


@triton.jit
def scan(
    k, v, beta, factors, solve, initial, entering, updates, final, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    index, columns, values = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
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
        there, rows = first + index < length, row + index * heads
        key = _tile(k, rows, key_size, columns, there)
        value = _tile(v, rows, value_size, values, there)
        factor = factors + chunk * (2 * M * M + M + 1) * C
        found, right, update, after = (), (), (), ()
        for a in tl.static_range(M):
            _put(entering, (chunk * M + a) * key_size + columns, value_size, values, columns < key_size, state[a])
            if DELTA:
                found += (tl.dot(key, state[a], input_precision=PRECISION),)
        for a in tl.static_range(M):
            error = value
            if DELTA:
                error -= _weigh(factor + index, a * M, 1, found, C)
            right += (tl.load(beta + rows * M + a, mask=there, other=0.0)[:, None] * error,)
        for a in tl.static_range(M):
            if DELTA:
                solved = tl.zeros([C, BV], tl.float32)
                for b in tl.static_range(M):
                    matrix = _square(solve, (chunk * M + a) * M + b, index, C)
                    solved = tl.dot(matrix, right[b], solved, input_precision=PRECISION)
                update += (solved,)
            else:
                update += (right[a],)
            _put(updates, (chunk * M + a) * C + index, value_size, values, index < C, update[a])
        for a in tl.static_range(M):
            write = _weigh(factor + index, M * M + a * M, 1, update, C)
            fresh = tl.zeros([BK, BV], tl.float32)
            for b in tl.static_range(M):
                fresh += tl.load(factor + (2 * M * M + M) * C + a * M + b) * state[b]
            after += (tl.dot(tl.trans(key), write, fresh, input_precision=PRECISION),)
        state = after
    for a in tl.static_range(M):
        _put(final, (head * M + a) * key_size + columns, value_size, values, columns < key_size, state[a])


@triton.jit
def read_out(
    q, factors, scores, entering, updates, o, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    index, columns, values = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    first, _, row = _place(chunk, length, heads, C)
    there, rows = first + index < length, row + index * heads
    query = _tile(q, rows, key_size, columns, there)
    factor = factors + (chunk * (2 * M * M + M + 1) + 2 * M * M) * C + index
    total = tl.zeros([C, BV], tl.float32)
    for a in tl.static_range(M):
        state = _tile(entering, (chunk * M + a) * key_size + columns, value_size, values, columns < key_size)
        update = _tile(updates, (chunk * M + a) * C + index, value_size, values, index < C)
        total += tl.load(factor + a * C)[:, None] * tl.dot(query, state, input_precision=PRECISION)
        weights = tl.trans(_square(scores, chunk * M + a, index, C))
        total = tl.dot(weights, update, total, input_precision=PRECISION)
    _put(o, rows, value_size, values, there, total)


@triton.jit
def scan_back(
    q, k, beta, factors, solve, scores, d_o, d_final, leaving, errors, d_initial, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    index, columns, values = tl.arange(0, C), tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
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
        there, rows = first + index < length, row + index * heads
        key = _tile(k, rows, key_size, columns, there)
        query = _tile(q, rows, key_size, columns, there)
        d_out = _tile(d_o, rows, value_size, values, there)
        factor = factors + chunk * (2 * M * M + M + 1) * C
        gained, d_update, d_right, after = (), (), (), ()
        for a in tl.static_range(M):
            _put(leaving, (chunk * M + a) * key_size + columns, value_size, values, columns < key_size, d_state[a])
            gained += (tl.dot(key, d_state[a], input_precision=PRECISION),)
        for b in tl.static_range(M):
            total = _weigh(factor + index, M * M + b, M, gained, C)
            weights = _square(scores, chunk * M + b, index, C)
            d_update += (tl.dot(weights, d_out, total, input_precision=PRECISION),)
        for a in tl.static_range(M):
            if DELTA:
                solved = tl.zeros([C, BV], tl.float32)
                for b in tl.static_range(M):
                    matrix = tl.trans(_square(solve, (chunk * M + b) * M + a, index, C))
                    solved = tl.dot(matrix, d_update[b], solved, input_precision=PRECISION)
                d_right += (solved,)
            else:
                d_right += (d_update[a],)
            _put(errors, (chunk * M + a) * C + index, value_size, values, index < C, d_right[a])
        d_errors = ()
        for a in tl.static_range(M):
            d_errors += (tl.load(beta + rows * M + a, mask=there, other=0.0)[:, None] * d_right[a],)
        for b in tl.static_range(M):
            fresh = tl.zeros([BK, BV], tl.float32)
            for a in tl.static_range(M):
                fresh += tl.load(factor + (2 * M * M + M) * C + a * M + b) * d_state[a]
            read = tl.load(factor + (2 * M * M + b) * C + index)[:, None] * d_out
            fresh = tl.dot(tl.trans(query), read, fresh, input_precision=PRECISION)
            if DELTA:
                d_found = _weigh(factor + index, b, M, d_errors, C)
                fresh -= tl.dot(tl.trans(key), d_found, input_precision=PRECISION)
            after += (fresh,)
        d_state = after
    for a in tl.static_range(M):
        _put(d_initial, (head * M + a) * key_size + columns, value_size, values, columns < key_size, d_state[a])


@triton.jit
def gradients(
    q, k, v, g, beta, read, leak, starts, factors, between, entering, leaving, updates, errors, d_o,
    d_q, d_k, d_v, d_g, d_beta, d_read, d_leak, scale, length, heads, key_size, value_size,
    M: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    index, columns = tl.arange(0, C), tl.arange(0, BK)
    first, text, row = _place(chunk, length, heads, C)
    there, rows = first + index < length, row + index * heads
    key = _tile(k, rows, key_size, columns, there)
    query = _tile(q, rows, key_size, columns, there)
    factor = factors + chunk * (2 * M * M + M + 1) * C
    strengths, couplings = (), ()
    for a in tl.static_range(M):
        strengths += (tl.load(beta + rows * M + a, mask=there, other=0.0),)
        for b in tl.static_range(M):
            couplings += (tl.load(leak + (rows * M + a) * M + b, mask=there, other=0.0) + 1.0 * (a == b),)

    d_query, d_key = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    # Over the columns of V: do U^T, dR U^T, and the gradients of beta and of the factors.
    of_scores, of_solve, d_strength, d_since, d_read_since, d_writes, d_kept = (), (), (), (), (), (), ()
    for a in tl.static_range(M):
        of_scores += (tl.zeros([C, C], tl.float32),)
        d_strength += (tl.zeros([C], tl.float32),)
        d_read_since += (tl.zeros([C], tl.float32),)
        for b in tl.static_range(M):
            of_solve += (tl.zeros([C, C], tl.float32),)
            d_since += (tl.zeros([C], tl.float32),)
            d_writes += (tl.zeros([C], tl.float32),)
            d_kept += (tl.full([], 0.0, tl.float32),)
    for start in range(0, value_size, BV):
        values = start + tl.arange(0, BV)
        d_out = _tile(d_o, rows, value_size, values, there)
        value = _tile(v, rows, value_size, values, there)
        update, d_right, state, d_state = (), (), (), ()
        for a in tl.static_range(M):
            here = (chunk * M + a) * C + index
            update += (_tile(updates, here, value_size, values, index < C),)
            d_right += (_tile(errors, here, value_size, values, index < C),)
            here = (chunk * M + a) * key_size + columns
            state += (_tile(entering, here, value_size, values, columns < key_size),)
            d_state += (_tile(leaving, here, value_size, values, columns < key_size),)
        d_errors, found = (), ()
        scores_after, solve_after, strength_after, since_after = (), (), (), ()
        read_after, writes_after, kept_after = (), (), ()
        for a in tl.static_range(M):
            d_errors += (strengths[a][:, None] * d_right[a],)
        d_value = d_errors[0]
        for a in tl.static_range(1, M):
            d_value += d_errors[a]
        _put(d_v, rows, value_size, values, there, d_value)
        for b in tl.static_range(M):
            reading = tl.dot(d_out, tl.trans(state[b]), input_precision=PRECISION)
            d_query += tl.load(factor + (2 * M * M + b) * C + index)[:, None] * reading
            read_after += (d_read_since[b] + tl.sum(query * reading, 1),)
            scores_after += (tl.dot(d_out, tl.trans(update[b]), of_scores[b], input_precision=PRECISION),)
            written = _weigh(factor + index, M * M + b * M, 1, update, C)
            d_key = tl.dot(written, tl.trans(d_state[b]), d_key, input_precision=PRECISION)
            if DELTA:
                found += (tl.dot(key, state[b], input_precision=PRECISION),)
                d_found = _weigh(factor + index, b, M, d_errors, C)
                d_key -= tl.dot(d_found, tl.trans(state[b]), input_precision=PRECISION)
        for a in tl.static_range(M):
            error = value
            if DELTA:
                error -= _weigh(factor + index, a * M, 1, found, C)
            strength_after += (d_strength[a] + tl.sum(d_right[a] * error, 1),)
            gained = tl.dot(key, d_state[a], input_precision=PRECISION)
            for b in tl.static_range(M):
                writes_after += (d_writes[a * M + b] + tl.sum(gained * update[b], 1),)
                kept_after += (d_kept[a * M + b] + tl.sum(tl.sum(d_state[a] * state[b], 1), 0),)
                if DELTA:
                    since_after += (d_since[a * M + b] - tl.sum(d_errors[a] * found[b], 1),)
                    solve = of_solve[a * M + b]
                    solve_after += (tl.dot(d_right[a], tl.trans(update[b]), solve, input_precision=PRECISION),)
        of_scores, d_strength, d_read_since = scores_after, strength_after, read_after
        d_writes, d_kept = writes_after, kept_after
        if DELTA:
            of_solve, d_since = solve_after, since_after

    # Through the scores and the triangular system to N, q, k and the gates.
    earlier = index[:, None] > index[None, :]
    last, last_there = index == C - 1, first + C - 1 < length
    keys = tl.dot(key, tl.trans(key), input_precision=PRECISION)
    pairs = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    reads, reach, since, ends = (), (), (), ()
    for a in tl.static_range(M):
        reads += (tl.load(read + rows * M + a, mask=there, other=0.0) * scale,)
        for b in tl.static_range(M):
            reach += (_square(between, (chunk * M + a) * M + b, index, C),)
            since += (tl.load(factor + (a * M + b) * C + index),)
            end = tl.load(leak + ((row + (C - 1) * heads) * M + a) * M + b, mask=last_there, other=0.0)
            ends += (end + 1.0 * (a == b),)
    rho = _times(reads, couplings, M)
    d_pairs, d_keys = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for b in tl.static_range(M):
        for c in tl.static_range(M):
            d_pairs += of_scores[b] * rho[c][:, None] * reach[c * M + b]
            if DELTA:
                d_keys -= of_solve[b * M + c] * strengths[b][:, None] * reach[b * M + c]
    d_keys = tl.where(earlier, d_keys, 0.0)
    d_query = tl.dot(d_pairs, key, d_query, input_precision=PRECISION)
    d_key = tl.dot(tl.trans(d_pairs), query, d_key, input_precision=PRECISION)
    if DELTA:
        d_key = tl.dot(d_keys + tl.trans(d_keys), key, d_key, input_precision=PRECISION)
    _put(d_q, rows, key_size, columns, there, d_query)
    _put(d_k, rows, key_size, columns, there, d_key)

    d_reach, d_products, d_rho = (), (), ()
    for c in tl.static_range(M):
        d_weight = tl.zeros([C], tl.float32)
        lost = d_strength[c]
        for b in tl.static_range(M):
            weighed = of_scores[b] * pairs
            d_weight += tl.sum(reach[c * M + b] * weighed, 1) + since[c * M + b] * d_read_since[b]
            d_between = rho[c][:, None] * weighed
            if DELTA:
                solved = tl.where(earlier, of_solve[c * M + b] * keys, 0.0)
                lost -= tl.sum(reach[c * M + b] * solved, 1)
                d_between -= strengths[c][:, None] * solved
            d_product = d_since[c * M + b] + rho[c] * d_read_since[b]
            for a in tl.static_range(M):
                d_between += tl.where(last[:, None], ends[a * M + c] * d_writes[a * M + b][None, :], 0.0)
                d_product += tl.where(last, ends[a * M + c] * d_kept[a * M + b], 0.0)
            d_reach += (tl.where(earlier, d_between, 0.0),)
            d_products += (d_product,)
        d_rho += (d_weight,)
        tl.store(d_beta + rows * M + c, lost, mask=there)
    d_steps = _step_gradients(reach, d_reach, d_products, between, factor, chunk, index, M, C, PRECISION)

    for a in tl.static_range(M):
        decay = tl.exp(tl.load(g + rows * M + a, mask=there, other=0.0))
        if starts is not None:
            decay = tl.where(tl.load(starts + text + index, mask=there, other=0) != 0, 0.0, decay)
        d_decay, d_reading = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        for b in tl.static_range(M):
            d_step = d_steps[a * M + b] * decay
            before = (index > 0) & (first + index - 1 < length)
            coupling = tl.load(leak + ((rows - heads) * M + a) * M + b, mask=before, other=0.0) + 1.0 * (a == b)
            d_decay += d_step * coupling
            d_reading += couplings[a * M + b] * d_rho[b]
            # A step takes the coupling of the token before it, and what leaves the chunk that of the last.
            d_end = tl.zeros([], tl.float32)
            for c in tl.static_range(M):
                end = (chunk * M * M + b * M + c) * C * C + (C - 1) * C
                d_end += tl.sum(d_writes[a * M + c] * tl.load(between + end + index), 0)
                d_end += d_kept[a * M + c] * tl.load(factor + (b * M + c) * C + C - 1)
            d_coupling = tl.sum(tl.where(index[None, :] == index[:, None] + 1, d_step[None, :], 0.0), 1)
            d_coupling += reads[a] * d_rho[b] + tl.where(last, d_end, 0.0)
            tl.store(d_leak + (rows * M + a) * M + b, d_coupling, mask=there)
        tl.store(d_g + rows * M + a, d_decay, mask=there)
        tl.store(d_read + rows * M + a, d_reading * scale, mask=there)


@triton.jit
def _step_gradients(
    reach, d_reach, d_products, between, factor, chunk, index,
    M: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB of every token, from dN and dP."""
    of_reach, of_products, d_steps = (), (), ()
    for a in tl.static_range(M):
        for d in tl.static_range(M):
            inner, outer = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
            for c in tl.static_range(M):
                passed = tl.trans(reach[c * M + a])
                inner = tl.dot(passed, d_reach[c * M + d], inner, input_precision=PRECISION)
                outer += tl.sum(passed * d_products[c * M + d][None, :], 1)
            of_reach += (inner,)
            of_products += (outer,)
    for a in tl.static_range(M):
        for b in tl.static_range(M):
            total = tl.zeros([C], tl.float32)
            for d in tl.static_range(M):
                rows = ((chunk * M + b) * M + d) * C + index - 1
                cells = between + rows[:, None] * C + index[None, :]
                entering = tl.load(cells, mask=(index > 0)[:, None] & (index >= 0)[None, :], other=0.0)
                product = tl.load(factor + (b * M + d) * C + index - 1, mask=index > 0, other=1.0 * (b == d))
                total += tl.sum(of_reach[a * M + d] * entering, 1) + of_products[a * M + d] * product
            d_steps += (total,)
    return d_steps
