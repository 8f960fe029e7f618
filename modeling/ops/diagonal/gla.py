# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Gated linear attention (Yang et al., arXiv 2312.06635): a state whose every key channel decays by its own gate.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t          (eq. 3; g_t is the log of its
    alpha_t)

The recurrence itself, step by step and in chunks, is in diagonal_recurrence.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lalm.modeling.ops.diagonal.diagonal_cpp import cpp_diagonal, diagonal_kernel
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal, recurrent_diagonal
from lalm.modeling.ops.dispatch import choose, in_form
from lalm.modeling.ops.fla_kernels import fla_diagonal
from lalm.modeling.ops.rules import Call, bidirectional_diagonal, check_gate, run_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes


def gla(
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
    implementation: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        g: log decay `[B, T, H, K]`, at most 0, natural log. Any size is safe: 0 keeps all, -50 forgets all.
        scale: factor on q; None for `K ** -0.5`.
        initial_state: `[N, H, K, V]`; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, boundaries of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document boundaries of a batch; its rows have one state each (N = B).
        causal: False reads both sides of every document, without states (`ops/rules.py`).
        implementation: "recurrent" (one token at a time: the definition, and the way to decode), "chunk" (matrix
            products over chunks; the backward pass keeps the inputs and recomputes the states), "cpp" (the C++ kernel
            for CPUs, float32), "fla" (the GPU kernels of flash-linear-attention, precision of v), or "auto" for what
            is fastest. All give the same results up to rounding.
        chunk_size: tokens of a chunk, a power of two.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[N, H, K, V]` or None. States and sums are float32,
        or float64 if an input is.

    Raises:
        ValueError: a shape does not fit, or the implementation does not exist for this input; the message names the
            argument.
    """
    check_shapes(q, k, v)
    check_gate("g", g, q.shape, "one log decay per key channel")
    forms: dict[str, Callable] = {
        "recurrent": recurrent_diagonal,
        "chunk": partial(chunk_diagonal, chunk_size=chunk_size),
        "fla": fla_diagonal,
        "cpp": cpp_diagonal,
    }
    keys, values = q.shape[-1], v.shape[-1]
    core = forms[choose("gla", implementation, q, v, forms, diagonal_kernel(keys, values, keys))]
    scale = keys**-0.5 if scale is None else scale
    call = Call(scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    return run_rule(core, (q, k, v, g), call, (q.shape[2], keys, values), bidirectional_diagonal)


recurrent_gla, chunk_gla = in_form(gla, "recurrent"), in_form(gla, "chunk")
