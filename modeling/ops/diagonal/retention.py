# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Retention (Sun et al., arXiv 2307.08621): linear attention whose state decays at a fixed rate per head.

    S_n = gamma_h S_{n-1} + k_n v_n^T      o_n = scale S_n^T q_n      gamma_h = 1 - 2^(-5 - h)      (eq. 6 and 8)

The caller rotates q and k. Padding is not counted in n. The recurrence itself is in diagonal_recurrence.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from lalm.modeling.ops.diagonal.diagonal_cpp import cpp_diagonal, diagonal_kernel
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal, recurrent_diagonal
from lalm.modeling.ops.dispatch import choose, in_form, must_separate
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.fla_kernels import fla_diagonal
from lalm.modeling.ops.rules import Call, bidirectional_diagonal, run_rule
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes, document_by_document


def retention_log_decay(
    num_heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> torch.Tensor:
    """`[H]`: log(1 - 2^(-5 - h)) for the heads h = 0, 1, ... (eq. 8), natural log; memories of 32, 64, ... tokens."""
    if device is None or torch.device(device).type == "cpu":  # elsewhere the copy of a list would wait for the device
        return torch.tensor([math.log1p(-(2.0 ** -(5 + h))) for h in range(num_heads)], dtype=dtype, device=device)
    exponents = torch.arange(-5, -5 - num_heads, -1, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(exponents)).to(dtype)


def retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    log_decay: torch.Tensor | None = None,
    implementation: str = "auto",
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retention.

    Args:
        q, k: `[B, T, H, K]`, rotated already. The number of heads H sets the decays, unless they are given.
        v: `[B, T, H, V]`.
        scale: factor on q; None for `K ** -0.5`.
        initial_state: `[N, H, K, V]`; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, boundaries of N documents packed in one row (B = 1), each with its own states.
        layout: padding and document boundaries of a batch; its rows have one state each (N = B).
        causal: False reads both sides of every document, without states (`ops/rules.py`).
        log_decay: `[H]`, the logarithms of gamma; None for `retention_log_decay`.
        implementation: "recurrent" (eq. 6), "chunk" (eq. 7), "cpp", "fla" or "auto", as for `gla`, or "parallel": the
            matrix of all pairs (eq. 5), with time and memory quadratic in T.
        chunk_size: tokens of a chunk, a power of two.

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state `[N, H, K, V]` or None. States and sums are float32,
        or float64 if an input is.

    Raises:
        ValueError: a shape does not fit, or the implementation does not exist for this input; the message names the
            argument.
    """
    check_shapes(q, k, v)
    forms: dict[str, Callable] = {
        "recurrent": recurrent_diagonal,
        "chunk": partial(chunk_diagonal, chunk_size=chunk_size),
        "parallel": partial(_parallel, log_decay=log_decay),
        "fla": fla_diagonal,
        "cpp": cpp_diagonal,
    }
    keys, values = q.shape[-1], v.shape[-1]
    core = forms[choose("retention", implementation, q, v, forms, diagonal_kernel(keys, values, 1))]
    # In the dtype of the arithmetic: a float64 gate would make everything float64.
    dtype = compute_dtype(q, k, v)
    gamma = retention_log_decay(q.shape[-2], dtype, q.device) if log_decay is None else log_decay.to(dtype)
    g = gamma[:, None].expand(*q.shape[:-1], 1)
    scale = keys**-0.5 if scale is None else scale
    call = Call(scale, initial_state, output_final_state, cu_seqlens, layout, causal)
    return run_rule(core, (q, k, v, g), call, (q.shape[2], keys, values), bidirectional_diagonal)


recurrent_retention, chunk_retention = in_form(retention, "recurrent"), in_form(retention, "chunk")


def _parallel(q, k, v, g, scale, state, layout, log_decay=None):
    """A core like `recurrent_diagonal`: o = (q k^T * D) v with D_nm = gamma^(n - m) for m <= n."""
    layout, dtype = layout or SequenceLayout(), compute_dtype(q, k, v)
    q, k, v = layout.freeze(q, k, v)
    if must_separate(layout, q, k, v):

        def alone(q, k, v, state, layout):
            return _parallel(q, k, v, g, scale, state, layout, log_decay)

        return document_by_document(alone, (q, k, v), state, layout)
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    log_gamma_H = retention_log_decay(q.shape[2], dtype, q.device) if log_decay is None else log_decay.to(dtype)
    # Whole numbers times one logarithm: exact however far apart n and m are, unlike differences of running sums.
    real_BT = torch.ones_like(q[:, :, 0, 0], dtype=torch.bool) if layout.mask is None else layout.mask
    n_BT = real_BT.cumsum(1)
    document_BT = layout.document_ids()
    if document_BT is None:
        document_BT = torch.zeros_like(n_BT)
    seen_BTT = (document_BT[:, :, None] == document_BT[:, None]).tril()
    distance_BTT = n_BT[:, :, None] - n_BT[:, None]
    decay_BTTH = (distance_BTT[..., None] * log_gamma_H).masked_fill(~seen_BTT[..., None], -torch.inf).exp()
    o = torch.einsum("bihk,bjhk,bijh,bjhv->bihv", q, k, decay_BTTH, v)
    final = torch.einsum("bjhk,bjh,bjhv->bhkv", k, decay_BTTH[:, -1], v)
    if state is not None:
        kept_BTH = (n_BT[..., None] * log_gamma_H).exp() * (document_BT == 0)[..., None]
        o = o + torch.einsum("bihk,bih,bhkv->bihv", q, kept_BTH, state.to(dtype))
        final = final + kept_BTH[:, -1, :, None, None] * state.to(dtype)
    return layout.zero_padding(o), final
