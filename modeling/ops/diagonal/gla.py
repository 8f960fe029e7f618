# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Gated linear attention (Yang et al., arXiv 2312.06635): a state whose every key channel decays by its own gate.

S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t          (eq. 3; g_t is the log of its alpha_t)
"""

from __future__ import annotations

from functools import partial

import torch

from lalm.modeling.ops.bidirectional import bidirectional_diagonal, refuse_states
from lalm.modeling.ops.diagonal.diagonal_cpp import cpp_diagonal
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal, recurrent_diagonal
from lalm.modeling.ops.dtypes import without_autocast
from lalm.modeling.ops.fla_kernels import fla_diagonal
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes, check_state, per_document


def _gla(core, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, layout, causal):
    check_shapes(q, k, v, layout)
    if g.shape != q.shape:
        raise ValueError(
            f"g must be one log decay per key channel, [B, T, H, K] = {tuple(q.shape)}, got {tuple(g.shape)}."
        )
    if cu_seqlens is not None:
        if layout is not None:
            raise ValueError("Pass cu_seqlens or layout, not both: a layout's segments already hold the borders.")

        def one_batch(q, k, v, g, initial_state=None, output_final_state=False, layout=None):
            return _gla(core, q, k, v, g, scale, initial_state, output_final_state, None, layout, causal)

        return per_document(one_batch, (q, k, v, g), cu_seqlens, initial_state, output_final_state)
    if not causal:
        refuse_states(initial_state, output_final_state)
        core = bidirectional_diagonal(core)
    check_state(initial_state, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
    with without_autocast(q.device):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o, state = core(q, k, v, g, scale, initial_state, layout)
        return o.to(v.dtype), state if output_final_state else None


def recurrent_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention one token at a time: the definition, and the way to decode.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log decay `[B, T, H, K]`, at most 0, natural log. Any size is safe: 0 keeps all, -50 forgets all.
        scale: factor on q; None for `K ** -0.5`.
        initial_state: `[N, H, K, V]`; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, borders of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document borders of a batch; its rows have one state each (N = B).
        causal: False reads both sides of every document, without states (`ops/bidirectional.py`).

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[N, H, K, V]` or None. States and sums are float32,
        or float64 if an input is.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    return _gla(recurrent_diagonal, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, layout, causal)


def chunk_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_gla` by matrix products over chunks of `chunk_size` (a power of two) tokens.

    Same arguments, same results up to rounding. The backward pass keeps the inputs and recomputes the states.
    """

    return _gla(
        partial(chunk_diagonal, chunk_size=chunk_size),
        *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, layout, causal),
    )


def fla_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_gla` by the GPU kernels of flash-linear-attention; same arguments, precision of v."""
    return _gla(fla_diagonal, *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, layout, causal))


def cpp_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_gla` by the C++ kernel of `ops/diagonal/diagonal_cpp.py`; same arguments, float32 on a CPU."""
    return _gla(cpp_diagonal, *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, layout, causal))
