# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236), with an optional decay per head and token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T     z_t = exp(g_t) z_{t-1} + k_t
    o_t = S_t^T q_t / (z_t . q_t + eps)    (eq. 16-20; without the denominator when normalize=False)

The caller applies the feature map to q and k. The normaliser z is one more column of the state, updated by a value
that is always 1; the C++ kernel computes it without that column.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lalm.modeling.ops.diagonal.diagonal_cpp import cpp_diagonal, diagonal_kernel
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal, normalized, recurrent_diagonal
from lalm.modeling.ops.diagonal.taylor import taylor_features
from lalm.modeling.ops.dispatch import choose, in_form
from lalm.modeling.ops.fla_kernels import fla_diagonal
from lalm.modeling.ops.rules import Call, bidirectional_diagonal, check_gate, run_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    normalize: bool = True,
    eps: float = 1e-6,
    taylor: bool = False,
    implementation: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Linear attention.

    Args:
        q, k: `[B, T, H, K]`, feature map applied, not negative if `normalize`.
        v: `[B, T, H, V]`.
        g: log decay `[B, T, H]`, at most 0, natural log; None for none.
        scale: factor on q; None for `K ** -0.5`. Under `normalize` it matters only relative to `eps`.
        initial_state: `[N, H, K, V]`, with `normalize` `[N, H, K, V + 1]` whose last column is z; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, boundaries of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document boundaries of a batch; its rows have one state each (N = B).
        causal: False reads both sides of every document, without states (`ops/rules.py`).
        normalize: divide by `z . q + eps`.
        taylor: q and k are `[B, T, H, D]` without a feature map, and `taylor_features` (Based) is applied here; the
            C++ kernel makes the features block by block. K, of states and `scale`, is the number of features.
        implementation: "recurrent", "chunk", "cpp", "fla" or "auto", as for `gla`.
        chunk_size: tokens of a chunk, a power of two.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None. States and sums are float32, or float64 if
        an input is.

    Raises:
        ValueError: a shape does not fit, or the implementation does not exist for this input.
    """
    check_shapes(q, k, v)
    if g is not None:
        check_gate("g", g, q.shape[:3], "one log decay per token and head")
        g = g[..., None]
    forms: dict[str, Callable] = {
        "recurrent": recurrent_diagonal,
        "chunk": partial(chunk_diagonal, chunk_size=chunk_size),
        "fla": fla_diagonal,
        "cpp": cpp_diagonal,
    }
    kernel = diagonal_kernel(q.shape[-1], v.shape[-1], 0 if g is None else 1, normalize, taylor)
    form = choose("linear_attention", implementation, q, v, forms, kernel)
    fused = form == "cpp" and causal
    if taylor and not fused:
        q, k, taylor = taylor_features(q), taylor_features(k), False
    core = partial(cpp_diagonal, taylor=taylor) if fused else forms[form]
    if normalize:
        core = partial(core, eps=eps) if fused else normalized(core, eps)

    def both_directions(_: Callable) -> Callable:
        core = bidirectional_diagonal(forms[form])
        return normalized(core, eps) if normalize else core

    state_shape = (q.shape[2], dict(kernel.sizes)["KEY"], v.shape[-1] + normalize)
    scale = state_shape[1] ** -0.5 if scale is None else scale
    call = Call(scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    return run_rule(core, (q, k, v, g), call, state_shape, both_directions)


recurrent_linear_attention = in_form(linear_attention, "recurrent")
chunk_linear_attention = in_form(linear_attention, "chunk")
