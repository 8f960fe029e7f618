# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236), with an optional decay per head and token.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T     z_t = exp(g_t) z_{t-1} + k_t
    o_t = S_t^T q_t / (z_t . q_t + eps)    (eq. 16-20; without the denominator when normalize=False)

The caller applies the feature map to q and k. The normaliser z is one more column of the state, kept up by a value
that is always 1; the C++ kernel knows it by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lalm.modeling.ops.bidirectional import bidirectional_diagonal, refuse_states
from lalm.modeling.ops.diagonal.diagonal_cpp import cpp_diagonal
from lalm.modeling.ops.diagonal.diagonal_recurrence import chunk_diagonal, normalized, recurrent_diagonal
from lalm.modeling.ops.diagonal.taylor import num_taylor_features, taylor_features
from lalm.modeling.ops.dtypes import without_autocast
from lalm.modeling.ops.fla_kernels import fla_diagonal
from lalm.modeling.ops.sequence_layout import SequenceLayout, check_shapes, check_state, per_document

_cpp_taylor = partial(cpp_diagonal, taylor=True)


def apply_linear_attention(
    core, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, normalize, eps, layout, causal
):
    """`recurrent_linear_attention` by the given core of `diagonal_recurrence`."""
    check_shapes(q, k, v, layout)
    if g is not None and g.shape != q.shape[:3]:
        raise ValueError(
            f"g must be one log decay per token and head, [B, T, H] = {tuple(q.shape[:3])}, got {tuple(g.shape)}."
        )
    if cu_seqlens is not None:
        if layout is not None:
            raise ValueError("Pass cu_seqlens or layout, not both: a layout's segments already hold the borders.")

        def one_batch(q, k, v, g, initial_state=None, output_final_state=False, layout=None):
            return apply_linear_attention(
                core, q, k, v, g, scale, initial_state, output_final_state, None, normalize, eps, layout, causal
            )

        return per_document(one_batch, (q, k, v, g), cu_seqlens, initial_state, output_final_state)
    rows = num_taylor_features(q.shape[3]) if core is _cpp_taylor else q.shape[3]
    if not causal:
        refuse_states(initial_state, output_final_state)
        core = bidirectional_diagonal(core)
    if normalize:
        core = partial(core, eps=eps) if core in (cpp_diagonal, _cpp_taylor) else normalized(core, eps)
    check_state(initial_state, (q.shape[0], q.shape[2], rows, v.shape[-1] + normalize))
    with without_autocast(q.device):
        scale = rows**-0.5 if scale is None else scale
        o, state = core(q, k, v, None if g is None else g[..., None], scale, initial_state, layout)
        return o.to(v.dtype), state if output_final_state else None


def recurrent_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal linear attention one token at a time: the definition, and the way to decode.

    Args:
        q, k: `[B, T, H, K]`, feature map applied, not negative if `normalize`.
        v: `[B, T, H, V]`.
        g: log decay `[B, T, H]`, at most 0, natural log; None for none.
        scale: factor on q; None for `K ** -0.5`. Under `normalize` it matters beside `eps` only.
        initial_state: `[N, H, K, V]`, with `normalize` `[N, H, K, V + 1]` whose last column is z; None for zeros.
        output_final_state: also return the state after the last token.
        cu_seqlens: integer `[N + 1]`, borders of N documents packed in one row (B = 1), each with its own states.
        normalize: divide by `z . q + eps`.
        layout: padding and document borders of a batch; its rows have one state each (N = B).
        causal: False reads both sides of every document, without states (`ops/bidirectional.py`).

    Returns:
        o `[B, T, H, V]` in the dtype of v, and the final state or None. States and sums are float32, or float64 if
        an input is.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    return apply_linear_attention(
        recurrent_diagonal,
        *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, normalize, eps, layout, causal),
    )


def chunk_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_linear_attention` by matrix products over chunks of `chunk_size` (a power of two) tokens.

    Same arguments, same results up to rounding. The backward pass keeps the inputs and recomputes the states.
    """

    return apply_linear_attention(
        partial(chunk_diagonal, chunk_size=chunk_size),
        *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, normalize, eps, layout, causal),
    )


def fla_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_linear_attention` by the GPU kernels of flash-linear-attention; same arguments, precision of v."""
    return apply_linear_attention(
        fla_diagonal,
        *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, normalize, eps, layout, causal),
    )


def cpp_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`recurrent_linear_attention` by the C++ kernel (diagonal_cpp.py); same arguments, float32 on a CPU."""
    return apply_linear_attention(
        cpp_diagonal,
        *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, normalize, eps, layout, causal),
    )


def cpp_taylor_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
    layout: SequenceLayout | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`cpp_linear_attention` of `taylor_features(q)` and `taylor_features(k)`, which the kernel makes block by block.

    Same arguments: q and k are `[B, T, H, D]`; K, of the states and the default of `scale`, is the number of features.
    """
    core: Callable = _cpp_taylor
    if not causal:
        q, k, core = taylor_features(q), taylor_features(k), cpp_diagonal
    return apply_linear_attention(
        core,
        *(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, normalize, eps, layout, causal),
    )
