# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Retention (Sun et al., arXiv 2307.08621): linear attention whose state decays at a fixed rate per head.

    S_n = gamma_h S_{n-1} + k_n v_n^T      o_n = scale S_n^T q_n      gamma_h = 1 - 2^(-5 - h)      (eq. 6 and 8)

The caller rotates q and k. Padding stands outside of time: it is not counted in n.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from lalm.modeling.ops.diagonal.diagonal_cpp import cpp_diagonal
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal, recurrent_diagonal
from lalm.modeling.ops.diagonal.linear_attention import apply_linear_attention
from lalm.modeling.ops.dtypes import compute_dtype
from lalm.modeling.ops.fla_kernels import fla_diagonal
from lalm.modeling.ops.sequence_layout import SequenceLayout, document_by_document, must_part


def retention_log_decay(
    num_heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> torch.Tensor:
    """`[H]`: log(1 - 2^(-5 - h)) for the heads h = 0, 1, ... (eq. 8), natural log; memories of 32, 64, ... tokens."""
    if device is None or torch.device(device).type == "cpu":  # elsewhere the copy of a list would wait for the device
        return torch.tensor([math.log1p(-(2.0 ** -(5 + h))) for h in range(num_heads)], dtype=dtype, device=device)
    exponents = torch.arange(-5, -5 - num_heads, -1, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(exponents)).to(dtype)


def _retention(core, q, k, v, scale, initial_state, output_final_state, cu_seqlens, layout, causal):
    # In the type of the arithmetic: a float64 gate would make everything float64.
    g = retention_log_decay(q.shape[-2], compute_dtype(q, k, v), q.device).expand(q.shape[:-1])
    return apply_linear_attention(
        core, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, False, 0.0, layout, causal
    )


def recurrent_retention(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retention one token at a time (eq. 6): the definition, and the way to decode.

    Args:
        q, k: `[B, T, H, K]`, rotated already. The number of heads H sets the decays, see `retention_log_decay`.
        v: `[B, T, H, V]`.
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
    return _retention(
        recurrent_diagonal, q, k, v, scale, initial_state, output_final_state, cu_seqlens, layout, causal
    )


def chunk_retention(
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
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_retention` by matrix products over chunks of `chunk_size` (a power of two) tokens (eq. 7).

    Same arguments, same results up to rounding. The backward pass keeps the inputs and recomputes the states.
    """
    return _retention(
        partial(chunk_diagonal, chunk_size=chunk_size),
        *(q, k, v, scale, initial_state, output_final_state, cu_seqlens, layout, causal),
    )


def parallel_retention(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_retention` by the matrix of all pairs (eq. 5); same arguments, time and memory quadratic in T."""
    return _retention(_parallel, q, k, v, scale, initial_state, output_final_state, cu_seqlens, layout, causal)


def fla_retention(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_retention` by the GPU kernels of flash-linear-attention; same arguments, precision of v."""
    return _retention(fla_diagonal, q, k, v, scale, initial_state, output_final_state, cu_seqlens, layout, causal)


def cpp_retention(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_retention` by the C++ kernel of `ops/diagonal/diagonal_cpp.py`; same arguments, float32 on a CPU."""
    return _retention(cpp_diagonal, q, k, v, scale, initial_state, output_final_state, cu_seqlens, layout, causal)


def _parallel(q, k, v, g, scale, state, layout):
    """A core like `recurrent_diagonal`: o = (q k^T * D) v with D_nm = gamma^(n - m) for m <= n."""
    layout, dtype = layout or SequenceLayout(), compute_dtype(q, k, v)
    q, k, v = layout.freeze(q, k, v)
    if must_part(layout, q, k, v):

        def alone(q, k, v, state, layout):
            return _parallel(q, k, v, g, scale, state, layout)

        return document_by_document(alone, (q, k, v), state, layout)
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    log_gamma_H = retention_log_decay(q.shape[2], dtype, q.device)
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
