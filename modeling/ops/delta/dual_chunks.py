# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The chunk form of the dual-state delta rule (dual_state.py).

Chunk form. Let B_i = diag(exp(g_i)) C_{i-1} (C_{-1} = I as the chunk begins), N_ij = B_i ... B_{j+1}, N_ii = I and
P_i = B_i ... B_0. The memories before the leak are S_i = P_i Z_in + sum_{j<=i} N_ij u_j (x) k_j, hence
    u_i + beta_i sum_{j<i} (k_i . k_j) N_ij u_j = beta_i (v_i - P_i Z_in^T k_i)      one triangular system of M C rows
    o_i = rho_i^T S_i^T q_i with rho_i = C_i^T r_i                                   Z_out = C_last S_last
so, as for the delta rule, o = inside + reads Z_in and Z_out = passes Z_in + writes. The N_ij are products of small
matrices, built by doubling; nothing is divided, so that any decay is safe. A new document is B_i = 0.

Shape suffixes: B batch, T time, H heads, M memories, K key size, V value size, N chunks, C tokens of a chunk. Rows and
columns of size `C M` run over tokens and, inside a token, over memories.
"""

from __future__ import annotations

from functools import reduce

import torch

from lalm.modeling.ops.autograd import differentiable_by, has_open_length, is_transformed
from lalm.modeling.ops.chunks import from_chunks, scan, solve_unit_lower, to_chunks
from lalm.modeling.ops.delta.dual_recurrence import DualInputs, recurrent_dual
from lalm.modeling.ops.dispatch import chunks_at_once, must_separate
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout, document_by_document


def chunk_dual(
    x: DualInputs,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout,
    use_delta_rule: bool = True,
    chunk_size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_dual` in matrix products over chunks, with a backward pass that recomputes."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if is_transformed():
        return recurrent_dual(x, scale, state, layout, use_delta_rule)
    if must_separate(layout, *x):

        def alone(*tensors):
            *own, state, layout = tensors
            return chunk_dual(DualInputs(*own), scale, state, layout, use_delta_rule, chunk_size)

        return document_by_document(alone, x, state, layout)
    (batch, length, heads), memories = x.q.shape[:3], x.g.shape[-1]
    chunk_size = chunk_size if has_open_length() else min(chunk_size, -(-length // 8) * 8)
    dtype = compute_dtype(*x)
    inputs = [to_chunks(y, chunk_size, dtype) for y in (*x[:-1], x.leak.flatten(-2))]
    inputs[0] = inputs[0] * scale
    starts = layout.starts()
    if starts is not None:
        starts = to_chunks(starts[..., None, None], chunk_size, torch.bool)
    if state is not None:
        state = state.to(dtype).flatten(2, 3)
    size = chunks_at_once(batch * heads * (chunk_size * memories) ** 2, inputs[0].shape[2])
    if size is None:
        o, state = _advance(use_delta_rule, starts, state, *inputs)
    else:
        o, state = _Slabs.apply(size, use_delta_rule, starts, state, *inputs)
    return from_chunks(o, length), state.unflatten(2, (memories, -1))


def _by_slabs(size, delta, starts, state, *inputs) -> tuple[torch.Tensor, torch.Tensor, list]:
    """`_advance` over slabs of `size` chunks; also returns the states that enter them."""
    entering, outputs = [], []
    for n in range(0, inputs[0].shape[2], size):
        entering.append(state)
        o, state = _advance(delta, _cut(starts, n, size), state, *(_cut(x, n, size) for x in inputs))
        outputs.append(o)
    return torch.cat(outputs, dim=2), state, entering


def _plain(ctx, starts, state, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    return _by_slabs(ctx.size, ctx.delta, starts, state, *rest[:7])[:2]


class _Slabs(torch.autograd.Function):
    """`_by_slabs`, of which only the inputs and the entering states are kept."""

    @staticmethod
    def forward(ctx, size, delta, starts, state, *inputs):
        ctx.size, ctx.delta = size, delta
        o, final, entering = _by_slabs(size, delta, starts, state, *inputs)
        ctx.save_for_backward(starts, state, *inputs, *entering[1:])
        return o, final

    @staticmethod
    @differentiable_by(_plain, constants=2)
    def backward(ctx, do, d_state):
        starts, state, *rest = ctx.saved_tensors
        inputs, entering = rest[:7], [state, *rest[7:]]
        found = [
            torch.empty_like(x) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad[4:], strict=True)
        ]
        for index in reversed(range(len(entering))):
            n = index * ctx.size
            with torch.enable_grad():
                pieces = [
                    _cut(x, n, ctx.size).detach().requires_grad_(needed is not None)
                    for x, needed in zip(inputs, found, strict=True)
                ]
                state = entering[index]
                state = None if state is None else state.detach().requires_grad_()
                o, final = _advance(ctx.delta, _cut(starts, n, ctx.size), state, *pieces)
                wanted = [x for x in (*pieces, state) if x is not None and x.requires_grad]
            ends = [(y, dy) for y, dy in ((o, _cut(do, n, ctx.size)), (final, d_state)) if y.requires_grad]
            outputs, cotangents = zip(*ends, strict=True)
            gradients = iter(torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True))
            for x in found:
                if x is not None:
                    _cut(x, n, ctx.size).copy_(next(gradients))
            d_state = None if state is None else next(gradients)
        return None, None, None, d_state, *found


def _cut(x: torch.Tensor | None, start: int, size: int):
    """Chunks `start .. start + size` of `[B, H, N, ...]`."""
    return None if x is None else x[:, :, start : start + size]


def _advance(delta, starts, state, q, k, v, g, beta, read, leak) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks `[B, H, N, C, *]` from the state `[B, H, M K, V]` (None for zeros) -> o `[B, H, N, C, V]`, next state."""
    memories, chunks, value_size = g.shape[-1], q.shape[2], v.shape[-1]
    coupling = leak.unflatten(-1, (memories, memories)) + torch.eye(memories, dtype=leak.dtype, device=leak.device)
    before = torch.cat([torch.zeros_like(leak[..., :1, :]), leak[..., :-1, :]], dim=-2).unflatten(-1, (memories, -1))
    steps = g.exp()[..., None] * (before + torch.eye(memories, dtype=leak.dtype, device=leak.device))
    if starts is not None:
        steps = steps.masked_fill(starts[..., None], 0)
    between, since = _products(steps)
    rho = torch.einsum("...ca,...cab->...cb", read, coupling)

    key = k.repeat_interleave(memories, dim=-2)  # [..., C M, K]
    strong = key * beta.flatten(-2)[..., None]
    system = (strong @ key.transpose(-1, -2)) * between  # its diagonal is taken for 1
    scores = _weigh(rho, between) * (q @ key.transpose(-1, -2))  # [..., C, C M]
    right = v.repeat_interleave(memories, dim=-2) * beta.flatten(-2)[..., None]
    through = has_open_length() or chunks > 1 or state is not None  # whether an entering state matters
    if through:
        right = torch.cat([right, _times_each(strong * delta, since)], dim=-1)
    solved = solve_unit_lower(system, right) if delta else right
    inside = scores @ solved
    last = coupling[..., -1, :, :]
    writing = _times_each(key, (last @ between[..., -memories:, :]).transpose(-1, -2))  # [..., C M, M K]
    writes = writing.transpose(-1, -2) @ solved
    if not through:
        return inside, writes[:, :, 0]
    reads = _times_each(q, _weigh(rho, since)) - inside[..., value_size:]
    kept = (last @ since[..., -memories:, :])[..., :, None, :, None] * torch.eye(
        k.shape[-1], dtype=k.dtype, device=k.device
    )[:, None, :]
    passes = kept.flatten(-2).flatten(-3, -2) - writes[..., value_size:]
    inside, writes = inside[..., :value_size], writes[..., :value_size]
    if state is None:
        state = torch.zeros_like(writes[:, :, 0])
    if has_open_length():
        before, state = scan(lambda state, passed, written: written + passed @ state, [passes, writes], state)
        return inside + reads @ before, state
    entering = []
    for n in range(chunks):
        entering.append(state)
        state = writes[:, :, n] + passes[:, :, n] @ state
    return inside + reads @ torch.stack(entering, dim=2), state


def _products(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B `[..., C, M, M]` -> N `[..., C M, C M]` (lower, with ones on the diagonal) and P `[..., C M, M]`."""
    eye = torch.eye(steps.shape[-1], dtype=steps.dtype, device=steps.device)
    # Blocks of equal size along a new axis; they start as single tokens.
    between, since = eye.expand_as(steps), steps
    while between.shape[-3] % 2 == 0:
        between, since = _join(
            (between[..., 0::2, :, :], since[..., 0::2, :, :]), (between[..., 1::2, :, :], since[..., 1::2, :, :])
        )
    blocks = zip(between.unbind(-3), since.unbind(-3), strict=True)
    return reduce(_join, blocks)


def _join(left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]):
    """N and P of two neighbouring stretches of tokens -> those of both."""
    (left_between, left_since), (right_between, right_since) = left, right
    memories = left_since.shape[-1]
    cross = right_since @ left_between[..., -memories:, :]
    since = torch.cat([left_since, right_since @ left_since[..., -memories:, :]], dim=-2)
    upper = torch.cat([left_between, left_between.new_zeros(*left_between.shape[:-1], right_between.shape[-1])], -1)
    return torch.cat([upper, torch.cat([cross, right_between], dim=-1)], dim=-2), since


def _weigh(rho: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum over the memories of a token: weights `[..., C, M]`, rows `[..., C M, X]` -> `[..., C, X]`."""
    rows = rows.unflatten(-2, rho.shape[-2:])
    terms = (rho[..., a, None] * rows[..., a, :] for a in range(rho.shape[-1]))
    return reduce(torch.add, terms)


def _times_each(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """`[..., R, K]` and `[..., R, M]` -> `[..., R, M K]`."""
    return (factors[..., None] * x[..., None, :]).flatten(-2)
