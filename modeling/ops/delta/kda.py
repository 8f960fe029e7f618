# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Kimi delta attention: the delta rule with a decay per token, head and channel of the keys.

    S_t = Diag(exp(g_t)) S_{t-1}    u_t = beta_t (v_t - S_t^T k_t)    S_t <- S_t + k_t u_t^T    o_t = scale S_t^T q_t

(Kimi Linear, Moonshot AI, arXiv 2510.26692, eq. 1.) `recurrent_delta` is the definition, with g `[B, T, H, K]`.

Chunk form, with the sums of g taken by channel. E_i = exp(sum of g up to i in the chunk), L_i = exp(sum after i),
    A_ij = beta_i sum_c k_ic k_jc exp(sum of g_c after j up to i)  (j < i)     P_ij = the same of q_i and k_j  (j <= i)
    (I + A) [U0 | W] = [beta v | beta E k]    u = U0 - W S_in    o = P u + (E q) S_in    S_out = E_C S_in + (L k)^T u
Every exponent is a sum of log decays, none of them positive; docs/derivations/kda.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from lalm.modeling.ops.autograd import differentiable_by, has_open_length, is_transformed
from lalm.modeling.ops.chunks import from_chunks, scan, solve_unit_lower, to_chunks
from lalm.modeling.ops.delta.delta_channels_cpp import channels_kernel, cpp_kda
from lalm.modeling.ops.delta.delta_recurrence import recurrent_delta
from lalm.modeling.ops.delta.delta_rule import NORM_EPS
from lalm.modeling.ops.delta.delta_rule_cpp import as_taken
from lalm.modeling.ops.dispatch import choose, in_form, must_separate
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.rules import Call, bidirectional_delta, check_gate, run_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes, document_by_document


def kda(
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
    use_qk_l2norm_in_kernel: bool = False,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    implementation: str = "auto",
    chunk_size: int = 16,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi delta attention: `gated_delta_rule` with a log decay `g [B, T, H, K]`, at most 0, one for each channel of
    the keys. Any size is safe. The forms are "recurrent", "chunk", "cpp" and "auto"; the time of the chunk form grows
    with `chunk_size`, its number of steps falls."""
    check_shapes(q, k, v, shares_heads=True)
    check_gate("g", g, (*v.shape[:3], q.shape[-1]), "one log decay per token, head and channel of k")
    check_gate("beta", beta, v.shape[:3], "one value per token and head")
    norm_eps = NORM_EPS if use_qk_l2norm_in_kernel else None
    forms: dict[str, Callable] = {
        "recurrent": recurrent_delta,
        "chunk": partial(chunk_channels, chunk_size=chunk_size),
        "cpp": partial(cpp_kda, wants_state=output_final_state, norm_eps=norm_eps),
    }
    keys, values = q.shape[-1], v.shape[-1]
    form = choose("kda", implementation, q, v, forms, channels_kernel(keys, values))
    if form != "cpp":
        q, k = as_taken(q, k, v, norm_eps)
    call = Call(keys**-0.5 if scale is None else scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    return run_rule(forms[form], (q, k, v, g, beta), call, (v.shape[2], keys, values), bidirectional_delta)


def chunk_channels(q, k, v, g, beta, scale, state, layout, chunk_size=16) -> tuple[torch.Tensor, torch.Tensor]:
    """`recurrent_delta` with a decay per channel, in matrix products over chunks; its backward pass recomputes."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if is_transformed():
        return recurrent_delta(q, k, v, g, beta, scale, state, layout)
    q, k, v, g, beta = layout.freeze(q, k, v, g, beta)
    if must_separate(layout, q, k, v, g, beta):

        def alone(q, k, v, g, beta, state, layout):
            return chunk_channels(q, k, v, g, beta, scale, state, layout, chunk_size)

        return document_by_document(alone, (q, k, v, g, beta), state, layout)
    starts = layout.starts()
    if starts is not None:  # with nothing left of what was before
        g = g.masked_fill(starts[..., None, None], -torch.inf)
    size = chunk_size if has_open_length() else min(chunk_size, q.shape[1])
    run = _in_chunks if torch.compiler.is_compiling() else _ChunkChannels.apply
    o, state = run(scale, size, q, k, v, g, beta, state)
    return layout.zero_padding(o), state


def _plain(ctx, q, k, v, g, beta, state) -> tuple[torch.Tensor, torch.Tensor]:
    return recurrent_delta(q, k, v, g, beta, ctx.scale, state, SequenceLayout())


class _ChunkChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, size, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.size = scale, size
        return _in_chunks(scale, size, *tensors)

    @staticmethod
    @differentiable_by(_plain, constants=2)
    def backward(ctx, do, d_final):
        leaves = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = _in_chunks(ctx.scale, ctx.size, *leaves)
        given = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(outputs, given, (do, d_final)))
        return None, None, *(None if x is None else next(found) for x in leaves)


def _in_chunks(scale, size, q, k, v, g, beta, state) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, length = compute_dtype(q, k, v, g, beta), q.shape[1]
    q, k, v, g, beta = (to_chunks(x, size, dtype) for x in (q, k, v, g, beta[..., None]))
    q = q * scale
    overlap, scores = _pairs(q, k, g)
    read = g.cumsum(-2).exp()
    leave = F.pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1)).exp()
    right = torch.cat([v, read * k], -1) * beta
    solved = solve_unit_lower((overlap * beta).tril(-1), right)
    written, read_k = solved.split([v.shape[-1], k.shape[-1]], -1)
    reading_q, leaving_k, keep = read * q, leave * k, read[..., -1, :, None]
    state = v.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.to(dtype)
    if has_open_length():

        def step(state, keep, leaving_k, written, read_k):
            return keep * state + leaving_k.transpose(-1, -2) @ (written - read_k @ state)

        before, state = scan(step, [keep, leaving_k, written, read_k], state)
        o = scores @ (written - read_k @ before) + reading_q @ before
        return from_chunks(o, length), state
    outputs = []
    for n in range(q.shape[2]):
        updates = written[:, :, n] - read_k[:, :, n] @ state
        outputs.append(scores[:, :, n] @ updates + reading_q[:, :, n] @ state)
        state = keep[:, :, n] * state + leaving_k[:, :, n].transpose(-1, -2) @ updates
    return from_chunks(torch.stack(outputs, 2), length), state


def _pairs(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[..., C, K]` -> sums over channels of k_i k_j and of q_i k_j times the decay between j and i, `[..., C, C]`, 0
    above the diagonal. A column at a time, each from its own sum of log decays: a difference of two running sums would
    lose small decays next to large ones."""
    overlap: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    for j in range(k.shape[-2]):
        between = F.pad(g[..., j + 1 :, :], (0, 0, 1, 0)).cumsum(-2).exp()  # from j on
        left = between * k[..., j : j + 1, :]
        for found, x in ((overlap, k), (scores, q)):
            found.append(F.pad((x[..., j:, :] * left).sum(-1), (j, 0)))
    return torch.stack(overlap, -1), torch.stack(scores, -1)


recurrent_kda, chunk_kda = in_form(kda, "recurrent"), in_form(kda, "chunk")
