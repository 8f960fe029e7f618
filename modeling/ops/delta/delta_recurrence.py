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

from typing import Any

import torch

from lalm.modeling.ops.autograd import differentiable_by, has_open_length, is_transformed
from lalm.modeling.ops.chunks import (
    Boundaries,
    by_tokens,
    chunk_boundaries,
    from_chunks,
    running_sums,
    scan,
    solve_unit_lower,
    to_chunks,
)
from lalm.modeling.ops.dispatch import must_separate
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout, document_by_document


def recurrent_delta(q, k, v, g, beta, scale, state, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Definition, by tokens: q, k `[B, T, H, K]`, v `[B, T, H, V]`, beta `[B, T, H]`, g None, `[B, T, H]` or, one for
    each row of the state, `[B, T, H, K]` -> o, S `[B, H, K, V]`."""
    dtype = compute_dtype(q, k, v, g, beta)
    q, k, v, g, beta = layout.freeze(q, k, v, g, beta)
    q, k, v, beta = q.to(dtype) * scale, k.to(dtype), v.to(dtype), beta.to(dtype)
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])

    def step(state_BHKV, q_BHK, k_BHK, v_BHV, g, beta_BH, starts_B):
        if starts_B is not None:
            state_BHKV = state_BHKV.masked_fill(starts_B[:, None, None, None], 0)
        if g is not None:
            decay = g[..., None, None] if g.ndim == 2 else g[..., None]
            state_BHKV = state_BHKV * decay.to(dtype).exp()
        correction_BHV = beta_BH[..., None] * (v_BHV - (k_BHK[:, :, None, :] @ state_BHKV).squeeze(-2))
        state_BHKV = state_BHKV + k_BHK[..., None] * correction_BHV[:, :, None, :]
        return state_BHKV, (q_BHK[:, :, None, :] @ state_BHKV).squeeze(-2)

    o, state = by_tokens(step, (q, k, v, g, beta, layout.starts()), state.to(dtype))
    return layout.zero_padding(o), state


def chunk_delta(q, k, v, g, beta, scale, state, layout, chunk_size=64) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_delta` in matrix products over chunks, with a backward pass that recomputes."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if is_transformed():
        return recurrent_delta(q, k, v, g, beta, scale, state, layout)
    q, k, v, g, beta = layout.freeze(q, k, v, g, beta)
    if must_separate(layout, q, k, v, g, beta):

        def alone(q, k, v, g, beta, state, layout):
            return chunk_delta(q, k, v, g, beta, scale, state, layout, chunk_size)

        return document_by_document(alone, (q, k, v, g, beta), state, layout)
    chunk_size = chunk_size if has_open_length() else min(chunk_size, q.shape[1])
    o, state = _ChunkDelta.apply(scale, chunk_size, q, k, v, g, beta, state, layout.document_ids())
    return layout.zero_padding(o), state


def _decays(g: torch.Tensor) -> torch.Tensor:
    """`[..., C]` log decays -> D `[..., C, C]`: exp of the sum of g after j up to i for j <= i, else 0.

    Summed directly, since a difference of running sums would lose small decays next to large ones.
    """
    size = g.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=g.device).tril()
    sums = g[..., None].expand(*g.shape, size).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf).exp()


class _Chunks:
    """All chunks at once, from inputs `[B, H, N, C, *]` (g and beta with a last axis of 1), in forward and backward.

    To the state they are `o = inside + reads S_in` and `S_out = passes S_in + writes`.
    """

    def __init__(self, q, k, v, g, beta, boundaries: Boundaries | None):
        self.q, self.k, self.v, self.beta, self.value_size = q, k, v, beta, v.shape[-1]
        self._set_decays(g, boundaries)
        scores = q @ k.transpose(-1, -2)
        self.scores = scores.tril_() if self.between is None else scores.mul_(self.between)
        self.overlap = self._between(k @ k.transpose(-1, -2))
        self.reading_k = _times(k, self.read)
        # The solver takes the diagonal for 1 and never reads it.
        self.system = (self.overlap * beta).tril_(-1)
        right = torch.cat([v * beta, self.reading_k * beta], dim=-1)
        self.solved = solve_unit_lower(self.system, right)
        self.writing_k = _times(k, self.write)
        inside, writes = self.scores @ self.solved, self.writing_k.transpose(-1, -2) @ self.solved
        self.inside, self.writes = inside[..., : self.value_size], writes[..., : self.value_size]
        self.reads = _times(q, self.read) - inside[..., self.value_size :]
        eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        kept = eye if isinstance(self.keep, float) else eye * self.keep[..., None]
        self.passes = kept - writes[..., self.value_size :]

    def _set_decays(self, g: torch.Tensor | None, boundaries: Boundaries | None) -> None:
        """The decays between two tokens, before a token, after it, and over the whole chunk; None without decay."""
        self.between = self.read = self.write = None
        self.is_gated = g is not None
        self.keep: torch.Tensor | float = 1.0
        if g is not None:
            self.between, self.read = _decays(g[..., 0]), g.cumsum(-2).exp()
            self.write, self.keep = self.between[..., -1, :, None], self.read[..., -1, :]
        if boundaries is not None:
            pairs = boundaries.pair_BNCC.tril()
            self.between = pairs if self.between is None else self.between * pairs
            self.read = _times(boundaries.reads_BNC1, self.read)
            self.write = _times(boundaries.writes_BNC1, self.write)
            self.keep = boundaries.passes_BN1 * self.keep

    def _between(self, pairs: torch.Tensor) -> torch.Tensor:
        return pairs if self.between is None else pairs.mul_(self.between)

    def backward(self, d_inside, d_reads, d_passes, d_writes) -> tuple[Any, ...]:
        """Gradients of the four quantities -> those of q, k, v, beta and g (`[B, H, N, C, 1]`, None if it is)."""
        d_read_both, d_write_both = torch.cat([d_inside, -d_reads], -1), torch.cat([d_writes, -d_passes], -1)
        d_scores = d_read_both @ self.solved.transpose(-1, -2)
        d_writing_k = self.solved @ d_write_both.transpose(-1, -2)
        d_solved = self.scores.transpose(-1, -2) @ d_read_both + self.writing_k @ d_write_both
        d_right = torch.linalg.solve_triangular(
            self.system.transpose(-1, -2), d_solved, upper=True, unitriangular=True
        )
        d_system = (d_right @ self.solved.transpose(-1, -2)).neg_().tril_(-1)
        d_v, d_reading_k = (d_right * self.beta).split([self.value_size, self.k.shape[-1]], dim=-1)
        d_beta = (d_right[..., : self.value_size] * self.v).sum(-1, keepdim=True)
        d_beta += (d_right[..., self.value_size :] * self.reading_k).sum(-1, keepdim=True)
        d_beta += (d_system * self.overlap).sum(-1, keepdim=True)
        d_g = self._gate_gradient(d_scores, d_system, d_reads, d_reading_k, d_writing_k, d_passes)
        d_overlap = self._between(d_system * self.beta)
        d_scores = d_scores.tril_() if self.between is None else d_scores.mul_(self.between)
        d_q = d_scores @ self.k + _times(d_reads, self.read)
        d_k = d_scores.transpose(-1, -2) @ self.q + (d_overlap + d_overlap.transpose(-1, -2)) @ self.k
        d_k += _times(d_reading_k, self.read) + _times(d_writing_k, self.write)
        return d_q, d_k, d_v, d_beta, d_g

    def _gate_gradient(self, d_scores, d_system, d_reads, d_reading_k, d_writing_k, d_passes) -> torch.Tensor | None:
        """Every decay is exp of a sum of g: what it multiplies, times the gradient of that, counts for every g between
        a token that writes and one that reads, or the ends of the chunk."""
        if not self.is_gated:
            return None
        pairs = d_system * self.system + d_scores * self.scores
        pairs.diagonal(dim1=-2, dim2=-1).zero_()  # a token with itself: no decay
        reads = (d_reading_k * self.reading_k + d_reads * _times(self.q, self.read)).sum(-1, keepdim=True)
        writes = (d_writing_k * self.writing_k).sum(-1, keepdim=True)
        through = (d_passes.diagonal(dim1=-2, dim2=-1).sum(-1) * _last(self.keep))[..., None]
        changes = (pairs.sum(-1) - pairs.sum(-2))[..., None] + reads - writes
        return running_sums(changes, reads.sum(-2) + through, writes.sum(-2) + through)


def _times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    return x if factor is None else x * factor


def _last(keep: torch.Tensor | float) -> torch.Tensor | float:
    return keep[..., 0] if isinstance(keep, torch.Tensor) else keep


def _scan(passes, writes, state, reverse=False) -> tuple[torch.Tensor, torch.Tensor]:
    """S <- passes_n S + writes_n over the chunks; returns S before each step `[B, H, N, K, V]` and after the last."""
    state = torch.zeros_like(writes[:, :, 0]) if state is None else state.to(writes.dtype)
    return scan(lambda state, passed, written: written + passed @ state, [passes, writes], state, reverse)


def _prepare(q, k, v, g, beta, scale, segments, chunk_size) -> _Chunks:
    """The inputs as chunks, in the type of the arithmetic."""
    dtype = compute_dtype(q, k, v, g, beta)
    q_c, k_c, v_c, beta_c = (to_chunks(x, chunk_size, dtype) for x in (q, k, v, beta[..., None]))
    g_c = None if g is None else to_chunks(g[..., None], chunk_size, dtype)
    return _Chunks(q_c * scale, k_c, v_c, g_c, beta_c, chunk_boundaries(segments, chunk_size, dtype))


def _plain(ctx, q, k, v, g, beta, state, segments) -> tuple[torch.Tensor, torch.Tensor]:
    return recurrent_delta(q, k, v, g, beta, ctx.scale, state, SequenceLayout(segments=segments))


class _ChunkDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, chunk_size, q, k, v, g, beta, state, segments):
        ctx.save_for_backward(q, k, v, g, beta, state, segments)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        chunks = _prepare(q, k, v, g, beta, scale, segments, chunk_size)
        states, final = _scan(chunks.passes, chunks.writes, state)
        return from_chunks(chunks.inside + chunks.reads @ states, q.shape[1]), final

    @staticmethod
    @differentiable_by(_plain, constants=2)
    def backward(ctx, do, d_final):
        q, k, v, g, beta, state, segments = ctx.saved_tensors
        chunks = _prepare(q, k, v, g, beta, ctx.scale, segments, ctx.chunk_size)
        states, _ = _scan(chunks.passes, chunks.writes, state)
        do = to_chunks(do, ctx.chunk_size, states.dtype)
        d_updates = chunks.reads.transpose(-1, -2) @ do
        d_writes, d_state = _scan(chunks.passes.transpose(-1, -2), d_updates, d_final, reverse=True)
        states = states.transpose(-1, -2)
        dq, dk, dv, d_beta, dg = chunks.backward(do, do @ states, d_writes @ states, d_writes)
        dq, dk, dv, d_beta = (
            from_chunks(x, q.shape[1]).to(y.dtype) for x, y in ((dq * ctx.scale, q), (dk, k), (dv, v), (d_beta, beta))
        )
        if g is not None:
            dg = from_chunks(dg, q.shape[1]).to(g.dtype)[..., 0]
        d_beta = d_beta[..., 0]
        return None, None, dq, dk, dv, dg, d_beta, None if state is None else d_state.to(state.dtype), None
