# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""The recurrence behind classic linear attention, retention and GLA, evaluated step by step and in chunks.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t                (GLA, arXiv 2312.06635, eq. 3)

Shape suffixes: B batch, T time, H heads, K key size, V value size, N chunks, C tokens of a chunk, D = K (a gate per
channel) or 1 (a gate per head). Everything is computed in float32, in float64 for float64 inputs.

Chunk form. With G the running sum of g inside a chunk, E its last row, and any reference R per chunk and channel,
    q~_i = q_i exp(G_i - R),   k~_j = k_j exp(R - G_j)
    o_i  = sum_{j <= i} (q~_i . k~_j) v_j + (exp(R) S_in)^T q~_i
    S_out = exp(E) S_in + exp(E - R) sum_j k~_j v_j^T
R = E / 2 keeps every exponent within half the decay of one chunk, so a chunk costs what ungated attention costs. Where
that could overflow (`dispatch.MAX_DECAY`) the scores come from exponents that are never positive: see
`_bounded_levels`. The backward pass keeps the inputs only and recomputes the chunk states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import differentiable_by, has_open_length, is_transformed
from lalm.modeling.ops.chunks import (
    by_tokens,
    chunk_boundaries,
    from_chunks,
    join_lower,
    running_sums,
    scan,
    suffix_sums,
    to_chunks,
)
from lalm.modeling.ops.dispatch import chunks_of_decays, must_separate
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.sequence_layout import SequenceLayout, document_by_document


def recurrent_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Definition, by tokens: q, k `[B, T, H, K]`, v `[B, T, H, V]`, g `[B, T, H, D]` -> o, S `[B, H, K, V]`."""
    layout = layout or SequenceLayout()
    dtype = compute_dtype(q, k, v, g)
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    q, k, v, g = layout.freeze(q, k, v, None if g is None else g.to(dtype))
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])

    def step(state_BHKV, q_BHK, k_BHK, v_BHV, g_BHD, starts_B):
        if starts_B is not None:
            state_BHKV = state_BHKV.masked_fill(starts_B[:, None, None, None], 0)
        if g_BHD is not None:
            state_BHKV = state_BHKV * g_BHD[..., None].exp()
        state_BHKV = state_BHKV + k_BHK[..., None] * v_BHV[:, :, None, :]
        return state_BHKV, (q_BHK[:, :, None, :] @ state_BHKV).squeeze(-2)

    o, state = by_tokens(step, (q, k, v, g, layout.starts()), state.to(dtype))
    return layout.zero_padding(o), state


def chunk_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float,
    state: torch.Tensor | None,
    layout: SequenceLayout | None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_diagonal` in matrix products over chunks, with a backward pass that recomputes."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}.")
    layout = layout or SequenceLayout()
    if is_transformed():
        return recurrent_diagonal(q, k, v, g, scale, state, layout)
    q, k, v, g = layout.freeze(q, k, v, g)
    if must_separate(layout, q, k, v, g):

        def alone(q, k, v, g, state, layout):
            return chunk_diagonal(q, k, v, g, scale, state, layout, chunk_size)

        return document_by_document(alone, (q, k, v, g), state, layout)
    if not has_open_length():
        chunk_size = min(chunk_size, 1 << (q.shape[1] - 1).bit_length())
    chunk_size, factored = chunks_of_decays(g, chunk_size)
    o, state = _ChunkDiagonal.apply(scale, chunk_size, factored, q, k, v, g, state, layout.document_ids())
    return layout.zero_padding(o), state


def normalized(core: Callable, eps: float) -> Callable:
    """A core whose outputs are divided by z . q + eps, where z, one more column of the state, sums the keys."""

    def read(q, k, v, g, scale, state, layout):
        o, state = core(q, k, F.pad(v, (0, 1), value=1.0), g, scale, state, layout)
        if is_transformed():
            return o[..., :-1] / (o[..., -1:] + eps), state
        return _Quotient.apply(o, eps)[0], state

    return read


class _Quotient(torch.autograd.Function):
    """`sums [..., V + 1]` -> all but the last by the last plus eps `[..., V]`; two passes over memory each way.
    What it divides by is an output too: what is kept of outputs can be differentiated again."""

    @staticmethod
    def forward(ctx, sums, eps):
        size = sums[..., -1:] + eps
        o = sums[..., :-1] / size
        ctx.save_for_backward(o, size)
        ctx.set_materialize_grads(False)
        return o, size

    @staticmethod
    def backward(ctx, do, d_size):
        o, size = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        along = (do[..., None, :] @ o[..., None]).squeeze(-1)
        d_sums = torch.cat([do, -along], dim=-1) / size
        return d_sums if d_size is None else d_sums + F.pad(d_size, (o.shape[-1], 0)), None


def _scale_rows(factor: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """Multiply the key rows of `[B, H, N, K, V]` by `[B, H, N, D]`."""
    return state if factor is None else state * factor[..., None]


def _scan(
    updates: torch.Tensor, decay: torch.Tensor | None, state: torch.Tensor | None, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """S <- decay_n S + updates_n over the chunks; returns S before each step `[B, H, N, K, V]` and after the last."""
    state = torch.zeros_like(updates[:, :, 0]) if state is None else state.to(updates.dtype)
    if decay is None:
        return scan(lambda state, update: update + state, [updates], state, reverse)
    return scan(lambda state, update, kept: update + state * kept[..., None], [updates, decay], state, reverse)


def _bounded_levels(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> Iterator[tuple]:
    """Split the lower triangle into square blocks, [half, half] for half = C/2, ..., 1, each with exponents <= 0.

    In a block every query lies in the second and every key in the first half of a window of 2 half tokens. With R = G
    at the first query, G_i - R and R - G_j are plain sums of log decays: never positive, however strong the decay, and
    summed directly, since a difference of large G would lose the small decays between them.
    Yields half and, per window, the queries and keys `[..., half, K]` and their factors.
    """
    half = q.shape[-2] // 2
    while half:
        q_windows, k_windows, windows = (x.unflatten(-2, (-1, 2 * half)) for x in (q, k, g))
        k_factor = suffix_sums(windows[..., 1 : half + 1, :]).exp()
        q_factor = F.pad(windows[..., half + 1 :, :].cumsum(-2), (0, 0, 1, 0)).exp()
        yield half, q_windows[..., half:, :], k_windows[..., :half, :], q_factor, k_factor
        half //= 2


def _level_blocks(scores: torch.Tensor, half: int) -> torch.Tensor:
    """View of the blocks `[..., C / (2 half), half, half]` of `_bounded_levels` inside `scores [..., C, C]`."""
    windows = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return windows.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :].movedim(-1, -3)


def _bounded_scores(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    if has_open_length():
        return _bounded_scores_exported(q, k, g)
    scores = torch.diag_embed((q * k).sum(-1))
    for half, q_block, k_block, q_factor, k_factor in _bounded_levels(q, k, g):
        _level_blocks(scores, half).copy_((q_block * q_factor) @ (k_block * k_factor).transpose(-1, -2))
    return scores


def _bounded_scores_exported(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The same by joining blocks: ONNX does not write into views."""
    scores = (q * k).sum(-1)[..., None, None]
    for _, q_block, k_block, q_factor, k_factor in reversed(list(_bounded_levels(q, k, g))):
        below = (q_block * q_factor) @ (k_block * k_factor).transpose(-1, -2)
        scores = join_lower(scores[..., 0::2, :, :], below, scores[..., 1::2, :, :])
    return scores[..., 0, :, :]


def _bounded_scores_backward(
    d_scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    diagonal = d_scores.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk = diagonal * k, diagonal * q
    for half, q_block, k_block, q_factor, k_factor in _bounded_levels(q, k, g):
        block = _level_blocks(d_scores, half)
        dq_view = dq.unflatten(-2, (-1, 2, half)).select(-3, 1)
        dk_view = dk.unflatten(-2, (-1, 2, half)).select(-3, 0)
        dq_view += (block @ (k_block * k_factor)) * q_factor
        dk_view += (block.transpose(-1, -2) @ (q_block * q_factor)) * k_factor
    return dq, dk


class _Chunks:
    """What forward and backward both need, computed from the inputs `[B, H, N, C, *]` by either."""

    def __init__(self, q, k, g, segments, factored):
        self.q, self.k, self.boundaries = q, k, chunk_boundaries(segments, q.shape[-2], q.dtype)
        self.q_factor = self.k_factor = self.edge = self.decay = self.bounded = None
        if g is not None:
            self._set_factors(g, factored)
        self.q_scaled = q if self.q_factor is None else q * self.q_factor
        self.k_scaled = k if self.k_factor is None else k * self.k_factor
        if self.boundaries is None:
            self.q_reads, self.k_writes = self.q_scaled, self.k_scaled
        else:
            self.q_reads = self.q_scaled * self.boundaries.reads_BNC1
            self.k_writes = self.k_scaled * self.boundaries.writes_BNC1
            passes = self.boundaries.passes_BN1
            self.decay = passes.expand(-1, q.shape[1], -1, -1) if self.decay is None else self.decay * passes

    def _set_factors(self, g: torch.Tensor, factored: bool) -> None:
        total = g.cumsum(-2)
        end = total[..., -1, :]
        self.decay = end.exp()
        if factored:
            self.q_factor = (total - end[..., None, :] / 2).exp()
            self.k_factor = self.q_factor.reciprocal()
            self.edge = (end / 2).exp()
        else:
            self.q_factor = total.exp()
            self.k_factor = suffix_sums(F.pad(g[..., 1:, :], (0, 0, 0, 1))).exp()
            self.bounded = g

    def states(self, v: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before each chunk and after the last. (torch.export(strict=True) loses what a constructor keeps of
        a loop without a length.)"""
        return _scan(_scale_rows(self.edge, self.k_writes.transpose(-1, -2) @ v), self.decay, state)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        # tril_ selects, so whatever stands above the diagonal cannot reach a result even if it is not finite.
        scores = scores.tril_()
        return scores if self.boundaries is None else scores.mul_(self.boundaries.pair_BNCC)

    def scores(self) -> torch.Tensor:
        if self.bounded is None:
            return self.mask(self.q_scaled @ self.k_scaled.transpose(-1, -2))
        return self.mask(_bounded_scores(self.q, self.k, self.bounded))

    def scores_backward(self, d_scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of q and k through the scores."""
        if self.bounded is not None:
            return _bounded_scores_backward(d_scores, self.q, self.k, self.bounded)
        dq, dk = d_scores @ self.k_scaled, d_scores.transpose(-1, -2) @ self.q_scaled
        if self.q_factor is None or self.k_factor is None:
            return dq, dk
        return dq.mul_(self.q_factor), dk.mul_(self.k_factor)

    def state_backward(self, d_reads: torch.Tensor, d_writes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of q and k through what they read from and write to the state, in place."""
        if self.q_factor is not None and self.k_factor is not None:
            d_reads, d_writes = d_reads.mul_(self.q_factor), d_writes.mul_(self.k_factor)
        if self.boundaries is not None:
            d_reads, d_writes = d_reads.mul_(self.boundaries.reads_BNC1), d_writes.mul_(self.boundaries.writes_BNC1)
        return d_reads, d_writes


def _prepare(q, k, v, g, scale, segments, chunk_size, factored) -> tuple[Any, _Chunks]:
    """v in chunks, and what the others give."""
    dtype = compute_dtype(q, k, v, g)
    q_c, k_c, v_c, g_c = (None if x is None else to_chunks(x, chunk_size, dtype) for x in (q, k, v, g))
    if scale != 1:
        q_c = q_c * scale
    return v_c, _Chunks(q_c, k_c, g_c, segments, factored)


def _plain(ctx, q, k, v, g, state, segments) -> tuple[torch.Tensor, torch.Tensor]:
    return recurrent_diagonal(q, k, v, g, ctx.scale, state, SequenceLayout(segments=segments))


class _ChunkDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, chunk_size, factored, q, k, v, g, state, segments):
        ctx.save_for_backward(q, k, v, g, state, segments)
        ctx.scale, ctx.plan = scale, (chunk_size, factored)
        v_c, chunks = _prepare(q, k, v, g, scale, segments, chunk_size, factored)
        states, final = chunks.states(v_c, state)
        o = chunks.scores() @ v_c
        o += chunks.q_reads @ _scale_rows(chunks.edge, states)
        return from_chunks(o, q.shape[1]), final

    @staticmethod
    @differentiable_by(_plain, constants=3)
    def backward(ctx, do, d_final):
        q, k, v, g, state, segments = ctx.saved_tensors
        v_c, chunks = _prepare(q, k, v, g, ctx.scale, segments, *ctx.plan)
        states, final = chunks.states(v_c, state)
        do = to_chunks(do, ctx.plan[0], v_c.dtype)
        d_updates = _scale_rows(chunks.edge, chunks.q_reads.transpose(-1, -2) @ do)
        d_leaving, d_state = _scan(d_updates, chunks.decay, d_final, reverse=True)
        d_leaving_scaled = _scale_rows(chunks.edge, d_leaving)
        dv = chunks.scores().transpose(-1, -2) @ do
        dv += chunks.k_writes @ d_leaving_scaled
        d_reads = do @ _scale_rows(chunks.edge, states).transpose(-1, -2)
        d_reads, d_writes = chunks.state_backward(d_reads, v_c @ d_leaving_scaled.transpose(-1, -2))
        d_scores, d_own, dg = chunks.mask(do @ v_c.transpose(-1, -2)), None, None
        if g is not None and ctx.needs_input_grad[6]:
            # No gate acts between a token and itself. Its share would be in q dq and in k dk, and leave its
            # rounding, perhaps all there is of dg, in their difference: it comes in last.
            d_own = d_scores.diagonal(dim1=-2, dim2=-1).clone()[..., None]
            d_scores.diagonal(dim1=-2, dim2=-1).zero_()
        dq, dk = chunks.scores_backward(d_scores)
        dq += d_reads
        dk += d_writes
        if d_own is not None:
            ends = _at_boundaries(states, final, d_state, d_leaving, d_final)
            dg = _gate_gradient((chunks.q * dq).sub_(chunks.k * dk), ends, g)
            dq.addcmul_(d_own, chunks.k)
            dk.addcmul_(d_own, chunks.q)
        if ctx.scale != 1:
            dq *= ctx.scale
        length = q.shape[1]
        dq, dk, dv = (from_chunks(x, length).to(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))
        return None, None, None, dq, dk, dv, dg, None if state is None else d_state.to(state.dtype), None


def _at_boundaries(states, final, d_state, d_leaving, d_final) -> torch.Tensor:
    """<dL/dS, S> before every chunk and after the last, key by key: `[B, H, N + 1, K]`."""
    first, last = (states[:, :, :1] * d_state[:, :, None]), (final * d_final)[:, :, None]
    between = states[:, :, 1:] * d_leaving[:, :, :-1]
    return torch.cat([x.sum(-1) for x in (first, between, last)], dim=2)


def _gate_gradient(changes, boundaries, g) -> torch.Tensor:
    """dL/dg, which is <dL/dS, S> before a token; the token takes q dq - k dk away."""
    if g.shape[-1] == 1:
        changes, boundaries = changes.sum(-1, keepdim=True), boundaries.sum(-1, keepdim=True)
    sums = running_sums(changes, boundaries[:, :, :-1], boundaries[:, :, 1:])
    return from_chunks(sums, g.shape[1]).to(g.dtype)
