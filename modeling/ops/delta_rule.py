# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The delta rule, with an optional decay per head and token, evaluated step by step and in chunks.

    S_t = exp(g_t) S_{t-1}     u_t = beta_t (v_t - S_t^T k_t)     S_t <- S_t + k_t u_t^T     o_t = scale S_t^T q_t

(Schlag et al., arXiv 2102.11174, eq. 24; DeltaNet, Yang et al., arXiv 2406.06484; with g Gated DeltaNet, Yang et al.,
arXiv 2412.06464, eq. 10). With |k| = 1 the transition I - beta k k^T is a contraction for beta in [0, 2].

Chunk form. With D_ij = exp(sum of g after j up to i), E_i = exp(sum of g up to i) inside a chunk,
    (I + A) [U0 | W] = [beta v | beta E k]     A_ij = beta_i D_ij k_i . k_j  (j < i)        one triangular solve
    u_i = U0_i - S_in^T W_i                    P_ij = D_ij q_i . k_j         (j <= i)
    o   = P U0 + (E q - P W) S_in              S_out = (E_C I - K~^T W) S_in + K~^T U0      K~_j = D_Cj k_j
so the state passes from chunk to chunk by one [K, K] product, and all else is done for all chunks at once.

Shape suffixes: B batch, T time, H heads, K key size, V value size, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from lalm.modeling.ops.bidirectional import both_ways, layout_both_ways, refuse_states
from lalm.modeling.ops.chunks import Borders, chunk_borders, from_chunks, to_chunks
from lalm.modeling.ops.diagonal_recurrence import compute_dtype
from lalm.modeling.ops.dispatch import fla_delta
from lalm.modeling.ops.layout import SequenceLayout, check_shapes, check_state, per_document


def recurrent_delta(q, k, v, g, beta, scale, state, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Definition, by tokens: q, k `[B, T, H, K]`, v `[B, T, H, V]`, g, beta `[B, T, H]` -> o, S `[B, H, K, V]`."""
    dtype = compute_dtype(q, k, v, g, beta)
    q, k, v, beta = q.to(dtype) * scale, k.to(dtype), v.to(dtype), beta.to(dtype)
    starts_BT = layout.starts()
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    state_BHKV = state.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        k_BHK1 = k[:, t, :, :, None]
        if starts_BT is not None:
            state_BHKV = state_BHKV.masked_fill(starts_BT[:, t, None, None, None], 0)
        if g is not None:
            state_BHKV = state_BHKV * g[:, t, :, None, None].to(dtype).exp()
        correction_BHV = beta[:, t, :, None] * (v[:, t] - (state_BHKV * k_BHK1).sum(-2))
        state_BHKV = state_BHKV + k_BHK1 * correction_BHV[:, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state_BHKV).squeeze(-2))
    return torch.stack(outputs, dim=1), state_BHKV


def chunk_delta(q, k, v, g, beta, scale, state, layout, chunk_size=64) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_delta` in matrix products over chunks, with a backward pass that recomputes."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    chunk_size = min(chunk_size, q.shape[1])
    if torch.compiler.is_compiling():  # the compiler derives its own backward, and cannot trace one inside another
        return _forward(q, k, v, g, beta, scale, state, layout.document_ids(), chunk_size)
    return _ChunkDelta.apply(q, k, v, g, beta, scale, state, layout.document_ids(), chunk_size)


class _Chunked(NamedTuple):
    """What the chunks are to the state: `o = inside + reads S_in`, `S_out = passes S_in + writes`."""

    inside_BHNCV: torch.Tensor
    reads_BHNCK: torch.Tensor
    passes_BHNKK: torch.Tensor
    writes_BHNKV: torch.Tensor


def _decays(g: torch.Tensor) -> torch.Tensor:
    """`[..., C]` log decays -> D `[..., C, C]`: exp of the sum of g after j up to i for j <= i, else 0.

    Summed directly, since a difference of running sums would lose small decays beside large ones.
    """
    size = g.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    sums = g[..., None].expand(*g.shape, size).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf).exp()


def _chunked(q, k, v, g, beta, borders: Borders | None) -> _Chunked:
    """All chunks at once, from inputs `[B, H, N, C, *]`; g and beta have a last axis of 1."""
    keys, size = k.shape[-1], v.shape[-1]
    overlap, scores = k @ k.transpose(-1, -2), q @ k.transpose(-1, -2)
    reading_q, reading_k, writing_k = q, k, k
    decay = torch.ones_like(q[..., :1, :1])
    if g is None:
        scores = scores.tril()
    else:
        between, total = _decays(g[..., 0]), g.cumsum(-2).exp()
        overlap, scores = overlap * between, scores * between
        reading_q, reading_k, writing_k = q * total, k * total, k * between[..., -1, :, None]
        decay = total[..., -1:, :]
    if borders is not None:
        overlap, scores = overlap * borders.pair_BNCC, scores * borders.pair_BNCC
        reading_q, reading_k = reading_q * borders.reads_BNC1, reading_k * borders.reads_BNC1
        writing_k, decay = writing_k * borders.writes_BNC1, decay * borders.passes_BN1[..., None]
    # The solver takes the diagonal for 1 and never reads it.
    right = torch.cat([v * beta, reading_k * beta], dim=-1)
    solved = torch.linalg.solve_triangular((overlap * beta).tril(-1), right, upper=False, unitriangular=True)
    inside, writes = scores @ solved, writing_k.transpose(-1, -2) @ solved
    passes = decay * torch.eye(keys, dtype=q.dtype, device=q.device) - writes[..., size:]
    return _Chunked(inside[..., :size], reading_q - inside[..., size:], passes, writes[..., :size])


def _scan(passes, writes, state, reverse=False) -> tuple[torch.Tensor, torch.Tensor]:
    """S <- passes_n S + writes_n over the chunks; returns S before each step `[B, H, N, K, V]` and after the last."""
    before = torch.empty_like(writes)
    order = range(writes.shape[2])
    for n in reversed(order) if reverse else order:
        before[:, :, n] = state
        state = writes[:, :, n] + passes[:, :, n] @ state
    return before, state


def _prepare(q, k, v, g, beta, scale, segments, chunk_size):
    """The inputs as chunks, in the type of the arithmetic, and their document borders."""
    dtype = compute_dtype(q, k, v, g, beta)
    heads = [None if x is None else x[..., None] for x in (g, beta)]
    chunks = [None if x is None else to_chunks(x, chunk_size, dtype) for x in (q, k, v, *heads)]
    chunks[0] = chunks[0] * scale
    return chunks, chunk_borders(segments, chunk_size, dtype)


def _forward(q, k, v, g, beta, scale, state, segments, chunk_size) -> tuple[torch.Tensor, torch.Tensor]:
    chunks, borders = _prepare(q, k, v, g, beta, scale, segments, chunk_size)
    parts = _chunked(*chunks, borders)
    states, final = _scan(parts.passes_BHNKK, parts.writes_BHNKV, _entering(state, parts))
    return from_chunks(parts.inside_BHNCV + parts.reads_BHNCK @ states, q.shape[1]), final


class _ChunkDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, scale, state, segments, chunk_size):
        ctx.save_for_backward(q, k, v, g, beta, state, segments)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return _forward(q, k, v, g, beta, scale, state, segments, chunk_size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, d_final):
        q, k, v, g, beta, state, segments = ctx.saved_tensors
        chunks, borders = _prepare(q, k, v, g, beta, ctx.scale, segments, ctx.chunk_size)
        leaves = [x.requires_grad_() for x in chunks if x is not None]
        with torch.enable_grad():
            parts = _chunked(*chunks, borders)
        passes, reads = parts.passes_BHNKK.detach(), parts.reads_BHNCK.detach()
        states, _ = _scan(passes, parts.writes_BHNKV.detach(), _entering(state, parts))
        do = to_chunks(do, ctx.chunk_size, passes.dtype)
        d_final = d_final.to(passes.dtype)
        d_writes, d_state = _scan(passes.transpose(-1, -2), reads.transpose(-1, -2) @ do, d_final, reverse=True)
        states_t = states.transpose(-1, -2)
        grads = iter(torch.autograd.grad(tuple(parts), leaves, (do, do @ states_t, d_writes @ states_t, d_writes)))
        dq, dk, dv, dg, db = (
            None if x is None else from_chunks(next(grads), q.shape[1]).to(x.dtype) for x in (q, k, v, g, beta)
        )
        dq = dq * ctx.scale
        dg, db = None if dg is None else dg[..., 0], db[..., 0]
        return dq, dk, dv, dg, db, None, None if state is None else d_state.to(state.dtype), None, None


def _entering(state: torch.Tensor | None, parts: _Chunked) -> torch.Tensor:
    first = parts.writes_BHNKV[:, :, 0]
    return torch.zeros_like(first) if state is None else state.to(first.dtype)


def _both_ways(core, q, k, v, g, beta, scale, state, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of what a token reads from its left and from its right; each side has its own write included."""
    batch = q.shape[0]
    o, state = core(*(both_ways(x) for x in (q, k, v, g, beta)), scale, None, layout_both_ways(layout))
    return o[:batch] + o[batch:].flip(1), state


def _delta_rule(core, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, layout, causal):
    check_shapes(q, k, v, layout)
    for name, x in (("g", g), ("beta", beta)):
        if x is not None and x.shape != q.shape[:3]:
            raise ValueError(
                f"{name} must be one value per token and head, [B, T, H] = {tuple(q.shape[:3])}, got {tuple(x.shape)}."
            )
    if cu_seqlens is not None:
        if layout is not None:
            raise ValueError("Pass cu_seqlens or layout, not both: a layout's segments already hold the borders.")

        def one_batch(q, k, v, g, beta, initial_state=None, output_final_state=False, layout=None):
            return _delta_rule(core, q, k, v, g, beta, scale, initial_state, output_final_state, None, layout, causal)

        return per_document(one_batch, (q, k, v, g, beta), cu_seqlens, initial_state, output_final_state)
    if not causal:
        refuse_states(initial_state, output_final_state)
        core = partial(_both_ways, core)
    check_state(initial_state, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
    layout = layout or SequenceLayout()
    k, decay = layout.freeze(k, None if g is None else g[..., None])
    g = None if decay is None else decay[..., 0]
    with torch.autocast(q.device.type, enabled=False):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o, state = core(q, k, v, g, beta, scale, initial_state, layout)
        return o.to(v.dtype), state if output_final_state else None


def recurrent_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule one token at a time: the definition, and the way to decode.

    Args:
        q, k: `[B, T, H, K]`; k of unit length, or the state may grow without bound.
        v: `[B, T, H, V]`.
        beta: write strength `[B, T, H]`, in [0, 1]; up to 2 gives transitions with negative eigenvalues.
        scale: factor on q; None for `K ** -0.5`.
        initial_state: `[N, H, K, V]`; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, borders of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document borders of a batch; its rows have one state each (N = B).
        causal: False adds what each token reads from a second pass over the reversed document, without states.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[N, H, K, V]` or None. States and sums are float32,
        or float64 if an input is.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    return _delta_rule(
        recurrent_delta, q, k, v, None, beta, scale, initial_state, output_final_state, cu_seqlens, layout, causal
    )


def chunk_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_delta_rule` by matrix products over chunks of `chunk_size` tokens.

    Same arguments, same results up to rounding. The backward pass keeps the inputs and recomputes the states.
    """
    core = partial(chunk_delta, chunk_size=chunk_size)
    return _delta_rule(core, q, k, v, None, beta, scale, initial_state, output_final_state, cu_seqlens, layout, causal)


def fla_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_delta_rule` by the GPU kernels of flash-linear-attention; same arguments, precision of v."""
    return _delta_rule(
        fla_delta, q, k, v, None, beta, scale, initial_state, output_final_state, cu_seqlens, layout, causal
    )


def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_delta_rule` on a state that decays before each write.

    Args:
        g: log decay `[B, T, H]`, at most 0, natural log. Any size is safe: 0 keeps all, -50 forgets all.

    The other arguments, the results and the errors are those of `recurrent_delta_rule`.
    """
    return _delta_rule(
        recurrent_delta, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, layout, causal
    )


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_gated_delta_rule` by matrix products over chunks of `chunk_size` tokens.

    Same arguments, same results up to rounding. The backward pass keeps the inputs and recomputes the states.
    """
    core = partial(chunk_delta, chunk_size=chunk_size)
    return _delta_rule(core, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, layout, causal)


def fla_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_gated_delta_rule` by the GPU kernels of flash-linear-attention; same arguments, precision of v."""
    return _delta_rule(
        fla_delta, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, layout, causal
    )
