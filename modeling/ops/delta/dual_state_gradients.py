# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of the dual-state delta rule: the gradients of the inputs, all chunks at once.

What the names and buffers mean stands in dual_state_kernels.py. Three kernels, so that each fits the registers:
    state_gradients     what comes through the states between the chunks: to v, to q and k, to the factors
    pair_gradients      what comes through the pairs of tokens of a chunk: to q, k, beta, and to N
    gate_gradients      from N and P to the steps B, and from them to the other gates
Between them go `d_between [R, R]`, the gradient of N, and `shares [2 M + 4, R]`, gradients of P_ab (rows b), G_ab
(rows M + a), rho (2 M), beta (2 M + 1), C_last P_last (2 M + 2) and, what pair_gradients adds, rho (2 M + 3).
"""

from __future__ import annotations

from lalm.modeling.ops.delta.dual_state_kernels import place, put, square, tile, tl, triton


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
